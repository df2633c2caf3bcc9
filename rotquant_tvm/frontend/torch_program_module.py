"""The export of a user's own torch module, and what to do when torch refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree

from rotquant_tvm.errors import ModelError, RotQuantError, UsageError
from rotquant_tvm.frontend.quiet import first_line, quiet

_REMEDIES = {
    "data-dependent": "it branches on the values of a tensor, or takes a size from them: keep positions in tensors, "
    "without .item(), int() or if",
    "Constraints violated": "sizes that must be equal need the same Dim, and each dynamic size an example of 2 or more",
    "0/1 specialization": "use examples of 2 or more in every dynamic size",
}


def export_module(
    module: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    dynamic_shapes: Any = None,
) -> ExportedProgram:
    """Export one step of ``module`` in eval mode and without gradients, and leave it as it was.

    ``example_inputs``: what its ``forward`` takes, positional arguments or keyword arguments by name, with 2 or more
    in every size that is to vary. ``dynamic_shapes`` as of ``torch.export.export``; None lets torch find out which
    sizes vary. Raises UsageError for example inputs that are neither, ModelError if torch cannot export it.
    """
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        args, kwargs = tuple(example_inputs), {}
    else:
        raise UsageError("example_inputs must be a tuple of what forward() takes, or a dict of it by name")
    name = type(module).__name__
    shapes = _all_dynamic(kwargs or args, name) if dynamic_shapes is None else dynamic_shapes
    try:
        with quiet(), torch.no_grad(), _evaluating(module), _replaced_tensors(module) as replaced:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes, strict=False)
    except RotQuantError:
        raise
    except Exception as error:
        raise ModelError(f"{name!r} cannot be exported: {_reason(error)}") from error
    if replaced:
        raise ModelError(
            f"{name!r} puts a new tensor in place of {sorted(replaced)[0]!r} in its forward, which an export forgets; "
            "write a registered buffer of fixed length in place, or take the past as an argument and return the present"
        )
    return program


def _all_dynamic(inputs: Any, name: str) -> Any:
    """Let every size of every tensor vary unless the module fixes it."""
    for leaf in _pytree.tree_leaves(inputs):
        if isinstance(leaf, (int, float)) and not isinstance(leaf, bool):
            raise ModelError(
                f"{name!r} takes the number {leaf!r}, which an export makes a constant; give positions and lengths as "
                "int64 tensors"
            )
    return _pytree.tree_map(
        lambda leaf: dict.fromkeys(range(leaf.ndim), Dim.AUTO) if isinstance(leaf, torch.Tensor) else None, inputs
    )


def _reason(error: Exception) -> str:
    text = str(error)
    for sign, remedy in _REMEDIES.items():
        if sign in text:
            return f"{remedy} ({first_line(error)[:200]})"
    return first_line(error)


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Put a module and its parts in eval mode for a while."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _replaced_tensors(module: torch.nn.Module) -> Iterator[set[str]]:
    """Collect the names of attributes that a run of ``module`` sets to other tensors; torch drops them in silence."""
    before: dict[str, int] = {}
    replaced: set[str] = set()

    def note(*_: Any) -> None:
        before.update((name, id(tensor)) for name, tensor in _attributes(module))

    def compare(*_: Any) -> None:
        replaced.update(name for name, tensor in _attributes(module) if before.get(name) != id(tensor))

    handles = [module.register_forward_pre_hook(note), module.register_forward_hook(compare)]
    try:
        yield replaced
    finally:
        for handle in handles:
            handle.remove()


def _attributes(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that a module and its parts hold as a buffer, as an attribute or in a container of tensors."""
    for prefix, part in module.named_modules():
        held = {**part._buffers, **{k: v for k, v in vars(part).items() if not k.startswith("_")}}
        for path, tensor in _pytree.tree_leaves_with_path(held):
            if isinstance(tensor, torch.Tensor):
                yield ".".join([*([prefix] if prefix else []), *(str(_key(key)) for key in path)]), tensor


def _key(key: Any) -> Any:
    return getattr(key, "key", getattr(key, "idx", key))
