"""The handlers by themselves, with real signals; real processes are in tests/integration/test_signals.py."""

import os
import signal
from types import SimpleNamespace

import pytest

from ldm.errors import TEMPORARY, LdmError
from ldm.training import signals
from ldm.training.signals import REPEAT_S, StopOnSignal, handling, leave_now


@pytest.fixture
def clock(monkeypatch):
    """The time that the handlers see, and an end of the process that the test survives."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock.now)

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(signals.os, "_exit", leave)
    return clock


@pytest.fixture
def stop():
    module = SimpleNamespace(stop_due=False)
    stop = StopOnSignal(module, only_process=True)
    yield stop
    stop.restore()


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_before_training_there_is_nothing_to_save(stop, number, code):
    with pytest.raises(LdmError, match="nothing to save") as left:
        send(number)
    assert left.value.exit_code == code
    with handling(leave_now), pytest.raises(LdmError, match="nothing to save"):
        send(number)


def test_in_training_it_is_a_flag(stop, clock):
    stop.on_train_start(None, None)
    for _ in range(100):
        send(signal.SIGUSR1)
        clock.now += 1
    assert stop.received == signal.SIGUSR1 and stop._module.stop_due


def test_only_a_second_request_leaves_at_once(stop, clock, capfd):
    """A group and its leader get the same signal twice, which is one request."""
    stop.on_train_start(None, None)
    send(signal.SIGTERM)
    clock.now = 0.9 * REPEAT_S
    send(signal.SIGTERM)
    clock.now = 2 * REPEAT_S
    with pytest.raises(SystemExit) as left:
        send(signal.SIGINT)
    assert left.value.code == TEMPORARY and "without saving" in capfd.readouterr().err


def test_of_several_processes_none_leaves_alone(clock):
    stop = StopOnSignal(SimpleNamespace(stop_due=False), only_process=False)
    stop.on_train_start(None, None)
    for clock.now in (0, 10, 20):
        send(signal.SIGTERM)
    stop.restore()
    assert stop.received == signal.SIGTERM


def test_what_was_before_comes_back():
    before = [signal.getsignal(number) for number in signals.STOPS]
    with handling(leave_now):
        StopOnSignal(SimpleNamespace(stop_due=False), only_process=True).restore()
        assert signal.getsignal(signal.SIGTERM) is leave_now
    assert before == [signal.getsignal(number) for number in signals.STOPS]
