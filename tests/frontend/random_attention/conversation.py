"""A drawn decoder imported from its source, compiled, fed call by call, and compared with NumPy after each."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch

import rotquant_tvm
from rotquant_tvm.frontend import ImportedModel, from_torch, import_model
from rotquant_tvm.kv_cache_config import KVCacheConfig

from .drawn_decoder import VOCAB, Drawn
from .numpy_decoder import NumpyDecoder
from .onnx_decoder import onnx_decoder
from .stored_rows import LayerArrays, layer_arrays
from .torch_decoder import torch_decoder, transformers_decoder

ROUNDING = 2e-5
"""Of the largest logit: float32 sums in another order over the same stored keys and values."""
BYTES = 2e-4
"""The same of a decode step: where the CPU multiplies bytes, queries and weights have 15 bits and a sign."""


def imported(drawn: Drawn) -> ImportedModel:
    """The decoder by way of its source."""
    if drawn.source == "transformers":
        return from_torch(transformers_decoder(drawn))
    if drawn.source.startswith("onnx"):
        with TemporaryDirectory() as folder:
            path = Path(folder) / "drawn.onnx"
            if drawn.source == "onnx-exported":
                _export(drawn, path)
            else:
                onnx.save(onnx_decoder(drawn), path)
            return import_model(path)
    module = torch_decoder(drawn)
    inputs, sizes = module.example()
    if drawn.source == "torch":  # torch finds out by itself which sizes vary, or is told
        return from_torch(module, example_inputs=inputs, dynamic_shapes=sizes if drawn.biased else None)
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)
    if not drawn.packed:
        return from_torch(program)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "drawn.pt2"
        torch.export.save(program, path)
        return import_model(path)


def _export(drawn: Drawn, path: Path) -> None:
    """What torch's exporter writes, at opset 20."""
    module = torch_decoder(drawn)
    inputs, sizes = module.example()
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            names = ["input_ids", "position_ids", *(["attention_mask"] if inputs[2] is not None else [])]
            torch.onnx.export(
                module, inputs, dynamo=True, opset_version=20, dynamic_shapes=sizes, input_names=names, verbose=False
            ).save(path)
    finally:
        logging.disable(before)


class Conversation:
    """A session beside the sequences' exact keys and values."""

    def __init__(self, drawn: Drawn) -> None:
        self.drawn, self.config = drawn, KVCacheConfig.parse(drawn.formats, drawn.layer_formats)
        model = imported(drawn)
        heads = (drawn.kv_heads, drawn.heads, drawn.head_dim)
        assert [tuple(layer) for layer in model.config["layers"]] == [heads] * len(drawn.layers)
        # A cache in buffers holds one sequence.
        self.batch = 1 if drawn.cache == "buffers" else drawn.batch
        compiled = rotquant_tvm.compile(model, self.config, capacity=drawn.longest)
        self.session = compiled.session(batch=self.batch)
        self.decoder = NumpyDecoder(drawn)

    def run(self) -> float:
        """All calls, from the start; returns the largest difference of a logit, relative to its call's largest."""
        self.session.reset()
        self.rng = np.random.default_rng(self.drawn.seed + 1)
        empty = np.zeros((self.drawn.kv_heads, 0, self.drawn.head_dim))
        self.exact = [[[empty, empty] for _ in self.drawn.layers] for _ in range(self.batch)]
        worst = 0.0
        for counts in self.drawn.calls:
            counts = counts[: self.batch]
            if any(counts):
                worst = max(worst, self.call(counts))
        return worst

    def call(self, counts: tuple[int, ...]) -> float:
        """One call, its logits and what it stored."""
        session, starts = self.session, self.session.lengths
        ids = [self.rng.integers(3, VOCAB, count).astype(np.int32) for count in counts]
        before = self._arrays()
        decode = max(counts) == 1
        if decode:
            logits = session.decode([row[0] if len(row) else 3 for row in ids], np.array(counts, bool))
        else:
            logits = session.prefill(ids)
        after = self._arrays()
        assert session.lengths.tolist() == (starts + counts).tolist()
        # With a policy a step of some sequences alone is a chunk of one token each.
        alone = session.cache.policy.segmented and not all(counts)
        worst = 0.0
        for row in np.flatnonzero(counts):
            chunk = not decode or alone
            wanted = self._reference(row, ids[row], int(starts[row]), before if chunk else after, chunk)
            worst = max(worst, np.abs(logits[row] - wanted).max() / np.abs(wanted).max())
            self._check_stored(row, before, after)
        allowed = BYTES if decode and not alone else ROUNDING
        assert worst <= allowed, f"logits differ by {worst:.1e} of the largest after {starts} + {counts} tokens"
        return worst

    def _arrays(self) -> list[LayerArrays]:
        return layer_arrays(self.session, self.config, self.drawn.head_dim)

    def _reference(self, row: int, ids: np.ndarray, start: int, held: list[LayerArrays], chunk: bool) -> np.ndarray:
        def past(index: int, new: list[np.ndarray]) -> list[np.ndarray]:
            exact = self.exact[row][index]
            self.exact[row][index] = [np.concatenate(pair, 1) for pair in zip(exact, new, strict=True)]
            window = self.drawn.layers[index].window
            oldest = max(0, start + 1 - window) if window else 0
            if not chunk:
                return held[index].read(row, oldest, start + 1)
            return [np.concatenate(pair, 1) for pair in zip(held[index].read(row, oldest, start), new, strict=True)]

        return self.decoder.logits(ids, start, past)

    def _check_stored(self, row: int, before: list[LayerArrays], after: list[LayerArrays]) -> None:
        """Every token that a window still sees is where it must be, in the codes that it must have."""
        length = int(after[0].lengths[row])
        for layer, old, new, exact in zip(self.drawn.layers, before, after, self.exact[row], strict=True):
            new.check(row, old, exact, max(0, length - layer.window) if layer.window else 0)
