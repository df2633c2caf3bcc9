"""A transformers causal LM as one step with explicit past and present, and its export to a torch graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.frontend.attention_interface import NAME, AttentionCall, Trace, recording
from rotquant_tvm.frontend.attention_op import select_token
from rotquant_tvm.frontend.growing_cache import GrowingCache
from rotquant_tvm.frontend.quiet import first_line, quiet
from rotquant_tvm.frontend.sdpa_calls import sdpa_calls


class DecoderStep(torch.nn.Module):
    """One step of ``model``: new tokens and the past in, logits and presents out.

    After a run ``trace.calls`` lists the attentions of the model in their order. ``every_logit``: predict from
    every token instead of from one of each row.
    """

    def __init__(self, model: PreTrainedModel, every_logit: bool = False) -> None:
        super().__init__()
        self.model = model
        self.every_logit = every_logit
        self.trace = Trace(model.config.model_type)  # filled in place: export restores attributes

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, past: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Run ids and positions int32 [batch, seq], last int32 [batch], past {"k_0", "v_0", "k_1", …}.

        Returns (logits float32 [batch, vocab], present_k_0, present_v_0, …); with ``every_logit`` the logits are
        [batch, seq, vocab] and ``last`` is not read.
        """
        tensors = list(past.values())
        cache = GrowingCache(list(zip(tensors[::2], tensors[1::2], strict=True)), self.trace.model_type)
        chosen = nullcontext() if self.every_logit else _logits_only_at(self.model, last)
        with recording(self.trace, cache), chosen:
            output = self.model(
                input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True
            )
        presents = cache.presents()
        logits = output.logits if self.every_logit else output.logits[:, 0]
        return (logits.float(), *presents)


@contextmanager
def _logits_only_at(model: PreTrainedModel, last: torch.Tensor) -> Iterator[None]:
    """Reduce the input of the output embedding to the token ``last`` of each row."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output embedding; give a causal language model")

    def select(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (select_token(inputs[0], last).unsqueeze(1), *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def rotquant_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give ``model`` our attention, in eval mode and without gradients; restore it afterwards.

    A model that does not take its attention from transformers' interface but calls torch's is served, too.
    Experts, if it has any, are computed by gathering each token's weights: the one form of transformers whose
    graph does not depend on where the tokens go.
    """
    attention, experts, training = (
        model.config._attn_implementation,
        getattr(model.config, "_experts_implementation", None),
        model.training,
    )
    with quiet():
        model.set_attn_implementation(NAME)
        if experts is not None:
            model.set_experts_implementation("batched_mm")
    outside = model.config._attn_implementation != NAME and model._supports_sdpa
    model.eval()  # type: ignore[no-untyped-call]
    try:
        with torch.no_grad(), sdpa_calls(model) if outside else nullcontext():
            yield
    finally:
        model.train(training)
        with quiet():
            model.set_attn_implementation(attention or "eager")
            if experts is not None:
                model.set_experts_implementation(experts)


def probe_attention(model: PreTrainedModel) -> list[AttentionCall]:
    """Run ``model`` on two tokens, without computing, and list its attentions, one per cache layer.

    Raises ModelError for a mask other than causal or causal with a window, for anything else that the
    canonical form cannot hold, and for a model without attention. The model must be inside
    :func:`rotquant_attention`.
    """
    model_type = model.config.model_type
    step = DecoderStep(model)
    try:
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True):
            ids = torch.zeros((1, 2), dtype=torch.int32, device=model.device)
            logits, *presents = step(ids, torch.zeros_like(ids), ids[:, 0], {})
    except RotQuantError:
        raise
    except Exception as error:
        raise ModelError(f"{model_type!r} does not run as a causal decoder: {first_line(error)}") from error
    step.trace.check_masks()
    calls = step.trace.calls_by_layer()
    if not calls:
        raise ModelError(
            f"{model_type!r} has no attention, or computes it outside of transformers' attention interface; "
            "it is not supported"
        )
    if [call.layer for call in calls] != list(range(len(presents) // 2)):
        raise ModelError(f"{model_type!r} has cache layers that no attention reads; it is not supported")
    if logits.shape != (1, model.config.get_text_config().vocab_size):
        raise ModelError(f"{model_type!r} returns logits of shape {tuple(logits.shape)} for one token")
    return calls


def export_step(
    model: PreTrainedModel, calls: list[AttentionCall], every_logit: bool = False
) -> ExportedProgram:
    """Export one step of ``model`` with dynamic batch, seq and past.

    ``every_logit`` as of :class:`DecoderStep`. Raises ModelError if torch cannot.
    """
    batch, seq, past = Dim("batch"), Dim("seq"), Dim("past")
    b, s, p = 2, 3, 5
    device = model.device
    ids = torch.zeros((b, s), dtype=torch.int32, device=device)
    positions = torch.zeros_like(ids)  # its own tensor: export merges inputs that are one object
    last = torch.zeros(b, dtype=torch.int32, device=device)
    pasts: dict[str, torch.Tensor] = {}
    for index, call in enumerate(calls):
        shape = (b, call.kv_heads, p, call.head_dim)
        pasts[f"k_{index}"] = torch.zeros(shape, dtype=model.dtype, device=device)
        pasts[f"v_{index}"] = torch.zeros(shape, dtype=model.dtype, device=device)
    shapes: dict[str, Any] = {
        "ids": {0: batch, 1: seq},
        "positions": {0: batch, 1: seq},
        "last": {0: batch},
        "past": {name: {0: batch, 2: past} for name in pasts},
    }
    step = DecoderStep(model, every_logit)
    inputs = (ids, positions, last, pasts)
    try:
        with quiet():
            program = torch.export.export(step, inputs, dynamic_shapes=shapes, strict=False)
    except RotQuantError:
        raise
    except Exception as error:
        raise ModelError(f"{model.config.model_type!r} cannot be exported: {first_line(error)}") from error
    if step.trace.calls_by_layer() != calls:
        raise ModelError(f"{model.config.model_type!r} changes its attention with the length of the past")
    return program
