"""``fastsm.testing``: what any implementation of ``fastsm.StateMachine`` must do, as a pytest class.

To test a state machine of your own, install the extra: ``pip install "fastsm[test]"``. Then write one class with one
fixture, in a file that pytest finds::

    import pytest
    from fastsm.testing import StateMachineConformance

    class TestMine(StateMachineConformance):
        @pytest.fixture
        def state_machine(self):
            return MyStateMachine()

If it stores data, a second fixture, ``reopen``, adds the tests of durability; if it runs procedures, a third one,
``with_procedures``, adds theirs.

``check_procedure`` finds a procedure that would have another outcome on another replica.

``RaftLogConformance`` does the same for the log of a Raft node, with a fixture ``raft_log``: an empty log.
"""

try:
    import pytest
except ModuleNotFoundError as _error:
    if _error.name != "pytest":
        raise
    raise ImportError('fastsm.testing needs pytest: pip install "fastsm[test]"') from _error

# So that a failure shows values next to its message.
_RULES = (
    "answers", "calls", "commands", "conformance", "deadlines", "order", "raft_log", "snapshots", "storage", "waiting",
    "watching",
)  # fmt: skip
pytest.register_assert_rewrite(*(f"fastsm.testing.{name}" for name in _RULES))

from fastsm.testing.conformance import StateMachineConformance  # noqa: E402  # not before that
from fastsm.testing.procedures import check_procedure  # noqa: E402
from fastsm.testing.raft_log import RaftLogConformance  # noqa: E402

__all__ = ["RaftLogConformance", "StateMachineConformance", "check_procedure"]
