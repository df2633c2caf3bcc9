"""A program that the user exported with torch, to a step in Relax."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import tvm
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm import relax

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.folded_numbers import with_folded_numbers
from rotquant_tvm.frontend.imported_model import ImportedModel, TokenizerData
from rotquant_tvm.frontend.normalize import normalize_step
from rotquant_tvm.frontend.repeated_heads import without_repeated_heads
from rotquant_tvm.frontend.step_graph import StepGraph
from rotquant_tvm.frontend.torch_importer import decomposed_if_needed, to_relax
from rotquant_tvm.frontend.torch_program_converters import PROGRAM_CONVERTERS, WHOLE
from rotquant_tvm.frontend.torch_program_sizes import settle_sizes
from rotquant_tvm.frontend.torch_program_state import opened
from rotquant_tvm.frontend.torch_program_tidy import tidied

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def program_step(program: ExportedProgram, source: str) -> StepGraph:
    """Convert an exported decoder step; ``source`` names it in messages.

    The program may take past keys and values and return the grown ones, write them into buffers or inputs of fixed
    length, or have no cache. Attention is kept whole, with its mask, scale and grouped heads as torch defines them.
    The program is left as it was. Raises ModelError for what cannot be converted.
    """
    _check_dtypes(program, source)
    with torch.no_grad():
        program = tidied(program, source)
        inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
        program = decomposed_if_needed(program, PROGRAM_CONVERTERS, WHOLE, source)
    step = opened(program, inputs, source)
    settle_sizes(step.program)
    mod = with_folded_numbers(to_relax(step.program, PROGRAM_CONVERTERS, source))
    mod = without_repeated_heads(mod)
    function, names = _without_unread_weights(mod["main"], len(step.inputs))
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    weight_names = [targets[name] for name in names]
    return StepGraph(
        mod=tvm.IRModule({"main": function}),
        inputs=step.inputs,
        outputs=step.outputs,
        weights=[as_numpy(program.state_dict[name]) for name in weight_names],
        weight_names=weight_names,
        source=source,
    )


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values, its own memory where possible."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is not torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _check_dtypes(program: ExportedProgram, source: str) -> None:
    """Refuse quantized weights and dtypes that no kernel of ours has."""
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.PARAMETER:
            continue
        tensor = program.state_dict[spec.target]
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in _DTYPES:
            kind = type(tensor).__name__ if type(tensor).__name__ not in ("Tensor", "Parameter") else tensor.dtype
            raise ModelError(
                f"{source!r} has the weight {spec.target!r} in {kind}; export it in float32, float16 or bfloat16 "
                "and without quantization"
            )


def _without_unread_weights(function: relax.Function, inputs: int) -> tuple[relax.Function, list[str]]:
    """Drop the weights that nothing reads; return the function and the names of the others' parameters."""
    used = set(relax.analysis.free_vars(function.body))
    params = [param for i, param in enumerate(function.params) if i < inputs or param in used]
    function = relax.Function(params, function.body, function.ret_ty, function.is_pure, span=function.span)
    function = function.with_attr("global_symbol", "main").with_attr("num_input", inputs)
    return function, [param.name for param in params[inputs:]]


def import_program(
    program: ExportedProgram, source: str, *, tokenizer: TokenizerData | None = None, every_logit: bool = False
) -> ImportedModel:
    """Import an exported decoder step; ``source`` names it in messages, ``every_logit`` as of ``import_model``.

    Raises ModelError if the program cannot be converted or is not the step of a causal decoder.
    """
    return normalize_step(program_step(program, source), tokenizer=tokenizer, every_logit=every_logit)


def import_saved_program(path: Path, every_logit: bool = False) -> ImportedModel:
    """Import a .pt2 file with the tokenizer that lies beside it, running nothing that is in either.

    Raises ModelError as of ``load_program`` and ``import_program``.
    """
    from rotquant_tvm.frontend.tokenizer_files import folder_tokenizer
    from rotquant_tvm.frontend.torch_program_archive import load_program

    tokenizer = folder_tokenizer(path.parent)
    return import_program(load_program(path), path.name, tokenizer=tokenizer, every_logit=every_logit)
