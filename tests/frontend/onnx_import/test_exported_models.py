"""torch's exports, imported, against onnxruntime: the canonical form, a 16-bit cache and a quantized one."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch

import rotquant_tvm
from rotquant_tvm.errors import UsageError
from rotquant_tvm.frontend import import_model
from rotquant_tvm.frontend.onnx_import import read_onnx
from rotquant_tvm.kv_cache_config import KVCacheConfig

from ...sampling import sampled
from ..architectures import ARCHITECTURES, VOCAB
from ..fake_quantized import converse, replay
from .exported_models import OnnxSteps, export
from .step_runner import StepRunner, check_close

CASES = list(itertools.product(("llama", "gpt2", "qwen2"), (18, 20, 23), (2, 4)))
CASES += [("llama", 14, 2), ("gpt2", 14, 4)]  # the exporter before dynamo
ORDINARY = [("llama", 23, 2)]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", sampled(CASES, ORDINARY))
def test_the_canonical_form_computes_what_onnxruntime_does(case, runner):
    made = export(*case)
    run, onnx = runner(import_model(made.path)), OnnxSteps(made, case[2])
    rng = np.random.default_rng(0)
    past, theirs = run.empty_past(2), onnx.empty(2)
    for seq in (7, 1, 5):  # a prefill, a step, and a chunk behind them
        ids = rng.integers(3, VOCAB, (2, seq))
        logits, past = run.step(ids, past)
        expected, theirs = onnx(ids, theirs)
        check_close("logits", logits, expected[:, -1], 1e-4)
        for mine, present in zip(past, theirs, strict=True):
            check_close("present", mine, present, 1e-4)


@pytest.mark.parametrize("case", sampled(CASES, []))
def test_the_step_as_it_is_spelled_computes_what_onnxruntime_does(case):
    made = export(*case)
    run, onnx = StepRunner(read_onnx(made.path)), OnnxSteps(made, case[2])
    rng = np.random.default_rng(0)
    past = [rng.standard_normal((3, made.kv_heads, 6, made.head_dim)).astype(np.float32) for _ in onnx.empty(1)]
    feed = onnx.feed(rng.integers(3, VOCAB, (3, 4)), past)
    logits, *presents = onnx.session.run(None, feed)
    results = run(feed)
    for name, wanted in zip(run.graph.outputs, [logits, *presents], strict=True):
        check_close(name, results[name], wanted, 1e-4)


@pytest.mark.parametrize("case", sampled(CASES, []))
def test_a_session_with_a_16_bit_cache_computes_what_onnxruntime_does(case):
    """Two chunks and 8 decode steps over two sequences of different lengths."""
    made = export(*case)
    session = rotquant_tvm.compile(import_model(made.path), "f16").session(batch=2, capacity=64)
    onnx = OnnxSteps(made, case[2])
    rng = np.random.default_rng(1)
    pasts = [onnx.empty(1), onnx.empty(1)]
    for counts in ((9, 4), (3, 11), *[(1, 1)] * 8):
        rows = [rng.integers(3, VOCAB, count).astype(np.int32) for count in counts]
        logits = session.decode(np.concatenate(rows)) if counts == (1, 1) else session.prefill(rows)
        for row, ids in enumerate(rows):
            expected, presents = onnx(ids[None], pasts[row])
            pasts[row] = [present.astype(np.float16).astype(np.float32) for present in presents]
            check_close("logits", logits[row], expected[0, -1], 5e-3)


@pytest.mark.parametrize("case", sampled(CASES, []))
def test_a_quantized_cache_is_fake_quantization(case):
    """Logits over the codes that the session stored, which torch would have chosen as well."""
    made = export(*case)
    config = KVCacheConfig.of("hurwitz3")
    session = rotquant_tvm.compile(import_model(made.path), config).session(batch=2, capacity=128)
    turns = converse(session, config, made.head_dim, decoded=8)
    expected, _, furthest = replay(made.model, turns, config, ARCHITECTURES[case[0]].windows)
    for turn, logits in zip(turns, expected, strict=True):
        check_close("logits", turn.logits, logits, 1e-3)
    assert furthest <= 1e-4


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_without_a_cache_is_given_one(name):
    made = export(name, 23, 2, has_cache=False)
    session = rotquant_tvm.compile(import_model(made.path), "f16").session(batch=1, capacity=64)
    onnx = OnnxSteps(made, 2)
    ids = np.random.default_rng(2).integers(3, VOCAB, 14).astype(np.int32)
    results = [session.prefill([ids[:6]])[0], *(session.decode(ids[i : i + 1])[0] for i in range(6, 14))]
    expected, _ = onnx(ids[None], [])
    for result, wanted in zip(results, expected[0, 5:], strict=True):
        check_close("logits", result, wanted, 5e-3)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_keeps_its_dtype(dtype):
    made = export("llama", 23, 2, dtype)
    imported = import_model(made.path)
    wanted = str(dtype).removeprefix("torch.")
    assert {weight.dtype.name for weight in imported.weights if weight.ndim == 2} == {wanted}
    session = rotquant_tvm.compile(imported, "f16").session(batch=1, capacity=64)
    ids = np.random.default_rng(2).integers(3, VOCAB, 9).astype(np.int32)
    results = [session.prefill([ids[:6]])[0], *(session.decode(ids[i : i + 1])[0] for i in range(6, 9))]
    with torch.no_grad():
        expected = made.model(torch.from_numpy(ids[None]).long()).logits[0].float().numpy()
    for result, logits in zip(results, expected[5:], strict=True):
        check_close("logits", result, logits, 5e-2)


def test_importing_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from rotquant_tvm.frontend import import_model\n"
        "print(import_model(sys.argv[1]).config['layers'])"
    )
    command = [sys.executable, "-c", code, str(export(*ORDINARY[0]).path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[(2, 4, 32), (2, 4, 32)]", done.stderr


def test_another_dtype_than_the_files_is_refused():
    with pytest.raises(UsageError, match="is in float32 and keeps its dtype"):
        import_model(export(*ORDINARY[0]).path, dtype="float16")
