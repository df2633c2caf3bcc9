"""Shows KV caches of transformers side by side: memory, how far predictions move, and speed.

One model in eager PyTorch (SmolLM2-135M-Instruct by default) reads the same tokens of a text with DynamicCache, with
QuantizedCache (its quanto and HQQ backends, where they are installed) and with RotQuantCache: a prompt at once, then
token by token. Prints bytes per token as held, true bits per element of a token that is quantized, the mean KL
divergence of the next-token distributions from DynamicCache's in nats, and decode tokens/s.

    python examples/compare_caches.py [--text FILE] [--prompt 384] [--tokens 128] [--windows 2] [--device cuda] [--json]

On a GPU the model is float16, else float32. A cache that cannot run is left out with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, QuantizedCache
from transformers_generate import STORY, load_model, smollm2

from rotquant_tvm import RotQuantCache

DEFAULTS = "dynamic,quanto4,quanto2,hqq4,hqq3,hqq2,rq4,rq3,rq2"


@dataclass
class Figures:
    """What one cache did; bytes and bits are those of the last window."""

    name: str
    bytes_per_token: float = 0.0
    bits_per_element: float = 0.0
    kl: float = 0.0
    same_top: float = 0.0
    tokens_per_second: float = 0.0
    skipped: str = ""


def main() -> None:
    """Measure all caches on the same tokens and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another .gguf file or model directory")
    parser.add_argument("--text", type=Path, default=STORY, help="a text, like WikiText-2's wiki.test.raw")
    parser.add_argument("--prompt", type=int, default=384, help="tokens that are read at once")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that follow one by one")
    parser.add_argument("--windows", type=int, default=2, help="places of the text to measure at")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--caches", default=DEFAULTS, help=f"default: {DEFAULTS}")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model or smollm2())
    if arguments.device != "cpu":
        model = model.to(arguments.device, torch.float16)
    rows = [ids.to(model.device) for ids in windows(tokenizer, arguments)]
    names = list(dict.fromkeys(["dynamic", *arguments.caches.split(",")]))
    found, reference = [], []
    for name in names:
        figures, logits = measure(name, model, rows, arguments.prompt, reference)
        reference = reference or logits
        found.append(figures)
    if arguments.json:
        print(json.dumps([asdict(figures) for figures in found]))
    else:
        show(found, arguments)


def windows(tokenizer: Any, arguments: argparse.Namespace) -> list[torch.Tensor]:
    """Stretches of the text, one after the other, ids [1, prompt + tokens] each."""
    length, characters = arguments.prompt + arguments.tokens, 12 * (arguments.prompt + arguments.tokens)
    text = arguments.text.read_text(encoding="utf-8")[: characters * arguments.windows]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    count = min(arguments.windows, ids.shape[1] // length)
    if not count:
        raise SystemExit(f"{arguments.text} has {ids.shape[1]} tokens; {length} are needed")
    return [ids[:, i * length : (i + 1) * length] for i in range(count)]


def measure(
    name: str, model: Any, rows: list[torch.Tensor], prompt: int, reference: list[torch.Tensor]
) -> tuple[Figures, list[torch.Tensor]]:
    """Run every window with a new cache; returns figures and the log-probabilities [tokens, vocab] per window."""
    figures, logits, seconds = Figures(label(name)), [], 0.0
    try:
        make = maker(name, model)
        run(model, make(), rows[0][:, : prompt + 2], prompt)  # compiles and allocates, unmeasured
        for number, ids in enumerate(rows, 1):
            print(f"{figures.name}: {number} of {len(rows)}", file=sys.stderr, flush=True)
            cache = make()
            found, taken = run(model, cache, ids, prompt)
            logits.append(torch.log_softmax(found.double(), dim=-1))
            seconds += taken
    except Exception as error:  # a rival that is absent or cannot run here
        figures.skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return figures, []
    held = cache.get_seq_length()
    figures.bytes_per_token = held_bytes(cache) / held
    figures.bits_per_element = stored_bits(cache, model, held)
    figures.tokens_per_second = sum(len(found) - 1 for found in logits) / seconds
    pairs = list(zip(reference or logits, logits, strict=True))
    figures.kl = float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean())
    figures.same_top = float(torch.cat([(a.argmax(-1) == b.argmax(-1)).double() for a, b in pairs]).mean())
    return figures, logits


