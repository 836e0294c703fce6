"""Commands: what their bytes are, what they refuse, and that no bytes at all can hurt the decoder."""

from __future__ import annotations

import mmap
import random
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import CommandError, UnknownCommandError
from fastsm.types import Batch, CompareAndSwap, Config, Delete, Noop, Put

PUT, DELETE, COMPARE_AND_SWAP, NOOP, CONFIG, BATCH = range(1, 7)
ABSENT = 0xFFFFFFFF


def header(kind: int, key_size: int = 0, size: int = 0, version: int = 0) -> bytes:
    return struct.pack("<BBHI", version, kind, key_size, size)


@pytest.fixture(scope="module")
def too_large() -> memoryview:
    """2**31 bytes that take no memory: one more than a value may have."""
    return memoryview(mmap.mmap(-1, fastsm.MAX_VALUE_SIZE + 1))


# ---- the bytes ---------------------------------------------------------------------------------------

ENCODINGS = [
    (fastsm.put(b"key", b"value"), header(PUT, 3, 5) + b"keyvalue", Put(b"key", b"value")),
    (fastsm.put(b"", b""), header(PUT), Put(b"", b"")),
    (fastsm.put(b"\0" * 65535, b"v"), header(PUT, 65535, 1) + b"\0" * 65535 + b"v", Put(b"\0" * 65535, b"v")),
    (fastsm.delete(b"key"), header(DELETE, 3) + b"key", Delete(b"key")),
    (fastsm.delete(b""), header(DELETE), Delete(b"")),
    (
        fastsm.compare_and_swap(b"key", b"old", b"newer"),
        header(COMPARE_AND_SWAP, 3, 5) + struct.pack("<I", 3) + b"keyoldnewer",
        CompareAndSwap(b"key", b"old", b"newer"),
    ),
    (
        fastsm.compare_and_swap(b"key", None, b"new"),
        header(COMPARE_AND_SWAP, 3, 3) + struct.pack("<I", ABSENT) + b"keynew",
        CompareAndSwap(b"key", None, b"new"),
    ),
    (
        fastsm.compare_and_swap(b"key", b"", None),
        header(COMPARE_AND_SWAP, 3, ABSENT) + struct.pack("<I", 0) + b"key",
        CompareAndSwap(b"key", b"", None),
    ),
    (
        fastsm.compare_and_swap(b"", None, None),
        header(COMPARE_AND_SWAP, 0, ABSENT) + struct.pack("<I", ABSENT),
        CompareAndSwap(b"", None, None),
    ),
    (fastsm.noop(), header(NOOP), Noop()),
    (fastsm.config(b"a, b, c"), header(CONFIG, 0, 7) + b"a, b, c", Config(b"a, b, c")),
    (fastsm.batch([]), header(BATCH), Batch(())),
    (
        fastsm.batch([fastsm.put(b"k", b"v"), fastsm.noop(), fastsm.delete(b"k")]),
        header(BATCH, 0, 3) + header(PUT, 1, 1) + b"kv" + header(NOOP) + header(DELETE, 1) + b"k",
        Batch((Put(b"k", b"v"), Noop(), Delete(b"k"))),
    ),
]


@pytest.mark.parametrize(("made", "expected", "meaning"), ENCODINGS)
def test_encoding_is_what_the_format_says(made: bytes, expected: bytes, meaning: object) -> None:
    """A command's bytes are those that `struct` makes, and they say what was meant."""
    assert type(made) is bytes
    assert made == expected
    assert fastsm.decode(made) == meaning
    assert fastsm.check(made) is None


keys = st.binary(max_size=40)
values = st.binary(max_size=200)
maybe_values = st.none() | values
simple = st.one_of(
    st.builds(Put, keys, values),
    st.builds(Delete, keys),
    st.builds(CompareAndSwap, keys, maybe_values, maybe_values),
    st.just(Noop()),
)
batches = st.builds(Batch, st.lists(simple, max_size=6).map(tuple))
decoded_commands = simple | st.builds(Config, values) | batches


