"""Print the script that completes tvmc's commands and options in a shell.

For example:
  tvmc completion bash > ~/.local/share/bash-completion/completions/tvmc
  tvmc completion zsh > ~/.zfunc/_tvmc      (with fpath+=~/.zfunc before compinit in ~/.zshrc)
"""

from __future__ import annotations

import argparse

from rotquant_tvm.cli.output import Output
from rotquant_tvm.errors import UsageError

SUMMARY = "print a shell's completion script"
SHELLS = ("bash", "zsh", "tcsh")
_FILES, _FOLDERS = ("FILE", "MODEL", "SVG"), ("DIR", "ARTIFACT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc completion``."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Print the script; raises UsageError without the package shtab."""
    script = completion_script(arguments.shell)
    output.text(script + "\n")
    if output.as_json:
        output.result({"shell": arguments.shell, "script": script})


def completion_script(shell: str) -> str:
    """Return the script that completes tvmc's words in ``shell``."""
    from rotquant_tvm.cli.main import build_parser

    try:
        import shtab
    except ImportError as error:
        raise UsageError("completion scripts need the package shtab: pip install shtab") from error
    parser, commands = build_parser()
    for command in commands.values():
        for action in command._actions:
            metavar = str(action.metavar or "").rstrip("…, ")
            if metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif metavar in _FOLDERS:
                action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell=shell))