@torch.no_grad()
def run(model: Any, cache: Cache, ids: torch.Tensor, prompt: int) -> tuple[torch.Tensor, float]:
    """Return the logits [tokens, vocab] behind the prompt, and the seconds of the single steps."""
    logits = [model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1).logits[0].cpu()]
    since = time.perf_counter()
    for position in range(prompt, ids.shape[1] - 1):
        # A step ends when its logits are there, as it does where a token is chosen from them.
        logits.append(model(ids[:, position : position + 1], past_key_values=cache).logits[0].cpu())
    return torch.cat(logits), time.perf_counter() - since


def label(name: str) -> str:
    """What a row of the table is called."""
    backend, bits = name.rstrip("0123456789"), name[-1]
    if backend in ("quanto", "hqq"):
        return f"QuantizedCache {backend} {bits} bits"
    return "DynamicCache" if name == "dynamic" else f"RotQuantCache {name}"


def maker(name: str, model: Any) -> Callable[[], Cache]:
    """What makes a cache; the model's attention is set to what suits it."""
    backend, bits = name.rstrip("0123456789"), name[-1]
    if backend == "quanto":
        import optimum.quanto  # noqa: F401  (the reason why it cannot be used is better than transformers')
    elif backend == "hqq":
        import hqq.core.quantize  # noqa: F401
    packed = name != "dynamic" and backend not in ("quanto", "hqq")
    model.set_attn_implementation(RotQuantCache.attention if packed else "sdpa")
    if packed:
        return lambda: RotQuantCache(name, model.config)
    if name == "dynamic":
        return lambda: DynamicCache(config=model.config)
    axis = 1 if backend == "hqq" else 0  # the values that transformers' documentation gives
    return lambda: QuantizedCache(backend, model.config, nbits=int(bits), axis_key=axis, axis_value=axis)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that hold a value's data."""
    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def size_of(value: Any) -> int:
    """Bytes of the tensors in a value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def held_bytes(cache: Any) -> int:
    """Bytes that a cache holds, as allocated."""
    if isinstance(cache, RotQuantCache):
        return cache.nbytes
    names = ("keys", "values", "_quantized_keys", "_quantized_values")
    return sum(size_of(getattr(layer, name, None)) for layer in cache.layers for name in names)


def stored_bits(cache: Any, model: Any, held: int) -> float:
    """True bits per element of tokens that are quantized, scales counted."""
    if isinstance(cache, RotQuantCache):
        return float(cache.report()["bits_per_element"])
    if not hasattr(cache.layers[0], "_quantized_keys"):
        return 8.0 * cache.layers[0].keys.element_size()
    layer = cache.layers[0]
    quantized = held - layer.keys.shape[-2] if layer.keys.dim() == 4 else held
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    elements = 2 * config.num_key_value_heads * quantized * head_dim
    return 8 * (size_of(layer._quantized_keys) + size_of(layer._quantized_values)) / elements


def show(found: list[Figures], arguments: argparse.Namespace) -> None:
    """Print the table and what was left out."""
    title = f"{arguments.windows} x ({arguments.prompt} tokens at once and {arguments.tokens} one by one)"
    table = Table(title=title)
    for column in ("cache", "B/token held", "bits/element", "KL (nats)", "same top token", "tokens/s"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in found:
        if not row.skipped:
            numbers = (f"{row.bytes_per_token:,.0f}", f"{row.bits_per_element:.2f}", f"{row.kl:.4f}")
            table.add_row(row.name, *numbers, f"{100 * row.same_top:.1f} %", f"{row.tokens_per_second:.1f}")
    console = Console(width=110)
    console.print(table)
    for row in found:
        if row.skipped:
            console.print(f"left out: {row.name} ({row.skipped})", highlight=False)


if __name__ == "__main__":
    main()
