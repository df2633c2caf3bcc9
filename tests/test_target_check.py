"""Names in a target that TVM would hand on unread."""

from __future__ import annotations

import pytest
from tvm.target import Target

from rotquant_tvm.errors import UsageError
from rotquant_tvm.target import resolve_target
from rotquant_tvm.target_check import check_target

X86, ARM = "x86_64-linux-gnu", "aarch64-linux-gnu"


@pytest.mark.parametrize(
    ("attributes", "fragment"),
    [
        ({"mcpu": "nonsense", "mtriple": X86}, f"-mcpu=nonsense; give a name .* for -mtriple={X86}, like x86-64-v3"),
        ({"mcpu": "skylak", "mtriple": X86}, "-mcpu=skylak; did you mean skylake"),
        ({"mcpu": "native"}, "unknown CPU -mcpu=native"),
        ({"mcpu": "znver4", "mtriple": ARM}, "like neoverse-n1"),
        ({"mtriple": "aarch65-linux"}, "unknown machine 'aarch65' in -mtriple=aarch65-linux; did you mean aarch64"),
        ({"mattr": ["+avx2", "+avx512vnn"], "mtriple": X86}, "-mattr=[+]avx512vnn; did you mean avx512vnni"),
        ({"mattr": ["-nonsense"]}, "unknown CPU feature -mattr=-nonsense"),
    ],
)
def test_names_that_llvm_does_not_know(attributes, fragment):
    host = {"kind": "llvm"} | attributes
    for target in (host, {"kind": "cuda", "arch": "sm_80", "host": host}):
        with pytest.raises(UsageError, match=fragment):
            check_target(Target(target))


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"mcpu": "x86-64-v3", "mtriple": X86, "mattr": ["-avx2", "+avx512vnni"]},
        {"mcpu": "neoverse-n1", "mtriple": ARM},
        {"mcpu": "generic"},
        {"mtriple": "amd64-pc-windows-msvc"},
    ],
)
def test_names_that_llvm_knows(attributes):
    check_target(Target({"kind": "llvm"} | attributes))


@pytest.mark.parametrize(("arch", "known"), [("sm_75", True), ("sm_90a", True), ("sm_120f", True), ("sm_9x", False)])
def test_architectures_of_gpus(arch, known):
    target = Target({"kind": "cuda", "arch": arch, "host": {"kind": "llvm"}})
    if known:
        check_target(target)
    else:
        with pytest.raises(UsageError, match=f"unknown GPU architecture -arch={arch}; write it like -arch=sm_90a"):
            check_target(target)


def test_targets_of_any_form_are_checked():
    text = '{"kind": "llvm", "mcpu": "nonsense"}'
    for target in ("llvm -mcpu=nonsense", text, Target(text)):
        with pytest.raises(UsageError, match="-mcpu=nonsense"):
            resolve_target(target)
