"""The tables of the compile report: equal layers and shared kernels are one row."""

from __future__ import annotations

import pytest

from rotquant_tvm.cli.report_table import fold_line, kernel_table, report_line, report_parts, report_table

LAYER = {"k": "hurwitz3", "v": "hurwitz3", "kv_heads": 3, "head_dim": 64, "k_bits": 3.25, "v_bits": 3.25}
LAYER |= {"bytes_per_token": 156.0, "f16_bytes_per_token": 768}
TOTALS = {"layers_rewritten": 5, "bits_per_element": 3.25, "bytes_per_token": 780.0, "f16_bytes_per_token": 3840}
TOTALS |= {"compression": 4.92}


def kernel(operator: str, name: str, *functions: str) -> dict:
    return {"operator": operator, "kernel": name, "functions": list(functions), "source": f"rule: {name}_llvm"}


def report(*names: str) -> dict:
    """A report whose layer i uses the append kernel ``names[i]``."""
    look = kernel("look", "kv_look", "decode")
    appends = [kernel("append", name, "prefill", "decode") for name in names]
    layers = [LAYER | {"layer": i, "kernels": [append, look]} for i, append in enumerate(appends)]
    return TOTALS | {"layers": layers}


def rows(table) -> list[tuple[str, ...]]:
    return list(zip(*(column.cells for column in table.columns), strict=True))


def test_a_kernel_is_one_row_with_all_its_layers():
    found = rows(kernel_table(report("kv_append", "kv_append", "kv_append1", "kv_append", "kv_append1")))
    assert found == [
        ("0–1, 3", "append", "kv_append", "prefill and decode", "rule: kv_append_llvm"),
        ("0–4", "look", "kv_look", "decode", "rule: kv_look_llvm"),
        ("2, 4", "append", "kv_append1", "prefill and decode", "rule: kv_append1_llvm"),
    ]


@pytest.mark.parametrize(("names", "spans"), [(["a"], "0"), (["a"] * 2, "0–1"), (["a"] * 30, "0–29")])
def test_spans(names, spans):
    assert rows(kernel_table(report(*names)))[0][0] == spans


def test_layers_that_differ_in_kernels_alone_are_one_row_of_the_first_table():
    assert [row[0] for row in rows(report_table(report("kv_append", "kv_append1")))] == ["0–1"]


def test_layers_that_keep_a_window_are_told():
    report = TOTALS | {"layers": [LAYER | {"layer": 0, "tokens_kept": 96}, LAYER | {"layer": 1, "tokens_kept": None}]}
    report |= {"cache_bytes": {"8192": 1000, "32768": 2000}, "f16_cache_bytes": {"8192": 50_000, "32768": 200_000}}
    assert [(row[0], row[-1]) for row in rows(report_table(report))] == [("0", "96"), ("1", "all"), ("all", "")]
    line = report_line(report)
    assert "layers 0 keep only their window: a sequence takes 1,000 bytes at 8,192 tokens (50× smaller" in line
    assert "and 2,000 bytes at 32,768 tokens (100× smaller than f16)" in line
    assert "window" not in report_line(TOTALS | {"layers": [LAYER | {"layer": 0}]})


def test_a_report_without_kernels_is_shown_without_their_table():
    layers = [LAYER | {"layer": 0}]
    assert len(report_parts(TOTALS | {"layers": layers})) == 2
    assert len(report_parts(report("kv_append"))) == 3


def test_what_weights_took_over_is_one_line():
    first, other = {"k": "not folded: RoPE", "v": "W_v, W_o"}, {"k": "no rotation", "v": "W_v; not W_o: a gate"}
    layers = [LAYER | {"layer": i, "folded": folded} for i, folded in enumerate([first, other, first])]
    line = fold_line(TOTALS | {"layers": layers})
    assert line == (
        "rotations in weights: layers 0, 2: K not folded: RoPE, V W_v, W_o"
        " · layers 1: K no rotation, V W_v; not W_o: a gate"
    )
    shown = report_parts(TOTALS | {"layers": layers})
    assert line in shown
    assert fold_line(TOTALS | {"layers": [LAYER | {"layer": 0, "folded": None}]}) == ""
