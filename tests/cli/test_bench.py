"""``tvmc bench``: its grammar, its checks before the work, and what it prints."""

from __future__ import annotations

import pytest

SMALL = ("--target", "llvm", "--heads", 2, "--kv-heads", 1, "--head-dim", 32, "--samples", 1)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    from rotquant_tvm.benchmark import host_device, host_timing

    monkeypatch.setattr(host_device.HostDevice, "BANDWIDTH_BYTES", 1 << 22)
    monkeypatch.setattr(host_timing, "REST_SECONDS", 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("decode", "--kv-cache", "iso7"), "unknown KV format 'iso7'"),
        (("decode", "--head-dim", 40), "cannot take head_dim 40"),
        (("decode", "--heads", 8, "--kv-heads", 3), "no multiple of --kv-heads 3"),
        (("decode", "--shapes", "8by32"), "like 8x32K"),
        (("decode", "--bits", "3"), "--bits is not for decode; it is for roundtrip"),
        (("roundtrip", "--kv-cache", "iso3"), "--kv-cache is not for roundtrip"),
        (("e2e", "--heads", 4), "--heads is not for e2e"),
        (("roundtrip", "--vectors", "many"), "write them like 8192,1M"),
        (("roundtrip", "--peers", "/nowhere/at/all"), "there is no such folder"),
        (("roundtrip", "--dtypes", "int8"), "unknown 'int8'"),
        (("roundtrip", "--target", "llvm", "--rotations", "spiral"), "unknown rotation 'spiral'"),
        (("decode", "--plot", "picture.txt"), "must end in"),
        (("decode", "--plot", "/nowhere/at/all/picture.png"), "cannot write"),
        (("sing",), "invalid choice: 'sing'"),
    ],
)
def test_usage_errors(tvmc, arguments, message):
    ended = tvmc("bench", *arguments)
    assert ended.status == 2 and message in ended.error, ended.err


def test_no_gpu_is_a_device_error(tvmc):
    import tvm

    if tvm.cuda(0).exist:
        pytest.skip("there is one")
    assert tvmc("bench", "decode").status == 3


def test_decode_prints_one_table_and_writes_the_picture(tvmc, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "roofline.svg"
    ended = tvmc("bench", "decode", *SMALL, "--kv-cache", "iso3", "--shapes", "2x40,1x64", "--plot", picture)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert "GB/s" in lines[0] and "wall clock" in lines[0]
    header = next(line for line in lines if line.startswith("case"))
    assert all(column in header for column in ("µs", "floor µs", "of floor", "× our f16 (µs)", "error"))
    assert sum(line.startswith(("2x40", "1x64")) for line in lines) == 4
    assert any(line.startswith("iso3 against our f16: geometric mean") for line in lines)
    assert picture.read_text().startswith("<?xml") and f"wrote {picture}" in ended.out


def test_json_is_the_whole_report(tvmc):
    ended = tvmc("bench", "append", *SMALL, "--kv-cache", "iso3", "--shapes", "1x1", "--json")
    assert ended.status == 0, ended.err
    document = ended.document
    assert document["operation"] == "append" and document["passed"] and document["copy_bandwidth"] > 0
    (row,) = document["rows"]
    assert row["subject"] == "iso3" and row["error"] <= 1e-3 and row["microseconds"] > 0


def test_a_failed_check_is_status_1_and_still_prints(tvmc, monkeypatch):
    from rotquant_tvm.benchmark import roundtrip

    monkeypatch.setattr(roundtrip, "roundtrip_error", lambda *_: 0.5)
    arguments = ("--vectors", 8, "--head-dims", 32, "--bits", 3, "--rotations", "iso", "--dtypes", "float32")
    ended = tvmc("bench", "roundtrip", "--target", "llvm", "--samples", 1, *arguments, "--json")
    assert ended.status == 1 and not ended.document["passed"]


def test_help_needs_neither_tvm_nor_torch(tvmc_process):
    ended = tvmc_process("bench", "--help")
    assert ended.status == 0 and "--peers DIR" in ended.out and "roundtrip" in ended.out
