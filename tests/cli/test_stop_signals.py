"""What a signal raises is raised again at the next step if Python dropped it."""

from __future__ import annotations

import io
import os
import signal
import threading

import pytest

from rotquant_tvm.cli.output import Output
from rotquant_tvm.cli.stop_signals import TERMINATED, raise_if_stopped, stop_signals
from rotquant_tvm.cli.streams import Streams

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


class Dropped:
    """Python ignores what its finalizer raises."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(1000):  # the handler runs between two of these
            pass


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_unwinds_the_block(number):
    before = signal.getsignal(number)
    with pytest.raises(RAISED[number]) as raised, stop_signals():
        os.kill(os.getpid(), number)
        for _ in range(1000):
            pass
        pytest.fail("it went on")
    assert signal.getsignal(number) is before
    assert number == signal.SIGINT or raised.value.code == TERMINATED
    raise_if_stopped()  # it is forgotten with the block


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", RAISED)
def test_what_a_finalizer_swallowed_comes_with_the_next_step(number):
    streams = Streams(io.StringIO(), io.StringIO())
    reached = []
    with pytest.raises(RAISED[number]), stop_signals():
        with Output(streams, True, 0).steps(None, "first") as step:
            step("second")
            Dropped(number)
            reached.append("after it")
            step("third")
            reached.append("after the step")
    assert reached == ["after it"]
    assert "second" in streams.err.getvalue() and "third" not in streams.err.getvalue()


def test_other_threads_are_left_alone():
    found = []

    def run():
        with stop_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
