"""Signals: a handler that raises, at any moment of any call, leaves the state whole and the machine usable.

Everything here runs in separate processes, so that a deadlock ends with the tracebacks of all threads.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

HANGS_AFTER = 100  # seconds, much longer than anything here takes

STORM = """
    import faulthandler, gc, os, random, shutil, signal, sys, threading, time
    import numpy
    import fastsm
    from fastsm import FastStateMachine

    faulthandler.dump_traceback_later(40, exit=True)
    path, name = sys.argv[1:3]
    options = {"sync": "apply"} if name == "apply and sync" else {}
    beside = name == "flush next to others"
    rng = random.Random(name)
    KEYS = [b"key-%d" % i for i in range(2000)]

    class Interruption(Exception):
        pass

    armed = False
    def interrupt(number, frame):
        global armed
        if armed:
            armed = False
            raise Interruption

    signal.signal(signal.SIGALRM, interrupt)

    def attempt(function):
        # One call, and an interruption 50 to 500 microseconds from now, and again until it has struck.
        global armed
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(50e-6, 500e-6), 100e-6)
            function()
            armed = False
        except Interruption:
            return True
        finally:
            armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        return False

    machine = FastStateMachine(path, **options)

    def chunk(index, size):
        value = b"%d " % index + bytes(size)
        return [(index, 1, fastsm.put_many(KEYS[:1000], [value] * 1000)),
                (index + 1, 1, fastsm.put_many(KEYS[1000:], [value] * 1000))]

    def check():
        # The state is that after a whole chunk, and the log on the disk says the same.
        last = machine.last_applied().index
        assert last % 2 == 0, last
        values = set(machine.get_many(KEYS))
        assert len(values) == 1, len(values)
        assert last or values == {None}
        assert not last or values.pop().startswith(b"%d " % (last - 1))

    def check_disk():
        with FastStateMachine(path, read_only=True) as reader:
            assert reader.last_applied() == machine.last_applied(), (reader.last_applied(), machine.last_applied())

    def apply():
        machine.apply(chunk(machine.last_applied().index + 1, rng.choice((0, 10, 200))))

    def small_apply():
        index = machine.last_applied().index + 1
        for i in range(300):
            machine.apply([(index + 2 * i + j, 1, fastsm.put(b"small", b"")) for j in (0, 1)])

    def flush():
        machine.flush()

    def get_many():
        values = machine.get_many(KEYS)
        assert len(set(values)) == 1

    def scan():
        if machine._order() is not None and rng.random() < 0.5:
            machine._order().forget()
        assert len(machine.scan_prefix(b"key-").entries) == len(KEYS)
        assert machine.count(b"key-", b"key.") == len(KEYS)
        assert sum(1 for _ in machine.ordered(prefix=b"key-")) == len(KEYS)

    def columns():
        machine.columns()
        machine.get_columns(KEYS)
        for pair in machine.items():
            pass

    def hard_state():
        machine.update_last_snapshot_metadata(fastsm.SnapshotMetadata(machine.last_applied(), bytes(32)))
        machine.save_hard_state()

    def stop_and_start():
        machine.stop()
        machine.start()

    def close():
        machine.close()

    def open_again():
        global machine
        machine = FastStateMachine(path)

    calls = {"apply": apply, "apply and sync": apply, "small apply": small_apply, "flush": flush, "get_many": get_many,
             "scan": scan, "columns": columns, "verify": lambda: machine.verify(), "hard state": hard_state,
             "stop and start": stop_and_start, "flush next to others": flush, "clear": lambda: machine.clear(),
             "close": close, "open": open_again}
    call = calls[name]
    machine.apply(chunk(1, 10))
    ending = False
    def also_flush():
        while not ending:
            machine.flush()
            time.sleep(0)
    others = [threading.Thread(target=also_flush, daemon=True) for _ in range(2 if beside else 0)]
    for other in others:
        other.start()

    struck = tries = 0
    before = machine.last_applied()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    started = time.monotonic()
    # Two seconds, and on a slow or busy machine as long as it takes to be interrupted often.
    while time.monotonic() < started + 2 or (struck <= 20 and time.monotonic() < started + 60):
        if name in ("flush", "flush next to others", "hard state", "stop and start", "clear", "close"):
            machine.apply(chunk(machine.last_applied().index + 1, 10))
        elif call is small_apply:
            machine.apply(chunk(machine.last_applied().index + 1, 0))
        elif call is open_again:
            machine.close()
        before = machine.last_applied() if call is not open_again else before
        tries += 1
        hit = attempt(call)
        struck += hit
        if name == "close":
            machine.close()   # it may have been interrupted anywhere
            machine = FastStateMachine(path)
        elif name == "open" and not machine.is_running():
            machine = FastStateMachine(path)
        machine.start()
        if name in ("close", "open"):
            assert machine.last_applied() == before, (machine.last_applied(), before)
        if call is small_apply:
            assert machine.last_applied().index % 2 == 0
        else:
            check()
        if hit and call in (apply, small_apply):
            check_disk()
        if machine.stats().log_bytes > 200 << 20:
            machine.clear()
            machine.apply(chunk(1, 10))
    ending = True
    for other in others:
        other.join()
    if descriptors is not None:
        gc.collect()  # tracebacks of the interruptions hold frames, and those hold unfinished objects
        now = []
        for number in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{number}") or os.path.islink(f"/proc/self/fd/{number}"):
                now.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        assert len(now) <= descriptors, f"{len(now) - descriptors} descriptors leak, among {sorted(set(now))}"
    assert struck > 20, f"{struck} interruptions in {tries} calls: that proves nothing"

    # Usable: every call works, even from another thread, and no lock is left held.
    machine.apply(chunk(machine.last_applied().index + 1, 10))
    del calls["close"], calls["open"], calls["clear"]
    for function in calls.values():
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()
    machine._check()
    last = machine.last_applied()
    assert machine.durable() <= last
    machine.flush()
    assert machine.durable() == last
    state = dict(machine.items())
    machine.close()
    with FastStateMachine(path) as machine:
        machine._check()
        assert (machine.last_applied(), dict(machine.items())) == (last, state)
    shutil.rmtree(path)
    print("fine:", struck, "interruptions in", tries, "calls")
