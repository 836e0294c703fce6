"""Commands: what their bytes are, and what they refuse."""

from __future__ import annotations

import mmap
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsm
from fastsm import CommandError, UnknownCommandError
from fastsm.types import (
    Add,
    Batch,
    Call,
    CompareAndSwap,
    Config,
    Delete,
    DeleteRange,
    Exists,
    Forget,
    ModifiedAt,
    Noop,
    Once,
    OpenSession,
    Put,
    Read,
    Tick,
    Touch,
    Transaction,
    ValueIs,
)
from support.command_bytes import (
    ABSENT,
    ADD,
    BATCH,
    CALL,
    COMPARE_AND_SWAP,
    CONFIG,
    DELETE,
    DELETE_RANGE,
    EXISTS,
    FORGET,
    MODIFIED_AT,
    NOOP,
    ONCE,
    OPEN_SESSION,
    PUT,
    PUT_UNTIL,
    READ,
    SWAP_UNTIL,
    TICK,
    TOUCH,
    TRANSACTION,
    VALUE_IS,
    header,
)


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
        fastsm.add(b"key", -2, initial=2**63 - 1),
        header(ADD, 3) + struct.pack("<qq", -2, 2**63 - 1) + b"key",
        Add(b"key", -2, 2**63 - 1),
    ),
    (fastsm.read(b"key"), header(READ, 3) + b"key", Read(b"key")),
    (fastsm.delete_range(b"a", b"bc"), header(DELETE_RANGE, 1, 2) + b"abc", DeleteRange(b"a", b"bc")),
    (fastsm.delete_range(None, None), header(DELETE_RANGE, 0, ABSENT), DeleteRange(b"", None)),
    (fastsm.delete_prefix(b"a\xff\xff"), header(DELETE_RANGE, 3, 1) + b"a\xff\xffb", DeleteRange(b"a\xff\xff", b"b")),
    (fastsm.delete_prefix(b"\xff"), header(DELETE_RANGE, 1, ABSENT) + b"\xff", DeleteRange(b"\xff", None)),
    (
        fastsm.transaction(
            [fastsm.value_is(b"k", b"v"), fastsm.absent(b"a"), fastsm.exists(b"e"), fastsm.modified_at(b"m", 7)],
            [fastsm.put(b"k", b"w"), fastsm.read(b"k")], [fastsm.delete(b"k")]),
        header(TRANSACTION, 0, 4) + struct.pack("<II", 2, 1) + header(VALUE_IS, 1, 1) + b"kv"
        + header(VALUE_IS, 1, ABSENT) + b"a" + header(EXISTS, 1) + b"e" + header(MODIFIED_AT, 1) + struct.pack("<Q", 7)
        + b"m" + header(PUT, 1, 1) + b"kw" + header(READ, 1) + b"k" + header(DELETE, 1) + b"k",
        Transaction(
            (ValueIs(b"k", b"v"), ValueIs(b"a", None), Exists(b"e"), ModifiedAt(b"m", 7)),
            (Put(b"k", b"w"), Read(b"k")), (Delete(b"k"),)),
    ),
    (fastsm.open_session(), header(OPEN_SESSION) + b"\xff" * 8, OpenSession(None)),
    (fastsm.open_session(expires=7), header(OPEN_SESSION) + struct.pack("<Q", 7), OpenSession(7)),
    (fastsm.forget(2**64 - 1), header(FORGET) + b"\xff" * 8, Forget(2**64 - 1)),
    (
        fastsm.once(5, 6, fastsm.batch([fastsm.noop()]), expires=2**63 - 1),
        header(ONCE, 0, 16) + struct.pack("<QQQ", 5, 6, 2**63 - 1) + header(BATCH, 0, 1) + header(NOOP),
        Once(5, 6, Batch((Noop(),)), 2**63 - 1),
    ),
    (
        fastsm.put(b"key", b"value", expires=2**63 - 1),
        header(PUT_UNTIL, 3, 5) + struct.pack("<Q", 2**63 - 1) + b"keyvalue", Put(b"key", b"value", 2**63 - 1),
    ),
    (fastsm.put(bytearray(b"k"), b"", expires=0), header(PUT_UNTIL, 1) + bytes(8) + b"k", Put(b"k", b"", 0)),
    (
        fastsm.compare_and_swap(b"key", b"old", b"newer", expires=7),
        header(SWAP_UNTIL, 3, 5) + struct.pack("<IQ", 3, 7) + b"keyoldnewer",
        CompareAndSwap(b"key", b"old", b"newer", 7),
    ),
    (
        fastsm.compare_and_swap(b"key", None, b"", expires=0),
        header(SWAP_UNTIL, 3, 0) + struct.pack("<IQ", ABSENT, 0) + b"key", CompareAndSwap(b"key", None, b"", 0),
    ),
    (fastsm.touch(b"key", 5), header(TOUCH, 3) + struct.pack("<Q", 5) + b"key", Touch(b"key", 5)),
    (fastsm.touch(b"", None), header(TOUCH) + b"\xff" * 8, Touch(b"", None)),
    (fastsm.tick(9), header(TICK) + struct.pack("<Q", 9) + b"\xff" * 8, Tick(9, None)),
    (
        fastsm.tick(2**63 - 1, limit=2**63 - 1), header(TICK) + struct.pack("<QQ", 2**63 - 1, 2**63 - 1),
        Tick(2**63 - 1, 2**63 - 1),
    ),
    (
        fastsm.batch([fastsm.put(b"k", b"v", expires=1), fastsm.touch(b"k", 2)]),
        header(BATCH, 0, 2) + header(PUT_UNTIL, 1, 1) + struct.pack("<Q", 1) + b"kv" + header(TOUCH, 1)
        + struct.pack("<Q", 2) + b"k",
        Batch((Put(b"k", b"v", 1), Touch(b"k", 2))),
    ),
    (
        fastsm.transaction([], [fastsm.put(b"k", b"v", expires=1), fastsm.touch(b"k", None)]),
        header(TRANSACTION) + struct.pack("<II", 2, 0) + header(PUT_UNTIL, 1, 1) + struct.pack("<Q", 1) + b"kv"
        + header(TOUCH, 1) + b"\xff" * 8 + b"k",
        Transaction((), (Put(b"k", b"v", 1), Touch(b"k", None)), ()),
    ),
    (
        fastsm.once(1, 1, fastsm.touch(b"k", 2)),
        header(ONCE, 0, 17) + struct.pack("<QQ", 1, 1) + b"\xff" * 8 + header(TOUCH, 1) + struct.pack("<Q", 2) + b"k",
        Once(1, 1, Touch(b"k", 2), None),
    ),
    (fastsm.transaction([], []), header(TRANSACTION) + bytes(8), Transaction((), (), ())),
    (
        fastsm.call("p\u00f6p", b"load", version=3),
        header(CALL, 4, 4) + struct.pack("<I", 3) + b"p\xc3\xb6pload",
        Call("p\u00f6p", b"load", 3),
    ),
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
deadlines = st.none() | st.integers(0, 2**63 - 1)
simple = st.one_of(
    st.builds(Put, keys, values, deadlines),
    st.builds(Delete, keys),
    st.builds(CompareAndSwap, keys, maybe_values, maybe_values),
    st.builds(CompareAndSwap, keys, maybe_values, values, deadlines),
    st.builds(Touch, keys, deadlines),
    st.just(Noop()),
)
batches = st.builds(Batch, st.lists(simple, max_size=6).map(tuple))
ticks = st.builds(Tick, st.integers(0, 2**63 - 1), deadlines)
decoded_commands = simple | st.builds(Config, values) | batches | ticks


