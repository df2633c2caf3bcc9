"""Random decoders from every source and in every spelling compute what NumPy computes over the cache they keep."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, Phase, example, given, note, settings
from hypothesis import strategies as st

from .conversation import Conversation
from .drawn_decoder import drawn_decoder
from .numpy_decoder import NumpyDecoder

# An example takes seconds, too long to shrink.
CHOSEN = settings(deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit])
MANY = settings(
    CHOSEN,
    max_examples=int(os.environ.get("ROTQUANT_DRAWN_DECODERS", "200")),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)


def check(seed: int) -> None:
    drawn = drawn_decoder(seed)
    note(repr(drawn))
    Conversation(drawn).run()


@pytest.mark.slow
@given(st.integers())
@example(1031)  # products and a softmax in ONNX, soft-capping and a window, sinks, a ring and centres
@CHOSEN
def test_a_drawn_decoder_computes_what_numpy_computes(seed):
    check(seed)


@pytest.mark.full
@given(st.integers(0, 2**32))
@example(939)  # a torch module of one's own, its past [batch, length, heads, head_dim], a window
@MANY
def test_many_drawn_decoders_compute_what_numpy_computes(seed):
    check(seed)


@pytest.mark.full
def test_the_comparison_notices_small_changes():
    """A reference with a token less in the window, 1 % more scale, another cap, or the heads in another order."""
    drawn = drawn_decoder(1031)
    (layer,) = drawn.layers
    conversation = Conversation(drawn)
    conversation.run()
    changed = [
        replace(layer, window=layer.window - 1),
        replace(layer, scale=1.01 * layer.scale),
        replace(layer, softcap=1.05 * layer.softcap),
    ]
    references = [NumpyDecoder(replace(drawn, layers=(other,))) for other in changed]
    references.append(NumpyDecoder(drawn))
    weights = references[-1].weights
    weights["0.q"] = weights["0.q"].reshape(-1, drawn.heads, drawn.head_dim)[:, ::-1].reshape(weights["0.q"].shape)
    for reference in references:
        conversation.decoder = reference
        with pytest.raises(AssertionError, match="logits differ"):
            conversation.run()
