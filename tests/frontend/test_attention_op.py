"""The torch operators against torch's own."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotquant_tvm.frontend.attention_op import causal_attention, select_token


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    seq=st.integers(1, 6),
    past=st.integers(0, 9),
    window=st.none() | st.integers(1, 8),
)
def test_attention_is_torchs_with_the_mask_written_out(batch, kv_heads, group, seq, past, window):
    torch.manual_seed(seq)
    q = torch.randn(batch, kv_heads * group, seq, 16)
    k, v = torch.randn(2, batch, kv_heads, past + seq, 16)
    visible = torch.ones(seq, past + seq, dtype=torch.bool).tril(past)
    if window is not None:
        visible = visible.triu(past - window + 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, visible, scale=0.3, enable_gqa=True)
    actual = causal_attention(q, k, v, 0.3, window)
    torch.testing.assert_close(actual, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)


def test_soft_capped_scores():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 16)
    scores = 1.5 * torch.tanh(q @ k.transpose(2, 3) * 0.8 / 1.5)
    scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1) @ v
    torch.testing.assert_close(causal_attention(q, k, v, 0.8, None, 1.5), expected.transpose(1, 2))
    assert not torch.allclose(causal_attention(q, k, v, 0.8, None), expected.transpose(1, 2), atol=1e-2)


def test_operators_agree_with_their_shape_functions():
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 5, 16)
    torch.library.opcheck(causal_attention, (q, k, k.clone(), 0.25, None, 30.0))
    torch.library.opcheck(select_token, (torch.randn(2, 5, 8), torch.tensor([4, 0], dtype=torch.int32)))


def test_select_token_takes_one_token_of_each_row():
    hidden = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    chosen = select_token(hidden, torch.tensor([2, 0], dtype=torch.int32))
    assert torch.equal(chosen, torch.stack([hidden[0, 2], hidden[1, 0]]))
