"""What torch.export and torch.onnx.export make of attention is gathered, with torch's numbers."""

import numpy as np
import onnx
import pytest
import torch
from tvm.relax.frontend.torch import from_exported_program

from rotquant_tvm.frontend.gather import near_misses
from rotquant_tvm.frontend.onnx_import import read_onnx

from .gathered_case import attentions, gathered, run_both
from .numpy_runner import run_in_numpy
from .torch_spellings import DIM, HEADS, SPELLINGS, AllSpellings, dynamic_shapes, inputs


def check(mod, compiled=False, blind=True):
    after, found = gathered(mod)
    assert [(a.heads, a.kv_heads, a.head_dim, a.softcap) for a in found] == [
        (HEADS, kv_heads, DIM, cap) for _, kv_heads, _, cap in SPELLINGS.values()
    ]
    assert [a.scale for a in found] == pytest.approx([scale for _, _, scale, _ in SPELLINGS.values()])
    assert near_misses(after) == []
    for sizes in ((3, 5), (6, 7)):
        tensors = inputs(*sizes, blind=blind)
        arrays = [tensor.numpy() for tensor in tensors]
        caps = [attention.softcap for attention in attentions(after)]
        results = run_both({"all": (mod, after, arrays)})["all"] if compiled else ([], [])
        for result in (run_in_numpy(after["main"], arrays, caps), *filter(None, results)):
            for name, expected, actual in zip(SPELLINGS, AllSpellings()(*tensors), result, strict=True):
                np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def program():
    return torch.export.export(AllSpellings(), tuple(inputs()), dynamic_shapes=dynamic_shapes())


def test_exported_program(program):
    check(from_exported_program(program.run_decompositions(), run_ep_decomposition=False))


@pytest.mark.full
def test_compiled_exported_program(program):
    check(from_exported_program(program.run_decompositions(), run_ep_decomposition=False), compiled=True)


def test_onnx(tmp_path):
    path = tmp_path / "spellings.onnx"
    exported = torch.onnx.export(
        AllSpellings().eval(),
        tuple(inputs()),
        dynamo=True,
        opset_version=18,
        dynamic_shapes=dynamic_shapes(),
        verbose=False,
    )
    onnx.save(exported.model_proto, path)
    check(read_onnx(path).mod, blind=False)  # the exporter masks with a finite number, and so does not know such rows
