"""Run a compiled artifact: generate text from a prompt, or one prefill over given token ids.

For example:
  tvmc run model.rq --prompt "Once upon a time" --max-tokens 100
  tvmc run model.rq --chat --prompt "What is a rotation?" --temperature 0.7 --seed 1
  tvmc run model.rq --inputs ids.npz --outputs logits.npz --print-time --repeat 10

--inputs holds ids [batch, seq] and new_lengths [batch] (how many ids of each row are real); what is missing
is filled in. --outputs receives logits [batch, vocab] and lengths [batch], or with --prompt the token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rotquant_tvm.cli.files import check_file
from rotquant_tvm.cli.options import integer, number, tokens
from rotquant_tvm.cli.output import Output
from rotquant_tvm.errors import ArtifactError, KVCacheFull, UsageError

if TYPE_CHECKING:
    from rotquant_tvm.runtime import CompiledLibrary

SUMMARY = "run a compiled artifact: generate text, or prefill given ids"
_PROMPT_DEFAULTS = {"max_tokens": 128, "temperature": 0.0, "top_p": 1.0, "seed": 0, "stop": [], "chat": False}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tvmc run``."""
    parser.add_argument("artifact", metavar="ARTIFACT", help="a folder written by tvmc compile")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: what it was compiled for)")
    parser.add_argument(
        "--kv-capacity", metavar="N", type=tokens(1), help="tokens per sequence (default: the artifact's)"
    )
    _add_prompt_options(parser.add_argument_group("generation"))
    tensors = parser.add_argument_group("tensors")
    tensors.add_argument("-i", "--inputs", metavar="X.npz", type=Path, help="ids and new_lengths of one prefill")
    tensors.add_argument("-o", "--outputs", metavar="Y.npz", type=Path, help="where to write what came out")
    tensors.add_argument(
        "--fill-mode",
        choices=("random", "zeros", "ones"),
        help="token ids where none are given (default: random)",
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument("--print-time", action="store_true", help="show how long the runs took")
    timing.add_argument("--profile", action="store_true", help="show how long each kernel took, in a run of its own")
    timing.add_argument("--repeat", metavar="N", type=integer(1), default=1, help="measurements (default: 1)")
    timing.add_argument("--number", metavar="N", type=integer(1), default=1, help="runs per measurement (default: 1)")


def _add_prompt_options(group: argparse._ArgumentGroup) -> None:
    # Defaults are filled in later: an option that only makes sense with --prompt must be seen without it.
    group.add_argument("--prompt", metavar="TEXT", help="text to go on from")
    group.add_argument("--chat", action="store_true", default=None, help="put TEXT to the chat template")
    group.add_argument("--max-tokens", metavar="N", type=integer(1), help="most new tokens (default: 128)")
    group.add_argument("--temperature", metavar="T", type=number(0), help="0 takes the likeliest token (default: 0)")
    group.add_argument("--top-p", metavar="P", type=number(0, 1, above=True), help="sample from this much (default: 1)")
    group.add_argument("--seed", metavar="N", type=integer(0), help="of the sampling (default: 0)")
    group.add_argument("--stop", metavar="TEXT", action="append", help="end before this text (may be repeated)")


def execute(arguments: argparse.Namespace, output: Output) -> None:
    """Run; every cheap check comes before TVM is loaded."""
    _check_options(arguments)
    if arguments.outputs is not None:
        check_file(arguments.outputs, "--outputs")
    artifact = Path(arguments.artifact)
    if not arguments.artifact or not (artifact.is_dir() or artifact.is_file()):
        raise ArtifactError(f"{arguments.artifact or 'the name'} is no artifact; pass a folder written by tvmc compile")
    from rotquant_tvm.cli import run_prompt, run_tensors
    from rotquant_tvm.cli.tensor_files import read_inputs

    arrays = {} if arguments.inputs is None else read_inputs(arguments.inputs)
    library = _load(arguments, output)
    try:
        if arguments.prompt is None:
            run_tensors.run(arguments, arrays, library, output)
        else:
            run_prompt.run(arguments, library, output)
    except KVCacheFull as error:
        raise UsageError(_too_long(error)) from error


def _too_long(error: KVCacheFull) -> str:
    if error.max_position is not None:
        return f"this run needs {error.needed} tokens and the model's positions end at {error.max_position}; shorten it"
    return (
        f"the cache holds {error.capacity} tokens per sequence and this run needs {error.needed}; "
        f"pass --kv-capacity {error.needed} or shorten it"
    )


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.prompt is None:
        for name in _PROMPT_DEFAULTS:
            if getattr(arguments, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')} goes with --prompt, and there is none")
        arguments.fill_mode = arguments.fill_mode or "random"
        return
    for name in ("inputs", "fill_mode"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--prompt and --{name.replace('_', '-')} exclude each other; drop one")
    if arguments.stop is not None and "" in arguments.stop:
        raise UsageError("--stop: the text is empty")
    try:
        "".join([arguments.prompt, *(arguments.stop or [])]).encode()
    except UnicodeEncodeError as error:
        raise UsageError("--prompt and --stop must be valid UTF-8") from error
    for name, default in _PROMPT_DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)


def _load(arguments: argparse.Namespace, output: Output) -> CompiledLibrary:
    with output.steps(2, "load TVM") as step:
        step("load TVM")
        from rotquant_tvm.cli.report_table import report_line
        from rotquant_tvm.runtime import load_library

        step("check and load the artifact")
        library = load_library(arguments.artifact, arguments.device)
    output.detail(f"on {library.device}, {library.default_capacity} tokens per sequence by default")
    if library.report:
        output.note(report_line(library.report))
    return library