def encode(meaning: Any) -> bytes:  # noqa: PLR0911  # one for each kind
    if isinstance(meaning, Put):
        return fastsm.put(meaning.key, meaning.value, expires=meaning.expires)
    if isinstance(meaning, Delete):
        return fastsm.delete(meaning.key)
    if isinstance(meaning, CompareAndSwap):
        return fastsm.compare_and_swap(meaning.key, meaning.expected, meaning.value, expires=meaning.expires)
    if isinstance(meaning, Touch):
        return fastsm.touch(meaning.key, meaning.expires)
    if isinstance(meaning, Tick):
        return fastsm.tick(meaning.now, limit=meaning.limit)
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


@pytest.mark.parametrize("make", [
    lambda number: fastsm.put(b"k", b"v", expires=number),
    lambda number: fastsm.compare_and_swap(b"k", None, b"v", expires=number),
    lambda number: fastsm.put_many([b"k"], [b"v"], expires=[number]),
    lambda number: fastsm.put_many([b"k"], [b"v"], expires=np.array([number])),
    lambda number: fastsm.touch(b"k", number),
    lambda number: fastsm.open_session(expires=number),
    lambda number: fastsm.once(1, 1, fastsm.noop(), expires=number),
    fastsm.tick,
    lambda number: fastsm.tick(1, limit=number),
])  # fmt: skip
def test_deadlines_times_and_limits_are_from_0_to_63_bits(make: Any) -> None:
    """Beyond them a number is refused where the command is made, and what is no integer is a TypeError."""
    for number in (0, np.int64(5), 2**63 - 1):
        fastsm.check(make(number))
    for number in (-1, 2**63, 2**64 - 1, 2**64):
        with pytest.raises(CommandError, match=rf"{number}: expected 0 to 2\*\*63 - 1"):
            make(number)
    for number in ("5", 5.0, b"5"):
        with pytest.raises(TypeError):
            make(number)


