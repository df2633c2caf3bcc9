"""TVM's tensor intrinsics come without a search through all modules."""

from __future__ import annotations

import inspect
import sys

import pytest

from rotquant_tvm.tuning.tensor_intrinsics import frames_without_modules, load_tensor_intrinsics


def test_the_intrinsics_are_there():
    from tvm.s_tir import TensorIntrin

    load_tensor_intrinsics()
    load_tensor_intrinsics()
    assert "tvm.s_tir.tensor_intrin" in sys.modules and TensorIntrin.get("mma_sync_m16n8k8_f16f16f16", True) is not None


def test_frames_have_no_module_for_a_while():
    frame = inspect.currentframe()
    original = inspect.getmodule
    with pytest.raises(KeyError), frames_without_modules():
        assert inspect.getmodule(frame) is None and inspect.getmodule(pytest.raises) is not None
        assert inspect.stack()[0].function == "test_frames_have_no_module_for_a_while"
        raise KeyError
    assert inspect.getmodule is original
