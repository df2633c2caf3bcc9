"""What a task writes of itself into a database."""

from __future__ import annotations

import tvm_ffi
from tvm.s_tir.meta_schedule.database import Workload


def test_the_workloads_text_has_no_blanks_and_is_read_by_tvm(task):
    number, text = task.workload_document
    theirs = Workload(task.workload).as_json()
    assert number == str(theirs[0]) and len(text) < 0.6 * len(str(theirs[1]))
    assert tvm_ffi.structural_equal(Workload.from_json([number, text]).mod, task.workload)
