"""Every operation on this CPU: its rows, its checks, and that a wrong kernel is caught."""

from __future__ import annotations

import pytest

from rotquant_tvm.benchmark import append, decode, prefill, roundtrip
from rotquant_tvm.benchmark.cache_data import CacheSpec
from rotquant_tvm.benchmark.kernels import DEFINITION, Operator, OperatorLibrary
from rotquant_tvm.benchmark.report import ERROR_BAR
from rotquant_tvm.benchmark.settings import BatchShape
from rotquant_tvm.errors import UsageError


@pytest.fixture(autouse=True)
def _short_bandwidth(monkeypatch):
    from rotquant_tvm.benchmark import host_device, host_timing

    monkeypatch.setattr(host_device.HostDevice, "BANDWIDTH_BYTES", 1 << 22)
    monkeypatch.setattr(host_timing, "REST_SECONDS", 0)


@pytest.fixture
def broken(monkeypatch):
    """Make the compiled kernels of an operator write nothing."""

    def breaks(name: str) -> None:
        built = getattr(OperatorLibrary, name)
        monkeypatch.setattr(OperatorLibrary, name, lambda *arguments: Operator(lambda *_: None, built(*arguments).rule))

    return breaks


def shapes(*texts):
    return tuple(BatchShape.parse(text) for text in texts)


@pytest.mark.slow
def test_decode_races_our_f16_and_torch_and_checks(small):
    pytest.importorskip("torch")
    report = decode.run(small("decode", kv_caches=("iso3", "rq3", "q8_0/iso2"), shapes=shapes("2x100", "1x5")))
    assert report.passed and [row.subject for row in report.rows] == ["f16", "iso3", "rq3", "q8_0/iso2"] * 2
    for row in report.rows:
        assert row.seconds > 0 and row.error < 5e-4 and row.kernel == "attention_decode_llvm"
        names = {rival.name for rival in row.rivals}
        assert names == ({"torch SDPA"} if row.subject == "f16" else {"our f16", "torch SDPA"})
    f16, iso3 = report.rows[:2]
    assert f16.nbytes > 3 * iso3.nbytes > 0
    assert next(rival for rival in iso3.rivals if rival.name == "our f16").seconds == f16.seconds


@pytest.mark.parametrize("warm", [False, True])
def test_decode_catches_a_kernel_that_does_nothing(small, broken, monkeypatch, warm):
    """Over caches of which a warm run has one of a kind."""
    broken("attention")
    made, random = [], CacheSpec.random
    monkeypatch.setattr(CacheSpec, "random", lambda spec, device: made.append(spec) or random(spec, device))
    report = decode.run(small("decode", kv_caches=("iso3",), shapes=shapes("1x40"), warm=warm))
    assert not report.passed and all(row.error > ERROR_BAR for row in report.rows)
    assert (len(made) == 2) == warm and any("again and again" in note for note in report.notes) == warm


def test_a_configuration_that_fails_to_compile_is_a_row(small, monkeypatch):
    built = OperatorLibrary.attention

    def fails(self, shape, *options):
        if shape.k == "iso3":
            raise RuntimeError("the compiler gave up")
        return built(self, shape, *options)

    monkeypatch.setattr(OperatorLibrary, "attention", fails)
    report = decode.run(small("decode", kv_caches=("iso3", "iso2"), shapes=shapes("1x40")))
    f16, iso3, iso2 = report.rows
    assert f16.passed and iso2.passed and not iso3.passed and "gave up" in iso3.note


def test_roundtrip_rows(small):
    settings = small("roundtrip", vectors=(70,), head_dims=(32,), bits=(2, 4), rotations=("iso", "planar"))
    report = roundtrip.run(settings)
    assert report.passed and len(report.rows) == 8
    assert [row.subject for row in report.rows[:4]] == ["iso2", "iso4", "planar2", "planar4"]
    assert {row.case for row in report.rows} == {"70 x 32 float16", "70 x 32 float32"}
    assert report.rows[0].nbytes == 2 * 70 * 32 * 2 and report.rows[-1].nbytes == 2 * 70 * 32 * 4
    assert all(row.error <= ERROR_BAR and row.seconds > 0 and row.kernel for row in report.rows)


@pytest.mark.parametrize("warm", [False, True])
def test_warm_vectors_are_one_buffer(small, monkeypatch, warm):
    made, vectors = [], roundtrip._vectors
    monkeypatch.setattr(roundtrip, "_vectors", lambda device, case: made.append(case) or vectors(device, case))
    sizes = {"vectors": (70,), "head_dims": (32,), "bits": (2,), "rotations": ("iso",), "dtypes": ("float32",)}
    report = roundtrip.run(small("roundtrip", **sizes, warm=warm))
    assert report.passed and (len(made) == 1) == warm
    assert any("again and again" in note for note in report.notes) == warm