def encode(meaning: Any) -> bytes:
    if isinstance(meaning, Put):
        return fastsm.put(meaning.key, meaning.value)
    if isinstance(meaning, Delete):
        return fastsm.delete(meaning.key)
    if isinstance(meaning, CompareAndSwap):
        return fastsm.compare_and_swap(meaning.key, meaning.expected, meaning.value)
    if isinstance(meaning, Noop):
        return fastsm.noop()
    if isinstance(meaning, Config):
        return fastsm.config(meaning.data)
    return fastsm.batch([encode(member) for member in meaning.commands])


@given(decoded_commands)
def test_what_is_encoded_is_decoded(meaning: Any) -> None:
    """Decoding gives back what was encoded, and every shorter or longer string of bytes is refused."""
    command = encode(meaning)
    assert fastsm.decode(command) == meaning
    for wrong in (command[:-1], command + b"\0"):
        with pytest.raises(CommandError):
            fastsm.check(wrong)


# ---- arguments ---------------------------------------------------------------------------------------

BYTES_LIKE = [
    bytearray(b"abc"),
    memoryview(b"xabcx")[1:4],
    np.frombuffer(b"abc", dtype=np.uint8),
    np.array([b"abc"], dtype="S3"),
]


@pytest.mark.parametrize("source", BYTES_LIKE, ids=lambda source: type(source).__name__)
def test_arguments_may_be_any_bytes_like_object(source: Any) -> None:
    """Keys, values, data and commands may be any object with a buffer of bytes."""
    assert fastsm.put(source, source) == fastsm.put(b"abc", b"abc")
    assert fastsm.put(b"abc", source) == fastsm.put(b"abc", b"abc")
    assert fastsm.delete(source) == fastsm.delete(b"abc")
    assert fastsm.config(source) == fastsm.config(b"abc")
    swap = fastsm.compare_and_swap(b"abc", b"abc", b"abc")
    assert fastsm.compare_and_swap(source, source, source) == swap


@pytest.mark.parametrize("wrap", [bytearray, memoryview, lambda command: np.frombuffer(command, np.uint8)])
def test_commands_may_be_any_bytes_like_object(wrap: Any) -> None:
    """`decode`, `check` and `batch` take commands in any buffer of bytes."""
    command = fastsm.put(b"key", b"value")
    assert fastsm.decode(wrap(command)) == Put(b"key", b"value")
    assert fastsm.check(wrap(command)) is None
    assert fastsm.batch([wrap(command)]) == fastsm.batch([command])


@pytest.mark.parametrize(
    "call",
    [
        lambda: fastsm.put("key", b"v"),
        lambda: fastsm.put(b"k", "value"),
        lambda: fastsm.put(b"k", None),
        lambda: fastsm.put(b"k", 7),
        lambda: fastsm.delete("key"),
        lambda: fastsm.compare_and_swap("key", None, None),
        lambda: fastsm.compare_and_swap(b"k", "expected", None),
        lambda: fastsm.compare_and_swap(b"k", None, "value"),
        lambda: fastsm.config("data"),
        lambda: fastsm.batch(["command"]),
        lambda: fastsm.decode("command"),
        lambda: fastsm.check(None),
    ],
)
def test_what_is_not_bytes_is_a_type_error(call: Any) -> None:
    """Text, numbers and None are no bytes: a TypeError, not a guess of an encoding."""
    with pytest.raises(TypeError):
        call()


def test_text_is_told_to_encode_itself() -> None:
    """The error for text says what to do."""
    with pytest.raises(TypeError, match=r"key is a str.*key\.encode\(\)"):
        fastsm.put("key", b"value")


# ---- limits ------------------------------------------------------------------------------------------

def test_limits_have_names() -> None:
    """The limits are those of the format's fields."""
    assert fastsm.MAX_KEY_SIZE == 65_535
    assert fastsm.MAX_VALUE_SIZE == 2**31 - 1
    assert fastsm.MAX_COMMAND_SIZE == 2**32 - 1


