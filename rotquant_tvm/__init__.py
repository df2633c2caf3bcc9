"""A compiler for the KV cache of LLMs: rotation-quantized, bit-packed keys and values in Apache TVM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "CompiledModel",
    "KVCacheConfig",
    "KVFormat",
    "RotQuantCache",
    "compile",
    "from_torch",
    "import_model",
    "load",
]

if TYPE_CHECKING:
    from .compiler import CompiledModel, compile
    from .formats import KVFormat
    from .frontend import from_torch, import_model
    from .integrations.transformers_cache import RotQuantCache
    from .kv_cache_config import KVCacheConfig
    from .runtime import load

# Imported on first use: the runtime must load without the compiler, and the command line quickly.
_HOMES = {
    "CompiledModel": "compiler",
    "compile": "compiler",
    "KVFormat": "formats",
    "KVCacheConfig": "kv_cache_config",
    "RotQuantCache": "integrations.transformers_cache",
    "from_torch": "frontend",
    "import_model": "frontend",
    "load": "runtime",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
