"""``fastsm.testing``: what any implementation of ``fastsm.StateMachine`` must do, as a pytest class.

Two steps put a state machine of your own to the test. Install the extra: ``pip install "fastsm[test]"``. Then
write one class with one fixture, in a file that pytest finds::

    import pytest
    from fastsm.testing import StateMachineConformance

    class TestMine(StateMachineConformance):
        @pytest.fixture
        def state_machine(self):
            return MyStateMachine()

For one that stores, a second fixture, ``reopen``, adds the tests of what must survive; for one that runs procedures, a
third one, ``with_procedures``, adds theirs.

``check_procedure`` finds a procedure that would come to something else on another replica.
"""

try:
    import pytest
except ModuleNotFoundError as _error:
    if _error.name != "pytest":
        raise
    raise ImportError('fastsm.testing needs pytest: pip install "fastsm[test]"') from _error

# So that a failure shows values next to its message.
_RULES = ("answers", "calls", "commands", "conformance", "deadlines", "order", "snapshots", "storage", "waiting")
pytest.register_assert_rewrite(*(f"fastsm.testing.{name}" for name in _RULES))

from fastsm.testing.conformance import StateMachineConformance  # noqa: E402  # not before that
from fastsm.testing.procedures import check_procedure  # noqa: E402

__all__ = ["StateMachineConformance", "check_procedure"]
