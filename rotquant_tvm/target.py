"""Compile targets: what users write as ``--target``, resolved to a full TVM target."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import tvm

from .errors import DeviceError, UsageError
from .near_words import did_you_mean, near_words
from .target_check import check_target

KINDS = ("llvm", "cuda")
_TAGS_ALIKE = 0.85
"""How much a word must be like a tag to be meant as one: they share their makers' names."""
_MOST_CHARACTERS = 1 << 16
"""Of a file with a target."""
_MOST_TAGS = 3
"""That an error suggests."""


def resolve_target(target: str | tvm.target.Target) -> tvm.target.Target:
    """Return a full target from what users write: ``"llvm"`` is this CPU, ``"cuda"`` the GPU at hand.

    Other spellings: ``"llvm -mcpu=x86-64-v3"``, a JSON object, a file with one (``gpu.json``), and TVM's tags
    (``nvidia/nvidia-h100``). Raises ``UsageError`` for another kind, a file that cannot be read, or a name in it that
    TVM or LLVM does not know (of a CPU, say),
    ``DeviceError`` for ``"cuda"`` without a GPU.
    """
    if not isinstance(target, tvm.target.Target):
        text = target.strip()
        target = _parse(_content(text) if text.lower().endswith(".json") else text)
    if target.kind.name not in KINDS:
        raise UsageError(f"target kind '{target.kind.name}' is not supported; use {' or '.join(KINDS)}")
    check_target(target)
    if target.kind.name == "cuda" and target.host is None:
        target = target.with_host(_plain_host())
    return target


def host_target() -> tvm.target.Target:
    """Return this machine's CPU, with all of its vector extensions and cores."""
    cpu = tvm.get_global_func("target.llvm_get_system_cpu", allow_missing=True)
    name = str(cpu()) if cpu is not None else "generic"
    return tvm.target.Target({"kind": "llvm", "mcpu": name, "num-cores": os.cpu_count() or 1})


def _plain_host() -> tvm.target.Target:
    """A CPU like this machine's, without its extensions.

    It only launches kernels, and the library may go to a machine with a GPU and another CPU.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tvm.target.Target({"kind": "llvm", "mcpu": "x86-64" if x86 else "generic", "num-cores": os.cpu_count() or 1})


def _content(path: str) -> str:
    """The text of a file with a target."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(_MOST_CHARACTERS).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the target in {path}: {_last_line(error)}") from error


def _parse(text: str) -> tvm.target.Target:
    if text == "llvm":
        return host_target()
    if text == "cuda":
        try:
            return _with_own_instructions(tvm.target.Target.from_device("cuda"))
        except Exception as error:
            raise DeviceError(
                "target 'cuda' means the GPU at hand and there is none here; name one, like "
                "'nvidia/nvidia-h100' or 'cuda -arch=sm_90a', or take 'llvm', this CPU"
            ) from error
    _check_name(text)
    given = _attributes(text) if " " in text and not text.startswith("{") else text
    try:
        return tvm.target.Target(given)
    except Exception as error:
        raise UsageError(f"unknown target '{text}': {_last_line(error)}") from error


def _check_name(text: str) -> None:
    """Raise ``UsageError`` unless the first word is one that TVM knows: a kind or, alone, a tag."""
    name = text.partition(" ")[0]
    tags = list(map(str, tvm.target.list_tags()))
    if text.startswith("{") or name in map(str, tvm.target.Target.list_kinds()) or text in tags:
        return
    ending = [tag for tag in tags if tag.endswith(f"-{name.lower().rpartition('/')[2]}")]
    near = near_words(name, KINDS) or ending[:_MOST_TAGS] or near_words(name, tags, _TAGS_ALIKE)
    raise UsageError(
        f"unknown target '{text}'{did_you_mean(near)}; give llvm (this CPU), cuda (this GPU), one of them with options "
        "like 'cuda -arch=sm_90a', or a tag like nvidia/nvidia-h100"
    )


def _with_own_instructions(target: tvm.target.Target) -> tvm.target.Target:
    """The GPU at hand with the instructions that only its architecture has: ``sm_90a`` of Hopper."""
    if target.attrs["arch"] != "sm_90":
        return target
    return tvm.target.Target(json.loads(str(target)) | {"arch": "sm_90a"})


def _attributes(text: str) -> dict[str, Any]:
    """Return the dictionary form of ``kind -key=value …``, which TVM itself no longer reads."""
    kind, *words = text.split()
    attributes: dict[str, Any] = {"kind": kind}
    for word in words:
        key, sign, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not sign or not value:
            raise UsageError(f"unknown target '{text}': cannot read '{word}'; write it like -mcpu=x86-64-v3")
        if key in ("keys", "mattr", "libs"):
            attributes[key] = value.split(",")
        else:
            attributes[key] = int(value) if value.isdecimal() else value
    return attributes


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
