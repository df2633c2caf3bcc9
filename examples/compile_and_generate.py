"""Shows the three calls that most programs need: compile a model, save the artifact, load it and generate.

    python examples/compile_and_generate.py MODEL [--kv-cache rq3] [--output model.rq] [--prompt TEXT]

MODEL is a transformers model directory or a .gguf file. The last part runs without torch and without the
compiler, so it is all that a deployment needs.
"""

from __future__ import annotations

import argparse

import rotquant_tvm


def main() -> None:
    """Compile, save, load, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-cache", default="rq3")
    parser.add_argument("--output", default="model.rq")
    parser.add_argument("--prompt", default="The keeper of the lighthouse")
    arguments = parser.parse_args()

    # Compile: the model's attention is found and rewritten to read a packed cache. Layers may differ:
    # kv_layers="0,-1=f16" keeps the first and the last in 16 bits.
    compiled = rotquant_tvm.compile(arguments.model, arguments.kv_cache, progress=print)
    report = compiled.report
    print(f"{report['layers_rewritten']} layers rewritten, {report['bits_per_element']:.3f} bits per element")
    print(f"{report['bytes_per_token']:.0f} bytes per token, {report['f16_bytes_per_token']} with an f16 cache")
    compiled.save(arguments.output)

    # Deploy: a session is one cache over the library; more sessions share its weights.
    session = rotquant_tvm.load(arguments.output, capacity=512)
    print(f"\n{arguments.prompt}", end="")
    session.generate(arguments.prompt, max_tokens=64, stream=lambda chunk: print(chunk.text, end="", flush=True))
    print(f"\n{session.lengths[0]} tokens in a cache of {session.kv_bytes():,} bytes")


if __name__ == "__main__":
    main()
