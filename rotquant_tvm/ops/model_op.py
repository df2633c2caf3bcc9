"""How kernels of a model's own work (linear layers, norms, loops over tensors) say what they do.

KV operators say it by ``OP_ATTR``; these have an attribute of their own, since they work on no cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tvm import tirx

MODEL_OP_ATTR = "rotquant.model_op"
"""Function attribute: the operator's name."""
PROPERTIES_ATTR = "rotquant.model"
"""Function attribute: what the kernel is specialized on, a JSON object."""


def model_attrs(operator: str, properties: Mapping[str, Any]) -> dict[str, str]:
    """The attributes of a kernel of ``operator``."""
    return {MODEL_OP_ATTR: operator, PROPERTIES_ATTR: json.dumps(dict(properties), sort_keys=True)}


def model_op(func: tirx.PrimFunc) -> str | None:
    """The operator that a function carries; None if it is none of the model's."""
    name = func.attrs.get(MODEL_OP_ATTR) if func.attrs is not None else None
    return None if name is None else str(name)


def model_properties(func: tirx.PrimFunc) -> dict[str, Any]:
    """What such a function is specialized on."""
    return dict(json.loads(str(func.attrs[PROPERTIES_ATTR])))
