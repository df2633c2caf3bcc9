"""``tvmc``: the command line. Its grammar, exit statuses and error lines.

Exit status: 0 ok; 1 a check failed; 2 usage; 3 internal or device failure; 4 a refused model or input file;
130 interrupted. With --json standard output gets one document, which has an entry "error" if the command failed; a
command that a signal ended writes none.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from rotquant_tvm import __version__
from rotquant_tvm.cli.config_file import expand_config
from rotquant_tvm.cli.former_options import check_former_options
from rotquant_tvm.cli.help_text import OVERVIEW, help_parts
from rotquant_tvm.cli.leading_options import behind_the_command
from rotquant_tvm.cli.next_steps import next_steps
from rotquant_tvm.cli.options import Parser, common_options, join_layer_lists
from rotquant_tvm.cli.output import Output
from rotquant_tvm.cli.stop_signals import TERMINATED, stop_signals
from rotquant_tvm.cli.streams import Streams, own_streams
from rotquant_tvm.cli.unknown_words import option_names, unknown_words
from rotquant_tvm.errors import RotQuantError, UsageError

COMMANDS = ("compile", "tune", "run", "eval", "bench", "formats", "inspect", "logs", "env", "completion")
INTERNAL, INTERRUPTED = 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser, commands = build_parser()
        check_former_options(argv, {name: list(command._option_string_actions) for name, command in commands.items()})
        words = behind_the_command(expand_config(argv, commands), commands)
        arguments, unknown = parser.parse_known_args(join_layer_lists(words))
        if unknown:
            raise unknown_words(arguments.command, unknown, option_names(commands[arguments.command]))
    except UsageError as error:
        output = Output(Streams(sys.stdout, sys.stderr), "--json" in argv, _verbosity(argv))
        status = _failed(error, output)
        output.finish()
        return status
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    with own_streams(show_others=arguments.verbosity > 1) as streams, stop_signals():
        return _execute(arguments, Output(streams, arguments.json, arguments.verbosity))


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the grammar of the whole command line, and that of each command."""
    parser = Parser(
        prog="tvmc",
        description="Compile decoder models with a rotation-quantized, bit-packed KV cache, tune them, and run them.",
        epilog=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"tvmc of rotquant_tvm {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    common = common_options()
    grammars: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        module = importlib.import_module(f"{__package__}.{name}")
        description, examples = help_parts(str(module.__doc__))
        command = commands.add_parser(
            name,
            parents=[common],
            help=module.SUMMARY,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(execute=module.execute)
        grammars[name] = command
    return parser, grammars


def _execute(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command and turn whatever it raises into an exit status and an error line."""
    try:
        status = _status_of(arguments, output)
        output.finish()
        return status
    except KeyboardInterrupt:
        output.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has seen enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), output.streams.out.fileno())
        return 0


def _status_of(arguments: argparse.Namespace, output: Output) -> int:
    """Run the command; its error goes to the output."""
    try:
        arguments.execute(arguments, output)
    except SystemExit as stop:
        if stop.code == TERMINATED:
            output.document = None
        return int(stop.code or 0)
    except BrokenPipeError:
        raise
    except Exception as error:
        return _failed(error, output)
    if not output.as_json:
        for line in next_steps(arguments, output.document or {}):
            output.note(f"next: {line}")
    return 0


def _failed(error: Exception, output: Output) -> int:
    """Write the error line of an exception (and at -vv its traceback) and return the exit status."""
    if output.verbosity > 1:
        traceback.print_exception(error, file=output.streams.err)
    if isinstance(error, RotQuantError):
        status, message = error.exit_status, str(error)
    else:
        status, message = INTERNAL, _internal(error, output.verbosity)
    output.failed(type(error).__name__, message, status)
    output.error(message)
    return status


def _verbosity(argv: Sequence[str]) -> int:
    """How many -v there are in words that could not be parsed."""
    return sum(word.count("v") for word in argv if word[:1] == "-" and set(word[1:]) == {"v"})


def _internal(error: Exception, verbosity: int) -> str:
    lines = str(error).strip().splitlines()
    place = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {os.path.basename(place[0].filename)}:{place[0].lineno}" if place else ""
    hint = "" if verbosity > 1 else "; run it again with -vv for the traceback"
    return f"internal failure: {type(error).__name__}{where}{': ' + lines[-1] if lines else ''}{hint}"


if __name__ == "__main__":
    sys.exit(main())
