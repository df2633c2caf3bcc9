"""The CPU as a benchmark's device."""

from __future__ import annotations

import numpy as np
import pytest

from rotquant_tvm.benchmark.device import open_device
from rotquant_tvm.benchmark.settings import Settings


@pytest.fixture(scope="session")
def host():
    return open_device("llvm", 1)


@pytest.fixture
def small():
    """Settings of a small attention on this CPU; options replace them."""

    def build(operation: str, **options) -> Settings:
        base = {"target": "llvm", "heads": 4, "kv_heads": 2, "head_dim": 32, "dtype": "float32", "samples": 1}
        return Settings(operation, **(base | options))

    return build


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random numbers of the test's own."""
    return np.random.default_rng(sum(request.node.name.encode()))