def test_roundtrip_catches_a_kernel_that_does_nothing(small, broken):
    broken("roundtrip")
    report = roundtrip.run(small("roundtrip", vectors=(70,), head_dims=(32,), bits=(3,), dtypes=("float32",)))
    assert not report.passed and all(row.error > 0.5 for row in report.rows)


def test_roundtrip_refuses_what_it_cannot_do(small, tmp_path):
    with pytest.raises(UsageError, match="unknown rotation 'spiral'"):
        roundtrip.run(small("roundtrip", rotations=("spiral",)))
    with pytest.raises(UsageError, match="head_dim 40"):
        roundtrip.run(small("roundtrip", head_dims=(40,)))
    with pytest.raises(UsageError, match="CUDA kernels"):
        roundtrip.run(small("roundtrip", peers=tmp_path))


def test_head_dims_that_a_format_cannot_take_are_rows_of_their_own(small):
    settings = small("roundtrip", vectors=(9,), head_dims=(32, 40), bits=(3,), rotations=("iso",), dtypes=("float32",))
    right, refused = roundtrip.run(settings).rows
    assert right.seconds is not None and refused.seconds is None and refused.refused and "40" in refused.note


@pytest.mark.full
def test_append_rows(small):
    settings = small("append", kv_caches=("f16", "hurwitz3", "rq3"), shapes=shapes("1x1", "2x70"))
    report = append.run(settings)
    assert report.passed
    assert [(row.case.split(" ", 1)[0], row.subject) for row in report.rows] == [
        *(("1x1", name) for name in ("f16", "hurwitz3", "rq3", "rq3")),
        *(("2x70", name) for name in ("f16", "hurwitz3", "rq3")),
    ]
    kept, flushed = report.rows[2:4]
    assert kept.case.endswith("no flush") and flushed.case.endswith(") flush") and flushed.nbytes > 10 * kept.nbytes
    assert [row.error is None for row in report.rows] == [False, False, True, True, False, False, True]


@pytest.mark.parametrize("shape", ["1x1", "1x40"])
def test_append_catches_a_kernel_that_does_nothing(small, broken, shape):
    broken("append")
    (row,) = append.run(small("append", kv_caches=("hurwitz3",), shapes=shapes(shape))).rows
    assert row.error > 0.1


@pytest.mark.full
def test_prefill_rows(small):
    pytest.importorskip("torch")
    report = prefill.run(small("prefill", kv_caches=("iso3", "rq3"), shapes=shapes("2x100")))
    assert report.passed
    subjects = [f"{name}{label}" for name in ("f16", "iso3", "rq3") for label in ("", " with append")]
    assert [row.subject for row in report.rows] == subjects
    for row in report.rows:
        assert row.flops == 4 * 2 * 4 * 32 * 100 * 101 / 2 and row.bound is None
        assert (row.error is None) == row.subject.endswith("append")


@pytest.mark.full
def test_prefill_catches_a_kernel_that_does_nothing(small, broken):
    broken("attention")
    report = prefill.run(small("prefill", kv_caches=("iso3",), shapes=shapes("1x40")))
    assert not report.passed


def test_operators_are_compiled_once_and_named_by_their_rule(host, small):
    from rotquant_tvm.benchmark.cache_data import CacheSpec
    from rotquant_tvm.formats import Rotation

    operators = OperatorLibrary(host.target)
    site = CacheSpec.of("iso3", small("decode"), 1, 10).site(small("decode"), chunk=False)
    assert operators.attention(site) is operators.attention(site)
    assert operators.attention(site).rule == "attention_decode_llvm" and operators.append(site).rule == DEFINITION
    assert operators.rotate(Rotation(32, ()), "float32") is None


def test_a_tuned_kernel_is_raced_with_what_the_rule_alone_makes(small, monkeypatch):
    built = OperatorLibrary.attention

    def recorded(self, shape, wanted=None, tuned=True):
        found = built(self, shape, wanted, False)
        return Operator(found.run, found.rule, "some log" if tuned and shape.k == "iso3" else "")

    monkeypatch.setattr(OperatorLibrary, "attention", recorded)
    f16, iso3 = decode.run(small("decode", kv_caches=("iso3",), shapes=shapes("1x40"))).rows
    assert f16.kernel == "attention_decode_llvm" and iso3.kernel == "attention_decode_llvm, tuned"
    assert "untuned" in {rival.name for rival in iso3.rivals} and "untuned" not in {rival.name for rival in f16.rivals}
