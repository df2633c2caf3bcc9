"""RotQuantCache under every architecture of the frontend's tests: DynamicCache's numbers, or a refusal by name."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from rotquant_tvm import RotQuantCache
from rotquant_tvm.errors import ModelError

from ..frontend.architectures import ARCHITECTURES, REFUSED
from .tiny_models import logits_of, tokens

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore:the model's attention is")]

IDS = tokens(1, 2, 70)
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
SPLITS = (40, 55)
ALIBI = ("bloom", "mpt", "falcon-alibi")
"""Their forward takes no positions: they follow from the mask."""
SLOW = ("falcon", "falcon-new", *ALIBI)
"""Their attention is not one that transformers lets be chosen: they get keys and values dequantized."""
UNSUPPORTED = {"gpt_oss": r"'s_aux' \(attention sinks\)", "deepseek_v2": "one shape", "deepseek_v3": "one shape"}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *REFUSED])
@pytest.mark.parametrize("implementation", [RotQuantCache.attention, "eager"])
def test_architecture(name, implementation):
    architecture = ARCHITECTURES[name] if name in ARCHITECTURES else REFUSED[name][0]
    model = architecture.model()
    cache = RotQuantCache("f16", model.config)
    positions = None if name in ALIBI else POSITIONS
    if name in UNSUPPORTED and (implementation != "eager" or name.startswith("deepseek")):
        with pytest.raises(ModelError, match=UNSUPPORTED[name]):
            logits_of(model, implementation, cache, IDS, SPLITS, MASK, positions)
        return
    found = logits_of(model, implementation, cache, IDS, SPLITS, MASK, positions)
    dynamic = DynamicCache(config=model.config)
    expected = logits_of(architecture.model(), "eager", dynamic, IDS, SPLITS, MASK, positions)
    real = MASK.bool()
    assert (found - expected)[real].abs().max() < 2e-3 * expected[real].abs().max()
    packed = implementation != "eager" and name not in SLOW
    assert all(layer["packed_attention"] == packed for layer in cache.report()["layers"])
