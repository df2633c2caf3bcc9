"""Which layer a cache configuration hurts: the error of every layer's attention output on one window of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rotquant_tvm.evaluation.attention_error import attention_error
from rotquant_tvm.evaluation.libraries import Candidate
from rotquant_tvm.evaluation.result_store import ResultStore

if TYPE_CHECKING:
    from rotquant_tvm.evaluation.attention_error import AttentionInput

DEFINITION = (
    "Queries, keys and values of the unquantized model on one window; per layer the relative L2 error of the attention "
    "output, ‖O − Ô‖ / ‖O‖, when only that layer's keys and values are quantized, each token reading the cache as it "
    "stands when it is decoded."
)


def layer_errors(
    model: Path,
    ids: np.ndarray,
    digest: str,
    candidates: Sequence[Candidate],
    store: ResultStore,
    identity: dict[str, Any],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the errors {both, k, v} of every candidate and layer on the window ``ids`` int [tokens], as plain data.

    ``digest``: of the window. What is in the store is not computed; needs torch for the rest, and raises ModelError
    without it.
    """
    sites: list[AttentionInput] = []
    rows = []
    for candidate in candidates:
        key = identity | candidate.key() | {"quantity": "attention_error", "window": digest}
        errors = store.get(key)
        if errors is None:
            if not sites:
                progress("capture queries, keys and values")
                sites = _capture(model, ids)
            progress(f"{candidate.label}: error of every layer")
            errors = [_error(candidate, index, sites) for index in range(len(sites))]
            store.put(key, errors)
        rows.append({"label": candidate.label, "layers": errors})
    return {"definition": DEFINITION, "tokens": len(ids), "rows": rows}


def _capture(model: Path, ids: np.ndarray) -> list[AttentionInput]:
    from rotquant_tvm.frontend import require_torch

    require_torch()
    from rotquant_tvm.evaluation.captured_attention import capture_attention

    return capture_attention(model, ids)


def _error(candidate: Candidate, layer: int, sites: Sequence[AttentionInput]) -> dict[str, float]:
    site, count = sites[layer], len(sites)
    codecs = candidate.config.codecs(layer, count, site.k.shape[-1])
    return asdict(attention_error(site, codecs, candidate.config.layer_policy(layer, count)))
