"""A model of a configuration whose weights take no memory: what its compile needs is their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rotquant_tvm.errors import ModelError
from rotquant_tvm.frontend.hf import check_decoder
from rotquant_tvm.frontend.quiet import first_line, quiet


def shape_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Make a causal LM of ``config``; all elements of a weight are one number. Raises ModelError for no decoder."""
    check_decoder(config)
    try:
        with quiet(), _parameters_without_memory():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ModelError(f"{config.model_type!r} cannot be made from its configuration: {first_line(error)}") from error
    shared: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in shared:
                value = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                shared[id(parameter)] = torch.nn.Parameter(value, requires_grad=False)
            module._parameters[name] = shared[id(parameter)]
    return model


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made inside keep their parameters on the meta device; buffers, like rotary frequencies, are real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # else it is one that another module has, too
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
