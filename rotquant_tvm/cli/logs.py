"""List tuning logs, check them, compare two, or merge several into one folder.

For example:
  tvmc logs list
  tvmc logs list ./logs
  tvmc logs check tuning_logs
  tvmc logs diff tuning_logs/nvidia-h100-80gb-hbm3 ./new/nvidia-h100-80gb-hbm3
  tvmc logs merge ./logs-a ./logs-b -o tuning_logs

A path is the log of one device or a folder of such logs. Without one, list and check take every log that tvmc compile
would look at: the user's, then those that come with the package. merge keeps the faster of two records of one task; of
two kernels that of this version, else the newer one's; logs of different devices stay apart, and two devices that one
folder would stand for are refused. It takes no log with records that no tuning can have left.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.errors import LogError, RotQuantError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from rotquant_tvm.tuning.log_store import LogRecord, TuningLog

SUMMARY = "list, check, compare or merge tuning logs"
_ACTIONS = ("list", "check", "diff", "merge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc logs``."""
    parser.add_argument("action", choices=_ACTIONS, help="what to do")
    parser.add_argument("paths", metavar="DIR", nargs="*", type=Path, help="a tuning log or a folder of them")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, help="of merge: the folder of log folders")


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Do it; ends with status 1 if a checked log has a problem."""
    if (arguments.output is not None) != (arguments.action == "merge"):
        raise UsageError("merge needs -o DIR" if arguments.action == "merge" else f"{arguments.action} takes no -o")
    if arguments.action == "merge" and not arguments.paths:
        raise UsageError("merge needs the folders to merge")
    if arguments.action == "diff" and len(arguments.paths) != 2:
        raise UsageError("diff needs two logs: the old one and the new one")
    for path in arguments.paths:
        if not path.is_dir():
            raise LogError(f"{path} is no folder; give a tuning log or a folder of them")
    {"list": _list, "check": _check, "diff": _diff, "merge": _merge}[arguments.action](arguments, output)


def _folders(paths: list[Path]) -> list[Path]:
    """The log folders at the paths, by default those that compile looks at. Raises LogError for a path without."""
    from rotquant_tvm.tuning.log_folders import log_folders, packaged_logs, user_logs

    folders = []
    for path in paths or [user_logs(), packaged_logs()]:
        found = log_folders(path)
        if not found and paths:
            raise LogError(f"{path} has no tuning log: neither manifest.json nor folders with one")
        folders += found
    return folders


def _list(arguments: argparse.Namespace, output: Output) -> None:
    from rotquant_tvm.cli.log_table import record_table
    from rotquant_tvm.tuning.log_check import is_stale
    from rotquant_tvm.tuning.log_store import read_log

    logs: list[dict[str, Any]] = []
    shown: list[Table | str] = []
    for folder in _folders(arguments.paths):
        try:
            log = read_log(folder)
        except LogError as error:
            if arguments.paths:
                raise
            output.note(f"{error}; tvmc logs check says more")  # the others serve a compile all the same
            continue
        stale = [is_stale(record, log.device["kind"]) for record in log.records]
        logs.append(_described(log, stale))
        title = f"{log.device['name']} ({log.device['arch']}), TVM {log.tvm}: {folder}"
        shown += [*([""] if shown else []), record_table(title, log.records, ["stale" if s else "" for s in stale])]
    output.result({"logs": logs}, *(shown or ["no tuning logs; tvmc tune makes one"]))


def _described(log: TuningLog, stale: list[bool]) -> dict[str, Any]:
    return {
        "folder": str(log.path),
        "device": log.device,
        "target": log.target,
        "tvm": log.tvm,
        "layout_version": log.layout_version,
        "copy_bandwidth": log.copy_bandwidth,
        "product_rate": log.product_rate,
        "records": [vars(record) | {"stale": old} for record, old in zip(log.records, stale, strict=True)],
    }


def _check(arguments: argparse.Namespace, output: Output) -> None:
    from rotquant_tvm.tuning.log_check import log_problems

    checked = {folder: log_problems(folder) for folder in _folders(arguments.paths)}
    document = {"logs": [{"folder": str(folder), "problems": problems} for folder, problems in checked.items()]}
    found = [(folder, problem) for folder, problems in checked.items() for problem in problems or ["ok"]]
    rows = [[escape(str(folder)), escape(problem)] for folder, problem in found]
    output.result(document, table("", ["log", "result"], rows, left=2) if rows else "no tuning logs to check")
    if any(checked.values()):
        raise SystemExit(RotQuantError.exit_status)


def _diff(arguments: argparse.Namespace, output: Output) -> None:
    from rotquant_tvm.cli.log_table import change_table
    from rotquant_tvm.tuning.log_diff import log_changes
    from rotquant_tvm.tuning.log_store import read_log

    folders = [_folders([path]) for path in arguments.paths]
    for path, found in zip(arguments.paths, folders, strict=True):
        if len(found) != 1:
            raise UsageError(f"{path} holds the logs of {len(found)} devices; name one of them")
    changes = list(log_changes(*(read_log(found[0]) for found in folders)))
    document = [
        {
            "change": change.kind,
            "old": change.old and vars(change.old),
            "new": change.new and vars(change.new),
            "speedup": change.speedup,
        }
        for change in changes
    ]
    different = [change for change in changes if change.kind != "same"]
    same = f"{len(changes) - len(different)} records are the same"
    shown: list[Table | str] = [change_table(different), ""] if different else []
    output.result({"changes": document}, *shown, same)


def _merge(arguments: argparse.Namespace, output: Output) -> None:
    from rotquant_tvm.tuning.log_check import read_sound_log
    from rotquant_tvm.tuning.log_diff import check_same_device
    from rotquant_tvm.tuning.log_folders import is_log
    from rotquant_tvm.tuning.log_store import write_log

    root = arguments.output.resolve()
    if is_log(root):
        raise UsageError(f"{root} is the log of one device; -o names the folder that holds such logs")
    merged: dict[str, TuningLog] = {}
    for folder in _folders(arguments.paths):
        log = read_sound_log(folder)
        old = merged.get(log.slug)
        if old is None and is_log(root / log.slug):
            old = read_sound_log(root / log.slug)
        if old is not None:
            check_same_device(old, log)
        merged[log.slug] = _joined(old or replace(log, entries=()), log)
    for slug, log in merged.items():
        write_log(root / slug, replace(log, path=root / slug))
    logs = [
        {"folder": str(root / slug), "records": len(log.entries), "stale": sum(map(_stale_on(log), log.records))}
        for slug, log in merged.items()
    ]
    output.result({"logs": logs}, *(_written(log) for log in logs))


def _joined(old: TuningLog, new: TuningLog) -> TuningLog:
    """One log of two, with the records of the kernels that there are now where either has one."""
    joined = old.merged(new.entries, _stale_on(old))
    return replace(joined, layout_version=max(old.layout_version, new.layout_version))


def _stale_on(log: TuningLog) -> Callable[[LogRecord], bool]:
    from rotquant_tvm.tuning.log_check import is_stale

    return lambda record: is_stale(record, log.device["kind"])


def _written(log: dict[str, Any]) -> str:
    stale = f", {log['stale']} of them of kernels that have changed since (tune these again)" if log["stale"] else ""
    return f"wrote {log['records']} records to {log['folder']}{stale}"