@pytest.mark.parametrize("make", [
    lambda key: fastsm.put(key, b""), fastsm.delete, lambda key: fastsm.compare_and_swap(key, None, None)])
@pytest.mark.parametrize("source", [bytes, bytearray])
def test_a_key_has_a_limit(make: Any, source: Any) -> None:
    """A key one byte over the limit is refused where it is made, with both sizes; at the limit it is not."""
    make(source(65_535))
    with pytest.raises(CommandError, match=r"key of 65536 bytes: the limit is 65535"):
        make(source(65_536))


def test_a_value_has_a_limit(too_large: memoryview) -> None:
    """A value of 2**31 bytes is refused where it is made, before anything is copied."""
    for make in (
        lambda: fastsm.put(b"k", too_large),
        lambda: fastsm.config(too_large),
        lambda: fastsm.compare_and_swap(b"k", None, too_large),
        lambda: fastsm.compare_and_swap(b"k", too_large, None),
    ):
        with pytest.raises(CommandError, match=r"of 2147483648 bytes: the limit is 2147483647"):
            make()


def test_a_command_has_a_limit(too_large: memoryview) -> None:
    """Two values that are just allowed make a compare-and-swap that is not, and its size does not wrap."""
    largest = too_large[:-1]
    with pytest.raises(CommandError, match=r"command of 4294967306 bytes: the limit is 4294967295"):
        fastsm.compare_and_swap(b"", largest, largest)


@pytest.mark.parametrize(
    "command",
    [
        header(PUT, 0, 2**31),
        header(CONFIG, 0, 2**31),
        header(PUT, 0, ABSENT),
        header(COMPARE_AND_SWAP, 0, 2**31) + struct.pack("<I", 0),
        header(COMPARE_AND_SWAP, 0, ABSENT - 1) + struct.pack("<I", 0),
        header(COMPARE_AND_SWAP, 0, 0) + struct.pack("<I", 2**31),
    ],
)
def test_a_decoded_value_has_the_same_limit(command: bytes) -> None:
    """A header that claims a value over the limit is refused for that."""
    with pytest.raises(CommandError, match="larger than 2147483647 bytes"):
        fastsm.check(command)


# ---- what is refused ---------------------------------------------------------------------------------

MALFORMED = {
    "nothing": b"",
    "half a header": header(PUT)[:7],
    "key cut short": header(PUT, 3, 0) + b"ke",
    "value cut short": header(PUT, 1, 3) + b"kva",
    "bytes left over": header(PUT, 1, 1) + b"kv!",
    "delete with a value": header(DELETE, 1, 1) + b"kv",
    "noop with a key": header(NOOP, 1) + b"k",
    "noop with a value": header(NOOP, 0, 1) + b"v",
    "config with a key": header(CONFIG, 1, 1) + b"kv",
    "swap without its second size": header(COMPARE_AND_SWAP, 0, 0),
    "swap with half of its second size": header(COMPARE_AND_SWAP, 0, 0) + b"\0\0\0",
    "swap cut short": header(COMPARE_AND_SWAP, 1, 1) + struct.pack("<I", 1) + b"ke",
    "batch with a key size": header(BATCH, 1, 1) + header(NOOP),
    "batch that counts too few": header(BATCH, 0, 1) + header(NOOP) * 2,
    "batch that counts too many": header(BATCH, 0, 3) + header(NOOP) * 2,
    "batch of the largest count": header(BATCH, 0, ABSENT) + header(NOOP),
    "empty batch with bytes left over": header(BATCH) + header(NOOP),
    "batch in a batch": header(BATCH, 0, 1) + header(BATCH),
    "config in a batch": header(BATCH, 0, 1) + header(CONFIG),
    "member cut short": header(BATCH, 0, 1) + header(PUT, 2, 0) + b"k",
}

UNKNOWN = {
    "version": header(PUT, 1, 1, version=1) + b"kv",
    "largest version": b"\xff",
    "kind 0": header(0),
    "kind 7": header(7),
    "kind 255": header(255, 1, 2) + b"xyz",
    "version of a member": header(BATCH, 0, 1) + header(NOOP, version=1),
    "kind of a member": header(BATCH, 0, 2) + header(NOOP) + header(7),
}


