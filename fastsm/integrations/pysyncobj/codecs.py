"""How the batteries keep keys and values as bytes.

A codec is any object with ``encode(value) -> bytes`` and ``decode(data) -> value``. A codec for keys must give equal
keys equal bytes, on every machine and in every release.
"""

from __future__ import annotations

import pickle
from typing import Any, Protocol


class Codec(Protocol):
    """What the batteries need from a codec."""

    def encode(self, value: Any) -> bytes: ...

    def decode(self, data: bytes) -> Any: ...


class Text:
    """``str`` only, as UTF-8."""

    def encode(self, value: Any) -> bytes:
        if not isinstance(value, str):
            raise TypeError(f"expected str, as configured for this battery, found {type(value).__name__}: {value!r}")
        return value.encode()

    def decode(self, data: bytes) -> str:
        return data.decode()


class Bytes:
    """Bytes-like objects only, unchanged."""

    def encode(self, value: Any) -> bytes:
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise TypeError(f"expected bytes, as configured for this battery, found {type(value).__name__}: {value!r}")
        return bytes(value)

    def decode(self, data: bytes) -> bytes:
        return data


class Keys:
    """``str``, ``bytes``, ``int``, None, and tuples of these. Equal keys have equal bytes: ``True`` is 1."""

    def encode(self, value: Any) -> bytes:
        if isinstance(value, str):
            return b"s" + value.encode("utf-8", "surrogatepass")
        if isinstance(value, bytes):
            return b"b" + value
        if isinstance(value, int):
            return b"i%d" % value
        if value is None:
            return b"n"
        if isinstance(value, tuple):
            parts = [self.encode(each) for each in value]
            return b"t" + b"".join(b"%d:%s" % (len(part), part) for part in parts)
        raise TypeError(
            f"expected str, bytes, int, None or a tuple of these as a key, found {type(value).__name__}: {value!r}; "
            "for other keys give a codec: keys=")

    def decode(self, data: bytes) -> Any:
        kind, rest = data[:1], data[1:]
        if kind == b"s":
            return rest.decode("utf-8", "surrogatepass")
        if kind == b"b":
            return rest
        if kind == b"i":
            return int(rest)
        if kind == b"n":
            return None
        if kind != b"t":
            raise ValueError(f"expected what this codec encodes, found {data!r}")
        parts = []
        while rest:
            size, _, rest = rest.partition(b":")
            parts.append(self.decode(rest[: int(size)]))
            rest = rest[int(size) :]
        return tuple(parts)


class Values:
    """Any object: ``str`` and ``bytes`` as they are, after a byte for the type; others pickled, as in PySyncObj."""

    def encode(self, value: Any) -> bytes:
        if type(value) is bytes:
            return b"b" + value
        if type(value) is str:
            return b"s" + value.encode("utf-8", "surrogatepass")
        return b"p" + pickle.dumps(value, 4)

    def decode(self, data: bytes) -> Any:
        kind = data[:1]
        if kind == b"b":
            return data[1:]
        if kind == b"s":
            return data[1:].decode("utf-8", "surrogatepass")
        if kind == b"p":
            return pickle.loads(memoryview(data)[1:])
        raise ValueError(f"expected what this codec encodes, found {data[:20]!r}")


KEYS, VALUES = Keys(), Values()
_OF_TYPES: dict[Any, Codec] = {str: Text(), bytes: Bytes()}


def codec(given: Any, otherwise: Codec) -> Codec:
    """Returns the codec that a battery was given: ``str``, ``bytes``, a codec object, or None for the default."""
    if given is None:
        return otherwise
    if given in (str, bytes):
        return _OF_TYPES[given]
    if isinstance(given, type) or not all(callable(getattr(given, name, None)) for name in ("encode", "decode")):
        raise TypeError(f"expected str, bytes or an object with encode and decode, found {given!r}")
    found: Codec = given
    return found
