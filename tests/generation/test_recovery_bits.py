"""Every bit of a small log, flipped: durable entries are never lost silently, and no value is ever wrong."""

from __future__ import annotations

from pathlib import Path

import fastsm
from fastsm import CorruptionError, Entry, FastStateMachine, LogId
from support.faulty import contents, frames_of, memory_directory


def small_log(directory: Path) -> tuple[dict[str, bytes], dict[str, bytes], int, list[LogId]]:
    """Make a log of about 1 KiB; return its files after a kill and a close, the last watermark, and chunks' ends."""
    ends = [LogId()]
    with FastStateMachine(directory) as machine:
        for index in range(1, 15):
            machine.apply([Entry(index, 1 + index // 5, fastsm.put(b"%d" % (index % 4), b"%d" % index * 3))])
            ends.append(machine.last_applied())
            if index == 7:
                machine.flush()
        killed = contents(directory)
    closed = contents(directory)
    frames = frames_of(directory / "log-1")
    killed["log-1"] = killed["log-1"][: frames[13][1]]
    assert 700 < len(killed["log-1"]) < 1300
    return killed, closed, frames[6][1], ends


def states(ends: list[LogId]) -> dict[LogId, dict[bytes, bytes]]:
    """Return the correct values after each chunk."""
    values: dict[bytes, bytes] = {}
    found = {ends[0]: {}}
    for end in ends[1:]:
        values = {**values, b"%d" % (end.index % 4): b"%d" % end.index * 3}
        found[end] = values
    return found


def open_flipped(directory: Path, files: dict[str, bytes], bit: int) -> tuple[str, LogId, dict[bytes, bytes]]:
    log = bytearray(files["log-1"])
    log[bit // 8] ^= 1 << bit % 8
    (directory / "CURRENT").write_bytes(files["CURRENT"])
    (directory / "log-1").write_bytes(log)
    try:
        machine = FastStateMachine(directory)
    except CorruptionError as error:
        named = (error.path, error.offset is None)
    else:
        named = None
    if named:
        assert named == (str(directory / "log-1"), False)
        assert contents(directory) == {"CURRENT": files["CURRENT"], "log-1": log}
        return "corrupt", LogId(), {}
    with machine:
        keys = [b"0", b"1", b"2", b"3"]
        values = {k: v for k, v in zip(keys, machine.get_many(keys), strict=True) if v is not None}
        return "open", machine.last_applied(), values


def test_every_flipped_bit_is_noticed_after_a_clean_close() -> None:
    """After a clean close each flipped bit of the log is a ``CorruptionError`` with file and offset."""
    with memory_directory() as directory:
        _, closed, _, _ = small_log(directory)
        for bit in range(8 * len(closed["log-1"])):
            outcome, applied, _ = open_flipped(directory, closed, bit)
            assert outcome == "corrupt", f"bit {bit} was not noticed: opened at {applied}"


def test_every_flipped_bit_leaves_a_right_prefix_after_an_unclean_end() -> None:
    """After a kill, a flipped bit is corruption, or leaves whole chunks at least up to the watermark."""
    with memory_directory() as directory:
        killed, _, watermark, ends = small_log(directory)
        right = states(ends)
        for bit in range(8 * len(killed["log-1"])):
            outcome, applied, values = open_flipped(directory, killed, bit)
            if bit < 8 * watermark:
                assert outcome == "corrupt", f"bit {bit}, known durable, was not noticed: opened at {applied}"
            else:
                assert outcome == "open", f"bit {bit}, after the watermark, is torn, not corrupt"
                assert ends[7] <= applied < ends[-1]
                assert values == right[applied]
