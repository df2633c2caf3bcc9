"""A compile cache of the tests' own, and a compiled model."""

from __future__ import annotations

import pytest

import rotquant_tvm

from .tiny_models import POLICY, tiny


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def compiled():
    """The small Llama, whole, with a cache that has a policy."""
    return rotquant_tvm.compile(tiny(), POLICY, capacity=128)
