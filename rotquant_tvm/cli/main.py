"""``tvmc``: the command line. Its grammar, exit statuses and error lines.

Exit status: 0 ok; 1 a check failed; 2 usage; 3 internal or device failure; 4 a refused model or input file;
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rotquant_tvm import __version__
from rotquant_tvm.cli.options import Parser, common_options
from rotquant_tvm.cli.output import Output
from rotquant_tvm.cli.streams import own_streams
from rotquant_tvm.errors import RotQuantError

COMMANDS = ("compile", "run", "formats", "inspect")
INTERNAL, INTERRUPTED, TERMINATED = 3, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verbosity = sum(word.count("v") for word in argv if word in ("-v", "-vv", "-vvv"))
    with own_streams(show_others=verbosity > 1) as streams, _terminable():
        output = Output(streams, "--json" in argv, verbosity)
        try:
            arguments = build_parser(streams.out).parse_args(argv)
            output = Output(streams, arguments.json, arguments.verbosity)
            status = importlib.import_module(f"{__package__}.{arguments.command}").execute(arguments, output)
            streams.out.flush()
            return int(status)
        except SystemExit as stop:  # --help and --version; a termination by signal
            return int(stop.code or 0)
        except KeyboardInterrupt:
            output.error("interrupted")
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), streams.out.fileno())
            return 0
        except Exception as error:
            return _failed(error, output)


def build_parser(out: Any = None) -> argparse.ArgumentParser:
    """Return the grammar of the whole command line; help is printed to ``out``."""
    parser = Parser(
        prog="tvmc",
        description="Compile decoder models with a rotation-quantized, bit-packed KV cache, and run them.",
        allow_abbrev=False,
    )
    version = f"tvmc of rotquant_tvm {__version__}"
    parser.add_argument("--version", action=_print_action(out, version), help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = common_options()
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        command = commands.add_parser(
            name,
            parents=[common],
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
    for each in (parser, *commands.choices.values()):
        each.print_help = lambda file=None, each=each: (file or out or sys.stdout).write(each.format_help())
    return parser


def _print_action(out: Any, text: str) -> type[argparse.Action]:
    class PrintAndExit(argparse.Action):
        def __init__(self, option_strings: Sequence[str], dest: str, **keywords: Any) -> None:
            super().__init__(option_strings, dest, nargs=0, **keywords)

        def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
            (out or sys.stdout).write(text + "\n")
            parser.exit()

    return PrintAndExit


def _failed(error: Exception, output: Output) -> int:
    """Write the error line of an exception (and at -vv its traceback) and return the exit status."""
    if output.verbosity > 1:
        traceback.print_exception(error, file=output.streams.err)
    if isinstance(error, RotQuantError):
        status, message = error.exit_status, str(error)
    else:
        status, message = INTERNAL, _internal(error, output.verbosity)
    document = {"error": {"kind": type(error).__name__, "message": message, "exit_status": status}}
    if output.as_json:
        output.result(document)
    output.error(message)
    return status


def _internal(error: Exception, verbosity: int) -> str:
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {os.path.basename(place[0].filename)}:{place[0].lineno}" if place else ""
    hint = "" if verbosity > 1 else "; run it again with -vv for the traceback"
    return f"internal failure: {type(error).__name__}{where}{': ' + lines[-1] if lines else ''}{hint}"


@contextmanager
def _terminable() -> Iterator[None]:
    """Let a termination signal unwind the command, so that it clears away what it had begun to write."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: signals go elsewhere
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
