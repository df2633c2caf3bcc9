"""Options that the tvmc of TVM 0.19 and earlier had and this one has not: each is answered with what replaces it.

Options that mean the same are simply there, under their old names. The answers are given before the command line is
parsed, so that an old command ends with a sentence about itself and not with a list of words that are not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rotquant_tvm.errors import UsageError

RELAX = "TVM compiles Relax functions for its virtual machine now"
ONE_FORM = f"{RELAX}: there is one executor and one runtime, so leave the option out"
LAYOUT = "decoders have no layout of images to choose; leave it out"
PRECISION = "the type of weights and arithmetic is chosen with --dtype float16 (or bfloat16, float32)"
SEARCH = "MetaSchedule has taken the place of AutoTVM and the auto-scheduler; leave it out"
TUNER = (
    "it chose one of AutoTVM's searches; the one search of MetaSchedule replaces them all: leave it out, and say with "
    "--trials, --trials-per-task and --early-stopping how long to search"
)
HARDWARE = "the target says what the hardware has: --target 'cuda -arch=sm_90a', 'llvm -mcpu=x86-64-v4', a tag or JSON"
MICRO = "microTVM is gone from TVM; artifacts run wherever TVM's runtime does (examples/deploy_cpp)"
REMOTE = "artifacts run where they lie: copy the folder there; tvmc tune --rpc-tracker still measures on other machines"
HOST = "a GPU's host is part of its target: {\"kind\": \"cuda\", \"arch\": \"sm_90a\", \"host\": {\"kind\": \"llvm\"}}"

_TRANSFORMS = {
    "--desired-layout": LAYOUT,
    "--desired-layout-ops": LAYOUT,
    "--mixed-precision": PRECISION,
    "--mixed-precision-ops": PRECISION,
    "--mixed-precision-calculation-type": PRECISION,
    "--mixed-precision-acc-type": PRECISION,
    "--target-host": HOST,
}
_COMPILE = {
    "--cross-compiler": "set the environment variable CXX to the compiler that links for the other machine",
    "--cross-compiler-options": "put the options into the environment variable CXX: CXX='aarch64-linux-gnu-g++ -O2'",
    "--dump-offloads": "nothing is offloaded to other code generators; the report says where each kernel comes from",
    "-f": "the output is an artifact folder with a shared library in it; leave it out",
    "--output-format": "the output is an artifact folder with a shared library in it; leave it out",
    "--executor": ONE_FORM,
    "--runtime": ONE_FORM,
    "--use-vm": f"{RELAX} always; leave it out",
    "--module-name": "the functions of a library are prefill, decode, create_kv_cache and kv_cache_info; leave it out",
    "--instruments": "use --print-pass-times, --print-ir-before and --print-ir-after",
}
_TUNE = {
    "--enable-autoscheduler": SEARCH,
    "--tuner": TUNER,
    "--include-simple-tasks": "which tasks are tuned is said with --tasks; --tasks list shows them",
    "--log-estimated-latency": "the log says of each record how long its kernel takes; see tvmc logs list",
    "--cache-line-bytes": HARDWARE,
    "--num-cores": HARDWARE,
    "--vector-unit-bytes": HARDWARE,
    "--max-shared-memory-per-block": HARDWARE,
    "--max-local-memory-per-block": HARDWARE,
    "--max-threads-per-block": HARDWARE,
    "--max-vthread-extent": HARDWARE,
    "--warp-size": HARDWARE,
    "--input-shapes": "the sizes to tune for are given with --shapes 1x8K,8x32K (sequences x tokens)",
}
_RUN = {
    "--print-top": "the likeliest next id of each row is shown; --outputs y.npz has all logits",
    "--end-to-end": "--print-time measures whole runs, copies included; leave it out",
    "--rpc-tracker": REMOTE,
    "--rpc-key": REMOTE,
    "--project-dir": MICRO,
    "--list-options": MICRO,
    "--options": MICRO,
}
FORMER: Mapping[str, Mapping[str, str]] = {
    "compile": _TRANSFORMS | _COMPILE,
    "tune": _TRANSFORMS | _TUNE,
    "run": _RUN,
}
"""By command, the options as they were written, and what to do now."""

_FAMILIES = {
    "--target-": "the options of a target are part of it: --target 'llvm -mcpu=x86-64-v3', not --target-llvm-mcpu",
    "--executor-": ONE_FORM,
    "--runtime-": ONE_FORM,
    "--workspace-pools": "memory is planned for TVM's virtual machine, which has no pools to configure; leave it out",
}
"""Beginnings of options whose ends were names of TVM's registries."""


def check_former_options(argv: Sequence[str], known: Mapping[str, Sequence[str]]) -> None:
    """Raise UsageError for a command or an option of the former tvmc, saying what replaces it.

    ``known``: by command, the options that it has now, which are not former ones whatever this file says.
    """
    command = next((word for word in argv if word in known or word == "micro"), None)
    if command == "micro":
        raise UsageError(f"tvmc micro: {MICRO}")
    if command is None or command not in FORMER:
        return
    for word in argv[argv.index(command) + 1 :]:
        option = word.partition("=")[0]
        if word == "--":
            break
        if option in known[command]:
            continue
        if option[:2] == "-f" and "-f" in FORMER[command]:  # -fmlf
            option = "-f"
        answer = FORMER[command].get(option) or next(
            (text for family, text in _FAMILIES.items() if command != "run" and option.startswith(family)), None
        )
        if answer is not None:
            raise UsageError(f"{option} was an option of the tvmc of TVM 0.19: {answer}")
