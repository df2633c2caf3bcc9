"""The kernels of the KV passes: added once each, and recognized again."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from rotquant_tvm.passes.kv_kernels import KernelLibrary, kernel_of, rotation_constant, site_shape
from tvm import relax

from rotquant_tvm.formats import KVFormat, Rotation
from rotquant_tvm.ops.site_shape import SiteShape

SHAPE = SiteShape("iso3", "f16", 6, 2, 64, 0.125, None, "float32")


def library(target=None):
    builder = relax.BlockBuilder()
    return builder, KernelLibrary(builder, target)


def test_a_kernel_is_added_once():
    builder, kernels = library()
    first = kernels.append(SHAPE)
    assert kernels.append(SHAPE).same_as(first) and kernels.advance().same_as(kernels.advance())
    other = kernels.append(SiteShape("iso3", "f16", 6, 2, 64, 0.125, None, "float16"))
    assert not other.same_as(first)
    # append does not depend on heads or scale; with a window its tiles are a ring
    assert kernels.append(SiteShape("iso3", "f16", 2, 2, 64, 9.0, None, "float32")).same_as(first)
    ring = kernels.append(SiteShape("iso3", "f16", 2, 2, 64, 9.0, 5, "float32"))
    assert not ring.same_as(first)
    assert not kernels.append(SHAPE, rotated="k").same_as(first)  # new keys come rotated
    assert not kernels.attention_dense(SHAPE).same_as(
        kernels.attention_dense(SiteShape("iso3", "f16", 2, 2, 64, 0.125, None, "float32"))
    )
    names = [g.name_hint for g in builder.get().get_global_vars()]
    assert all(name.startswith("kv_") for name in names) and len(names) == 7


def test_kernels_are_marked_scheduled_and_recognized():
    builder, kernels = library()
    gvar = kernels.attention_packed(SHAPE, splits=3)
    mod = builder.get()
    func = mod[gvar]
    assert bool(func.attrs["tirx.is_scheduled"]) and str(func.attrs["rotquant.op"]) == "attention_decode"
    found = site_shape(func)
    assert (found.k, found.v, found.heads, found.kv_heads, found.splits) == ("iso3", "f16", 6, 2, 3)
    assert [codec.format.name for codec in found.codecs()] == ["iso3", "f16"]
    x = relax.Var("x", relax.TensorType([1], "float32"))
    assert kernel_of(mod, relax.call_tir(gvar, [x], x.ty))[0] == "attention_decode"
    assert kernel_of(mod, x) is None and kernel_of(mod, relax.op.add(x, x)) is None


def test_a_kernel_without_a_site_has_no_shape():
    builder, kernels = library()
    with pytest.raises(RuntimeError, match="lacks its site's shape"):
        gvar = kernels.advance()
        site_shape(builder.get()[gvar])


def test_the_current_target_is_the_default():
    with tvm.target.Target({"kind": "cuda", "arch": "sm_80"}):
        assert library()[1].axes.kind == "cuda"
        assert library(tvm.target.Target("llvm"))[1].axes.kind == "llvm"
    assert library()[1].axes.kind == "llvm"


def test_rotation_constants():
    rotation = Rotation.draw("iso", 64, 3)
    np.testing.assert_array_equal(rotation_constant(rotation).value.numpy(), rotation.data)
    unused = rotation_constant(KVFormat.parse("f16").codec(64).rotation)
    assert unused.value.numpy().shape == (1,)