@pytest.mark.parametrize("command", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_commands_are_command_errors(command: bytes) -> None:
    """What is malformed is a CommandError, and not taken for a command of the future."""
    for function in (fastsm.check, fastsm.decode):
        with pytest.raises(CommandError) as caught:
            function(command)
        assert type(caught.value) is CommandError
        assert caught.value.index is None


@pytest.mark.parametrize("command", UNKNOWN.values(), ids=UNKNOWN.keys())
def test_commands_of_the_future_are_unknown(command: bytes) -> None:
    """Another version or kind is an UnknownCommandError, which a host may tell from damage."""
    for function in (fastsm.check, fastsm.decode):
        with pytest.raises(UnknownCommandError, match="upgrade this replica"):
            function(command)


def test_errors_of_commands_are_value_errors() -> None:
    """Hosts that know nothing of fastsm can catch ValueError."""
    assert issubclass(UnknownCommandError, CommandError)
    assert issubclass(CommandError, ValueError)
    assert issubclass(CommandError, fastsm.FastsmError)


@pytest.mark.parametrize("member", [fastsm.batch([]), fastsm.config(b""), b"", header(PUT, 1) + b"kv"])
def test_a_batch_refuses_members_where_it_is_made(member: bytes) -> None:
    """A batch, a config or something malformed inside a batch is refused, and the error says which member."""
    with pytest.raises(CommandError, match="member 1 of the batch"):
        fastsm.batch([fastsm.noop(), member])


def test_a_batch_refuses_unknown_members_as_unknown() -> None:
    """A member of an unknown kind is an UnknownCommandError where the batch is made, too."""
    with pytest.raises(UnknownCommandError, match="member 0 of the batch"):
        fastsm.batch([header(9)])


def test_a_batch_takes_any_iterable() -> None:
    """The commands of a batch may come from a generator."""
    assert fastsm.batch(fastsm.delete(key) for key in (b"a", b"b")) == fastsm.batch(
        [fastsm.delete(b"a"), fastsm.delete(b"b")])


@pytest.mark.parametrize("command", [
    fastsm.put(b"k" * 60_000, b"v" * 1_000_000),
    fastsm.delete(b"\0" * 60_000),
    fastsm.compare_and_swap(b"k" * 60_000, b"e" * 100_000, b"v" * 100_000),
    fastsm.config(b"d" * 100_000),
    fastsm.batch([fastsm.put(b"k" * 100, b"v" * 100)] * 10_000),
])
def test_what_is_decoded_prints_short(command: bytes) -> None:
    """However large a command is, what it says fits on a screen and names its kind."""
    printed = repr(fastsm.decode(command))
    assert len(printed) < 1_000
    assert printed.startswith(("Put(", "Delete(", "CompareAndSwap(", "Config(", "Batch("))


# ---- any bytes ---------------------------------------------------------------------------------------

class Refused(Exception):
    """The plain decoder below refuses; `past_header` says whether sizes were looked at by then."""

    def __init__(self, past_header: bool) -> None:
        self.past_header = past_header


def plainly_decode(data: bytes) -> Any:
    """The format again, slowly and without any of the library's code."""
    if len(data) >= 8 and data[:2] == bytes([0, BATCH]):
        _, _, zero, count = struct.unpack_from("<BBHI", data)
        if zero:
            raise Refused(False)
        members, rest = [], data[8:]
        while len(members) < count:
            member, rest = plainly_decode_one(rest, in_batch=True)
            members.append(member)
        meaning: Any = Batch(tuple(members))
    else:
        meaning, rest = plainly_decode_one(data, in_batch=False)
    if rest:
        raise Refused(True)
    return meaning


def plainly_decode_one(data: bytes, in_batch: bool) -> tuple[Any, bytes]:
    if len(data) < 8:
        raise Refused(in_batch)
    version, kind, key_size, size = struct.unpack_from("<BBHI", data)
    unused = {DELETE: size, NOOP: size or key_size, CONFIG: key_size}.get(kind, 0)
    allowed = (PUT, DELETE, COMPARE_AND_SWAP, NOOP) + (() if in_batch else (CONFIG,))
    too_large = size > 2**31 - 1 and not (kind == COMPARE_AND_SWAP and size == ABSENT)
    if version or kind not in allowed or unused or too_large:
        raise Refused(in_batch)
    fields = [key_size, size]
    rest = data[8:]
    if kind == COMPARE_AND_SWAP:
        if len(rest) < 4:
            raise Refused(True)
        (expected_size,) = struct.unpack_from("<I", rest)
        if 2**31 <= expected_size != ABSENT:
            raise Refused(True)
        fields = [key_size, expected_size, size]
        rest = rest[4:]
    taken: list[Any] = []
    for field in fields:
        if field == ABSENT:
            taken.append(None)
            continue
        if len(rest) < field:
            raise Refused(True)
        taken.append(rest[:field])
        rest = rest[field:]
    if kind == DELETE:
        return Delete(taken[0]), rest
    if kind == NOOP:
        return Noop(), rest
    if kind == CONFIG:
        return Config(taken[1]), rest
    return {PUT: Put, COMPARE_AND_SWAP: CompareAndSwap}[kind](*taken), rest


def random_command(rng: random.Random, depth: int = 0) -> bytes:
    def data(limit: int) -> bytes:
        return rng.randbytes(rng.randrange(limit))

    kind = rng.randrange(1, 7 if depth == 0 else 5)
    if kind == PUT:
        return fastsm.put(data(20), data(80))
    if kind == DELETE:
        return fastsm.delete(data(20))
    if kind == COMPARE_AND_SWAP:
        return fastsm.compare_and_swap(
            data(20), rng.choice([None, data(40)]), rng.choice([None, data(40)]))
    if kind == NOOP:
        return fastsm.noop()
    if kind == CONFIG:
        return fastsm.config(data(60))
    return fastsm.batch([random_command(rng, 1) for _ in range(rng.randrange(6))])


def mutate(rng: random.Random, command: bytes) -> bytes:
    """One to three of: bytes flipped, cut, extended, a size tampered with, another command spliced in."""
    data = bytearray(command)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) + 1)
        way = rng.randrange(5)
        if way == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[at:]
        elif way == 2:
            data[at:at] = rng.randbytes(rng.randrange(1, 12))
        elif way == 3 and len(data) >= 8:
            layout, place = rng.choice([("<H", 2), ("<I", 4), ("<I", 8)])
            number = rng.choice([0, 1, len(data) - 8, len(data) - 7, 255, 2**31 - 1, 2**31, ABSENT])
            if len(data) >= place + 4:
                struct.pack_into(layout, data, place, number & 0xFFFF if place == 2 else number)
        else:
            data[at:] = random_command(rng)
    return bytes(data)


def test_no_bytes_hurt_the_decoder() -> None:
    """100,000 random and mutated inputs decode as the format says or are refused, in memory of their size."""
    rng = random.Random(20)
    past_header = accepted = 0
    tracemalloc.start()
    try:
        for round_number in range(100_000):
            way = round_number % 10
            if way == 0:
                data = rng.randbytes(rng.randrange(40))
            elif way == 1:
                data = bytes([0, rng.randrange(8)]) + rng.randbytes(rng.randrange(30))
            else:
                data = mutate(rng, random_command(rng))
            try:
                expected = plainly_decode(data)
                past_header += 1
            except Refused as refusal:
                expected = None
                past_header += refusal.past_header
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                found = fastsm.decode(data)
            except CommandError:
                found = None
            assert tracemalloc.get_traced_memory()[1] - before < 16_384 + 64 * len(data), data.hex()
            assert found == expected, data.hex()
            accepted += expected is not None
    finally:
        tracemalloc.stop()
    assert past_header > 30_000
    assert accepted > 5_000
