"""Shows all that a deployment needs: TVM's runtime library, no compiler and no torch.

    pip install rotquant-tvm                        # without extras
    python examples/deploy_python/generate.py model.rq "The keeper of the lighthouse" --save prefix.kv
    python examples/deploy_python/generate.py model.rq " lit the lamp" --prefix prefix.kv

--save keeps the packed cache of what was read and said; --prefix takes it up, so that a long context (a system prompt,
a document) is computed once.
"""

from __future__ import annotations

import argparse
import os

# Before anything imports TVM: load its runtime library (3 MB) and not its compiler (260 MB).
os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")

from rotquant_tvm.runtime import load_library


def main() -> None:
    """Load, take up a prefix, generate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--prefix", help="a cache that --save has written")
    parser.add_argument("--save", help="where to keep the cache afterwards")
    arguments = parser.parse_args()

    library = load_library(arguments.artifact)
    session = library.restore(arguments.prefix) if arguments.prefix else library.session()
    answer = session.generate(arguments.prompt, arguments.max_tokens, reset=False)
    print(answer.text)
    if arguments.save:
        session.save(arguments.save)
    print(f"{session.lengths[0]} tokens in a cache of {session.kv_bytes():,} bytes on {library.device}")


if __name__ == "__main__":
    main()
