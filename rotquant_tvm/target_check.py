"""The names in a target that TVM hands on unread: of machines, CPUs, their features, and GPU architectures.

LLVM warns of a CPU or feature that it does not know and compiles for a plain one, and ends the process for a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tvm.target import Target
from tvm.target.codegen import llvm_get_cpu_archlist, llvm_get_cpu_features, llvm_get_targets, llvm_is_valid_cpu

from .errors import UsageError
from .near_words import did_you_mean, near_words

_ANY_CPU = "generic"
"""A CPU that every machine has, for LLVM."""
_EXAMPLES = ("x86-64-v3", "neoverse-n1")
_CUDA_ARCH = re.compile(r"sm_\d{2,3}[af]?")


def check_target(target: Target) -> None:
    """Raise ``UsageError`` for a name in a target of the kind llvm or cuda, or in its host, that means nothing."""
    if target.kind.name == "cuda" and not _CUDA_ARCH.fullmatch(str(target.attrs.get("arch", ""))):
        raise UsageError(f"unknown GPU architecture -arch={target.attrs.get('arch', '')}; write it like -arch=sm_90a")
    for part in (target, target.host):
        if part is not None and part.kind.name == "llvm":
            _check_cpu(part)


def _check_cpu(target: Target) -> None:
    triple, cpu = (str(target.attrs.get(name, "")) for name in ("mtriple", "mcpu"))
    if not llvm_is_valid_cpu(_ANY_CPU, triple):
        machine, *_ = triple.split("-")
        near = _near(machine, llvm_get_targets())
        raise UsageError(f"unknown machine '{machine}' in -mtriple={triple}{near}; write it like x86_64-linux-gnu")
    if cpu and not llvm_is_valid_cpu(cpu, triple):
        known = list(map(str, llvm_get_cpu_archlist(_of_machine(triple))))
        example = next((name for name in _EXAMPLES if name in known), known[-1])
        raise UsageError(
            f"unknown CPU -mcpu={cpu}{_near(cpu, known)}; give a name that LLVM has for "
            f"{f'-mtriple={triple}' if triple else 'this machine'}, like {example} (llvm alone is this CPU)"
        )
    for word in map(str, target.attrs.get("mattr", ())):
        feature = word.lstrip("+-")
        if feature not in _features(_of_machine(triple, f"+{feature}")):
            near = _near(feature, _all_features(triple))
            raise UsageError(f"unknown CPU feature -mattr={word}{near}; write it like +avx2 or -avx512f")


def _of_machine(triple: str, *features: str, cpu: str = "") -> Target:
    given = {"mtriple": triple, "mcpu": cpu, "mattr": list(features)}
    return Target({"kind": "llvm"} | {name: value for name, value in given.items() if value})


def _features(target: Target) -> set[str]:
    return set(map(str, llvm_get_cpu_features(target)))


def _all_features(triple: str) -> set[str]:
    """The features that any of a machine's CPUs has."""
    cpus = map(str, llvm_get_cpu_archlist(_of_machine(triple)))
    return set().union(*(_features(_of_machine(triple, cpu=cpu)) for cpu in cpus))


def _near(word: str, known: Iterable[object]) -> str:
    return did_you_mean(near_words(word, map(str, known)))