def test_a_swap_to_nothing_has_no_deadline() -> None:
    """A key that is removed cannot expire: refused where the command is made."""
    with pytest.raises(CommandError, match="expires 5 with value=None"):
        fastsm.compare_and_swap(b"k", b"v", None, expires=5)


def test_a_command_prints_its_deadline_only_where_it_has_one() -> None:
    """What is decoded prints as it was written: without a deadline there is none to see."""
    assert repr(fastsm.decode(fastsm.put(b"k", b"v"))) == "Put(key=b'k', value=b'v')"
    assert repr(fastsm.decode(fastsm.put(b"k", b"v", expires=0))) == "Put(key=b'k', value=b'v', expires=0)"


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
    "put with half a deadline": header(PUT_UNTIL) + bytes(7),
    "put with a deadline out of range": header(PUT_UNTIL) + struct.pack("<Q", 2**63),
    "put with a deadline that is none": header(PUT_UNTIL) + b"\xff" * 8,
    "put with a deadline and a value cut short": header(PUT_UNTIL, 1, 2) + bytes(8) + b"kv",
    "swap with half a deadline": header(SWAP_UNTIL) + bytes(11),
    "swap with a deadline out of range": header(SWAP_UNTIL) + struct.pack("<IQ", 0, 2**63),
    "swap with a deadline for nothing": header(SWAP_UNTIL, 0, ABSENT) + struct.pack("<IQ", 0, 5),
    "touch with a value": header(TOUCH, 1, 1) + bytes(8) + b"kv",
    "touch without a deadline": header(TOUCH, 0) + bytes(7),
    "touch with a deadline out of range": header(TOUCH) + struct.pack("<Q", 2**64 - 2),
    "tick with a key": header(TICK, 1) + bytes(16) + b"k",
    "tick with a value": header(TICK, 0, 1) + bytes(16) + b"v",
    "tick without a limit": header(TICK) + bytes(15),
    "tick to a time out of range": header(TICK) + struct.pack("<QQ", 2**63, 0),
    "tick to no time": header(TICK) + b"\xff" * 16,
    "tick with a limit out of range": header(TICK) + struct.pack("<QQ", 0, 2**63),
    "tick in a batch": header(BATCH, 0, 1) + fastsm.tick(1),
    "tick in a transaction": header(TRANSACTION) + struct.pack("<II", 1, 0) + fastsm.tick(1),
    "tick in a once": header(ONCE, 0, 24) + struct.pack("<QQQ", 1, 1, 1) + fastsm.tick(1),
    "swap with a deadline in a transaction":
        header(TRANSACTION) + struct.pack("<II", 1, 0) + fastsm.compare_and_swap(b"", b"", b"", expires=1),
    "touch as a condition": header(TRANSACTION, 0, 1) + bytes(8) + fastsm.touch(b"k", 1),
    "member cut short": header(BATCH, 0, 1) + header(PUT, 2, 0) + b"k",
}

UNKNOWN = {
    "version": header(PUT, 1, 1, version=1) + b"kv",
    "largest version": b"\xff",
    "kind 0": header(0),
    "kind 19": header(19),
    "kind 255": header(255, 1, 2) + b"xyz",
    "version of a member": header(BATCH, 0, 1) + header(NOOP, version=1),
    "kind of a member": header(BATCH, 0, 2) + header(NOOP) + header(19),
    "a condition alone": header(128, 1, 1) + b"kv",
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


@pytest.mark.parametrize("member", [fastsm.batch([]), fastsm.config(b""), fastsm.tick(1), b"", header(PUT, 1) + b"kv"])
def test_a_batch_refuses_members_where_it_is_made(member: bytes) -> None:
    """A batch, a config or something malformed inside a batch is refused, and the error says which member."""
    with pytest.raises(CommandError, match="member 1 of the batch"):
        fastsm.batch([fastsm.noop(), member])


def test_a_batch_refuses_unknown_members_as_unknown() -> None:
    """A member of an unknown kind is an UnknownCommandError where the batch is made, too."""
    with pytest.raises(UnknownCommandError, match="member 0 of the batch"):
        fastsm.batch([header(19)])


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
