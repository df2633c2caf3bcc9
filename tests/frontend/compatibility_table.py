"""Writes docs/models.md: every architecture by every way in, imported, compiled and compared with torch.

    python -m tests.frontend.compatibility_table --state build/models.json [--only llama gpt2] [--write]

Results are kept in the state file, so that the run can be ended and gone on with. ``--write`` writes the table of all
that the state has.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tvm

import rotquant_tvm
from rotquant_tvm.errors import RotQuantError
from rotquant_tvm.frontend import ImportedModel, from_torch, import_model
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .architectures import ARCHITECTURES, REFUSED, VOCAB, Architecture
from .fake_quantized import converse, replay
from .onnx_import.exported_models import export

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
FORMATS = ("hurwitz3", "0=f16")
OPSET = 20
INTRODUCTION = f"""\
# Models

What `python -m tests.frontend.compatibility_table` found: tiny random models of two layers, imported each way,
compiled for a CPU with layer 0 in `f16` and layer 1 in `hurwitz3`, and run as a conversation of two sequences of
different lengths (a prefill in two chunks, 40 decode steps). A cell is the largest difference of any logit from
torch's, where torch reads the codes that the cache stored, relative to the largest logit; float32 sums in another
order differ by 1e-6.

*transformers*: the model object, as from a directory or a .gguf file. *torch.export*: a program with past keys and
values in and out that the user exported. *ONNX*: the same, written by `torch.onnx.export(dynamo=True)` at opset
{OPSET}. Mixtures of experts are exported with `set_experts_implementation("batched_mm")`, models with a cap with eager
attention. *windows* are the layers' sliding windows, *cap* is the soft-capping of attention.

"""


def _attention(architecture: Architecture) -> str:
    """The implementation to export: torch's own operator knows no soft-capping."""
    return "eager" if architecture.softcap else "sdpa"


def _transformers(name: str) -> ImportedModel:
    return from_torch(ARCHITECTURES[name].model())


class _Step(torch.nn.Module):
    """A step with pasts in and presents out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids, past):
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(past)
        output = self.model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return output.logits, tuple((layer.keys, layer.values) for layer in cache.layers)


def _program(name: str) -> ImportedModel:
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    model.set_attn_implementation(_attention(architecture))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    batch, seq, length = (torch.export.Dim(word) for word in ("batch", "seq", "past"))
    ids = torch.randint(3, VOCAB, (2, 3))
    shape = (2, architecture.kv_heads, 5, architecture.head_dim)
    past = tuple((torch.randn(shape), torch.randn(shape)) for _ in range(2))
    inputs = (ids, torch.ones((2, 8), dtype=torch.int64), torch.arange(5, 8)[None].repeat(2, 1), past)
    sizes = ({0: batch, 1: seq}, {0: batch, 1: torch.export.Dim.AUTO}, {0: batch, 1: seq})
    with torch.no_grad():
        program = torch.export.export(
            _Step(model), inputs, dynamic_shapes=(*sizes, (({0: batch, 2: length},) * 2,) * 2), strict=False
        )
    return from_torch(program)


def _onnx(name: str) -> ImportedModel:
    return import_model(export(name, OPSET, 2, attention=_attention(ARCHITECTURES[name])).path)


WAYS: dict[str, Callable[[str], ImportedModel]] = {
    "transformers": _transformers,
    "torch.export": _program,
    "ONNX": _onnx,
}


def result(name: str, way: str) -> str:
    """Import, compile, converse and compare; a number, or why there is none."""
    architecture = ARCHITECTURES[name]
    try:
        imported = WAYS[way](name)
    except RotQuantError as error:
        return f"refused: {error}"
    except Exception as error:  # of torch's exporters
        return f"not exported: {type(error).__name__}"
    config = KVCacheConfig.parse(*FORMATS)
    if isinstance(imported.mod["main"].params[0].ty.shape[0], tvm.tirx.IntImm):
        return "for one batch alone"
    session = rotquant_tvm.compile(imported, config).session(2, 128)
    turns = converse(session, config, architecture.head_dim)
    expected, _, furthest = replay(architecture.model(), turns, config, architecture.windows)
    size = max(np.abs(logits).max() for logits in expected)
    error = max(np.abs(turn.logits - logits).max() for turn, logits in zip(turns, expected, strict=True))
    return f"{error / size:.0e}" + (f" (codes {furthest:.0e} off)" if furthest > 1e-5 else "")


def table(state: dict[str, dict[str, str]]) -> str:
    """The document."""
    head = ["architecture", "windows", "cap", *WAYS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    notes: list[str] = []
    for name, architecture in ARCHITECTURES.items():
        found = state.get(name, {})
        windows = ", ".join(str(window or "–") for window in architecture.windows)
        cells = []
        for way in WAYS:
            text = found.get(way, "not run")
            if ":" in text:
                notes.append(f"{name} by {way}: {text}")
                text = f"{text.partition(':')[0]} [{len(notes)}]"
            cells.append(text)
        shown = windows if any(architecture.windows) else "–"
        lines.append(f"| {name} | {shown} | {architecture.softcap or '–'} | {' | '.join(cells)} |")
    refused = [f"- {name}: {pattern.replace(chr(92), '')}" for name, (_, pattern) in REFUSED.items()]
    parts = [INTRODUCTION + "\n".join(lines), "\n".join(f"[{i}] {note}  " for i, note in enumerate(notes, 1))]
    parts += ["Refused by name:\n\n" + "\n".join(refused)]
    return "\n\n".join(part for part in parts if part) + "\n"


def main() -> None:
    """Run what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--ways", nargs="*", default=list(WAYS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    state = json.loads(arguments.state.read_text()) if arguments.state.exists() else {}
    for name in arguments.only:
        for way in arguments.ways:
            if way in state.get(name, {}):
                continue
            since = time.perf_counter()
            found = result(name, way)
            print(f"{name} {way}: {found} ({time.perf_counter() - since:.0f} s)", flush=True)
            # Read again: several runs may share a state.
            state = json.loads(arguments.state.read_text()) if arguments.state.exists() else {}
            state.setdefault(name, {})[way] = found
            partial = arguments.state.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(state, indent=1))
            partial.replace(arguments.state)
    if arguments.write:
        DOCUMENT.write_text(table(state))


if __name__ == "__main__":
    main()
