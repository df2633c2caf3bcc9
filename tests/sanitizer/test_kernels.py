"""Every kernel under compute-sanitizer where there is a GPU; here, that the cases are launches and the reports read."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from ..ops.conftest import has_gpu
from .build_kernels import all_cases, build_all, selected
from .run_sanitizer import LAUNCHER, TOOLS, findings, run

FAMILIES = {"append", "append_plain", "decode", "prefill", "flush", "quantize", "dequantize", "rotate", "roundtrip"}
FAMILIES |= {"score", "rms_norm", "rotary", "linear", "plan_flush", "dequantize_cache", "query_features"}

MEMCHECK = """
========= COMPUTE-SANITIZER
launched rotate__a
========= Invalid __global__ read of size 4 bytes
=========     at rotate__a_b_kernel+0x330
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f is out of bounds
launched rotate__a_b
========= Error: Race reported between Write access at decode__x_kernel+0x10
=========     and Read access at decode__x_kernel+0x20 [12 hazards]
========= Program hit cudaErrorLaunchFailure (error 719) due to "unspecified launch failure" on CUDA API call
=========     Saved host backtrace up to driver entry point at error
========= ERROR SUMMARY: 3 errors
"""


def test_reports_are_counted_by_family():
    found, first = findings(MEMCHECK, {"rotate__a": "rotate", "rotate__a_b": "rotate", "decode__x": "decode"})
    assert found == {"rotate": 1, "decode": 1, "elsewhere": 1}
    assert first["rotate"].startswith("rotate__a_b: Invalid __global__ read") and "Race" in first["decode"]
    assert findings("========= ERROR SUMMARY: 0 errors\nlaunched x\n", {}) == ({}, {})


def test_there_is_a_case_of_every_family():
    cases = all_cases("cuda")
    assert {case.family for case in cases} == FAMILIES
    assert len({case.symbol for case in cases}) == len(cases)


def launch(folder, *words):
    command = [sys.executable, str(LAUNCHER), str(folder), "--poison", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TVM_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    "words",
    [("rotate__iso3_d80", "plan_flush"), pytest.param((), marks=[pytest.mark.full, pytest.mark.slow])],
    ids=["few", "all"],
)
def test_every_case_writes_all_of_its_output(tmp_path, words):
    """On the CPU: a case is a launch of one process, and its arguments are right."""
    count = build_all(tmp_path, "llvm", words)
    assert count == len(selected("llvm", words))
    done = launch(tmp_path, "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("launched ") == count >= 2


@pytest.mark.full
@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu() or shutil.which("compute-sanitizer") is None, reason="needs a GPU and its sanitizer")
@pytest.mark.parametrize("tool", TOOLS)
def test_the_sanitizer_finds_nothing(tool, tmp_path):
    assert build_all(tmp_path, "cuda", jobs=os.cpu_count() or 1) == len(all_cases("cuda"))
    assert launch(tmp_path).returncode == 0
    clean, summary = run(tool, tmp_path, shares=4)
    assert clean, summary