"""

CTRL_C = """
    import faulthandler, os, shutil, signal, sys, threading, time
    import numpy as np
    import fastsm
    from fastsm import FastStateMachine

    faulthandler.dump_traceback_later(80, exit=True)
    path, name = sys.argv[1:3]
    ROWS, CHUNKS = 200_000, 12
    with FastStateMachine(path) as machine:
        for index in range(1, CHUNKS + 1):
            keys = np.arange(index * ROWS, (index + 1) * ROWS, dtype=np.uint64).view(np.uint8).reshape(ROWS, 8)
            values = np.full((ROWS, 100), index, dtype=np.uint8)
            machine.apply([(index, 1, fastsm.put_many(keys, values))])
        size = machine.stats().log_bytes

    sent = 0.0
    def press():
        global sent
        sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def interrupted(function, seconds):
        # Return how long after Ctrl-C the call ended; None if it was done before.
        timer = threading.Timer(seconds, press)
        timer.start()
        try:
            function()
            timer.cancel()
            timer.join()
        except KeyboardInterrupt:
            return time.monotonic() - sent
        return None

    def served(function):
        # Ctrl-C is sent earlier and earlier until it arrives within the call, however fast the computer is.
        seconds = duration(function)
        while True:
            seconds = seconds / 2 if seconds > 1e-6 else duration(function)
            try:
                delay = interrupted(function, seconds)
            except KeyboardInterrupt:
                continue  # it came just after the call
            if delay is not None:
                return delay

    def duration(function):
        started = time.monotonic()
        function()
        return time.monotonic() - started

    def recover():
        FastStateMachine(path).close()

    if name == "verify":
        with FastStateMachine(path) as machine:
            took = duration(machine.verify)
            delay = served(machine.verify)
            machine.verify()
            machine._check()
    elif name == "scan":
        with FastStateMachine(path) as machine:
            def scan():
                machine._ask_for_order()
                machine._order().forget()
                machine.scan_prefix(b"", limit=1)
            took = duration(scan)
            delay = served(scan)
            assert len(machine.scan_prefix(b"", limit=3).entries) == 3
    else:
        took = duration(recover)
        delay = served(recover)
    with FastStateMachine(path) as machine:   # neither lock nor descriptor was left
        assert machine.last_applied() == (CHUNKS, 1)
        assert machine.len() == ROWS * CHUNKS
        machine._check()
    shutil.rmtree(path)
    print(f"fine: {name} of {size >> 20} MiB takes {took:.3f} s; Ctrl-C was served after {delay * 1000:.1f} ms")
"""

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")


def run(program: str, *arguments: str) -> None:
    """Run a program in another process; fail on a crash, an error or a hang."""
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program), *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_AFTER, check=False)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"it hangs: {expired.stderr!r}")
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.startswith("fine"), ended.stdout
    print(ended.stdout)


@pytest.mark.parametrize(
    "call",
    [
        "apply", "apply and sync", "small apply", "flush", "flush next to others", "hard state", "stop and start",
        "get_many", "scan", "columns", "verify", "clear", "close", "open",
    ],
)  # fmt: skip
def test_a_handler_that_raises_leaves_the_state_whole(directory: Path, call: str) -> None:
    """A call that is interrupted again and again leaves whole chunks, a sound state and no held lock."""
    run(STORM, str(directory), call)


@pytest.mark.parametrize("call", ["verify", "recovery", "scan"])
def test_ctrl_c_is_served_within_a_long_call(directory: Path, call: str) -> None:
    """Ctrl-C during a long call ends the call, and the directory can be opened immediately."""
    run(CTRL_C, str(directory), call)
