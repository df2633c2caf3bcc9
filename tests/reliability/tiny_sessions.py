"""A tiny decoder with real kernels, and what a process holds."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path

import rotquant_tvm
from rotquant_tvm.frontend import ImportedModel
from rotquant_tvm.runtime import CompiledLibrary

POLICY = "hurwitz3,sinks=3,recent=2,center=32"


@cache
def tiny():
    """The tiny decoder of the tests of the passes."""
    path = Path(__file__).parents[1] / "passes" / "tiny_model.py"
    spec = importlib.util.spec_from_file_location("tiny_model_of_reliability", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def model(kv_cache: str, target: str = "llvm", head_dim: int = 32) -> rotquant_tvm.CompiledModel:
    decoder = tiny().TinyModel(head_dim=head_dim)
    config = {"model_type": "tiny", "vocab_size": tiny().VOCAB, "max_position": 1 << 20}
    config["layers"] = [(decoder.kv_heads, decoder.heads, decoder.head_dim)] * decoder.layers
    names = [f"w{i}" for i in range(len(decoder.weights))]
    imported = ImportedModel(decoder.module(), decoder.weights, names, config)
    return rotquant_tvm.compile(imported, kv_cache, target, capacity=128)


@cache
def library(kv_cache: str = POLICY) -> CompiledLibrary:
    return model(kv_cache).library()


def resources() -> tuple[float, int, int]:
    """Resident memory in MiB, open files, threads."""
    gc.collect()
    memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
