import pytest, tvm
from . import test_attention_prefill_cuda as m
from .test_attention_prefill_cuda import *
requires = None
@pytest.fixture(scope="module")
def gpu(): return Kernels("llvm")
def compiled(gpu, shape, **knobs):
    k=ops.attention_prefill(*shape.codecs(), shape.heads, shape.kv_heads, shape.scale, shape.dtype, ops.Axes("llvm"), window=shape.window, policy=shape.cache_policy)
    return tvm.compile(tvm.IRModule({"kernel":k.with_attr("global_symbol","kernel")}),gpu.target)["kernel"]
m.compiled=compiled
for n in list(globals()):
    if n.startswith("test_"):
        f=globals()[n]
        if hasattr(f,"pytestmark"): f.pytestmark=[k for k in f.pytestmark if k.name not in("gpu","skipif")]
