"""Variables set for a block: put back, and one thread's at a time."""

from __future__ import annotations

import os
import threading

import pytest

from rotquant_tvm.environment_variables import environment_variable

NAME = "ROTQUANT_TVM_TEST_VARIABLE"


@pytest.mark.parametrize("before", [None, "old"])
def test_a_variable_is_put_back(monkeypatch, before):
    monkeypatch.delenv(NAME, raising=False) if before is None else monkeypatch.setenv(NAME, before)
    with pytest.raises(RuntimeError), environment_variable(NAME, "new"):
        with environment_variable(NAME, "newer"):  # the same thread may nest them
            assert os.environ[NAME] == "newer"
        assert os.environ[NAME] == "new"
        raise RuntimeError
    assert os.environ.get(NAME) == before


def test_threads_take_turns(monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    seen, entered, leave = [], threading.Event(), threading.Event()

    def other():
        with environment_variable(NAME, "2"):
            seen.append(os.environ[NAME])

    with environment_variable(NAME, "1"):
        thread = threading.Thread(target=lambda: (entered.set(), other()))
        thread.start()
        assert entered.wait(10)
        leave.wait(0.1)
        assert not seen and os.environ[NAME] == "1"
    thread.join(10)
    assert seen == ["2"] and NAME not in os.environ
