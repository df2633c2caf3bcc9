"""The hash changes with the code that lays a kernel out, and with nothing else."""

from __future__ import annotations

import textwrap

from rotquant_tvm.schedules import attention_decode_llvm, rotate_llvm

from rotquant_tvm.tuning import kernel_hash as module
from rotquant_tvm.tuning.kernel_hash import code_text, kernel_hash

SOURCE = '''
"""A rule."""

KNOBS = {"a": (1,
               2)}
"""What a may be."""
PROMISING = ({"a": 2},)
LIMIT: int = 3


class Rule:
    """Says something."""

    def apply(self, x):
        # why
        text = """not a docstring"""
        return x + 1  # an increment
'''


def test_comments_docstrings_and_the_values_of_knobs_do_not_count():
    bare = """
        LIMIT: int = 3
        class Rule:
            def apply(self, x):
                text = \"\"\"not a docstring\"\"\"
                return x + 1
    """
    assert code_text(SOURCE) == textwrap.dedent(bare).strip()


def test_code_counts():
    for old, new in (("x + 1", "x + 2"), ("LIMIT: int = 3", "LIMIT: int = 4"), ("not a docstring", "other text")):
        assert code_text(SOURCE.replace(old, new)) != code_text(SOURCE)


def test_rules_have_hashes_of_their_own():
    one, other = (kernel_hash(rule) for rule in (attention_decode_llvm.attention_decode_llvm, rotate_llvm.rotate_llvm))
    assert one != other and len(one) == module.DIGITS and int(one, 16) >= 0


def test_what_a_rule_imports_counts(monkeypatch):
    """A change in the core of attention makes decode attention stale, and not the rotation."""
    name = "rotquant_tvm.schedules.attention_core_llvm"
    decode, rotate = attention_decode_llvm.attention_decode_llvm, rotate_llvm.rotate_llvm
    before = kernel_hash(decode), kernel_hash(rotate)
    read = module._source
    monkeypatch.setattr(module, "_source", lambda n: read(n) + ("\nEXTRA = 1\n" if n == name else ""))
    module._module_hash.cache_clear()
    try:
        after = kernel_hash(decode), kernel_hash(rotate)
    finally:
        module._module_hash.cache_clear()
    assert before[0] != after[0]
    assert ("attention_core_llvm" in str(module._with_imports(rotate.__module__))) or before[1] == after[1]


def test_only_schedules_count():
    found = module._with_imports("rotquant_tvm.schedules.attention_decode_llvm")
    assert "rotquant_tvm.schedules.attention_core_llvm" in found
    assert all(name.startswith("rotquant_tvm.schedules.") for name in found)


def test_rules_do_not_count_for_each_other():
    """The lists of rules import all of them; a change in append must not make attention stale."""
    for name, other in (("attention_decode_cuda", "append_cuda"), ("rms_norm_cuda", "linear_cuda")):
        found = module._with_imports(f"rotquant_tvm.schedules.{name}")
        assert f"rotquant_tvm.schedules.{other}" not in found
        assert not {f"rotquant_tvm.schedules.{registry}" for registry in module._REGISTRIES} & found
