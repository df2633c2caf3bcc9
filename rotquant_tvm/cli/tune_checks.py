"""What of ``tvmc tune`` can be refused before a model is imported, which may take minutes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rotquant_tvm.cli.files import check_folder
from rotquant_tvm.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from tvm.target import Target

    from rotquant_tvm.tuning.remote_measuring import RemoteDevice


def check_words(arguments: argparse.Namespace) -> None:
    """Check the options that need neither TVM nor the device. Raises UsageError and FormatError."""
    from rotquant_tvm.formats import KVFormat
    from rotquant_tvm.tuning.log_folders import user_logs
    from rotquant_tvm.tuning.task_selection import TaskSelection

    if (arguments.rpc_tracker is None) != (arguments.rpc_key is None):
        raise UsageError("--rpc-tracker and --rpc-key belong together; give both")
    for name in arguments.vectors:
        KVFormat.parse(name)
    if arguments.tasks != "list":
        TaskSelection.parse(arguments.tasks)
        check_folder(arguments.output or user_logs(), "-o")


def check_operators(arguments: argparse.Namespace, target: Target) -> None:
    """Raise UsageError for a task that is called like an operator of no rule for the target."""
    from rotquant_tvm.tuning.task_selection import TaskSelection
    from rotquant_tvm.tuning.task_sources import operators_of

    if arguments.tasks != "list":
        TaskSelection.parse(arguments.tasks).check_names(operators_of(target))


def device_to_measure_on(arguments: argparse.Namespace, target: Target) -> RemoteDevice | None:
    """The device behind --rpc-tracker; None for the one at hand.

    Raises UsageError for a tracker that cannot be read and, unless tasks are only listed, DeviceError if the device is
    not there.
    """
    from rotquant_tvm.tuning.remote_measuring import RemoteDevice

    remote = None
    if arguments.rpc_tracker is not None:
        remote = RemoteDevice.parse(arguments.rpc_tracker, arguments.rpc_key, target.kind.name)
    if arguments.tasks == "list":
        return remote
    if remote is not None:
        remote.check()
    elif target.kind.name == "cuda":
        import tvm

        if not tvm.cuda(0).exist:
            raise DeviceError("there is no CUDA device to measure on; --tasks list and --rpc-tracker work without one")
    return remote
