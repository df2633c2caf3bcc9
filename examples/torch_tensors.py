"""Shows torch tensors in and out of compiled kernels: DLPack hands the memory over, nothing is copied.

    python examples/torch_tensors.py [--format hurwitz3] [--head-dim 128] [--device cuda]

Prints the size and the error of a tensor of keys stored in the format.
"""

from __future__ import annotations

import argparse

import torch

from rotquant_tvm.formats import KVFormat


def main() -> None:
    """Encode, decode, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="hurwitz3")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()

    # A codec is a format at a head dimension; compiled, it takes tensors of torch on its device as they are.
    codec = KVFormat.parse(arguments.format).codec(arguments.head_dim, seed=0)
    compiled = codec.compile("cuda" if arguments.device == "cuda" else "llvm")
    keys = torch.randn(2, 8, 1024, arguments.head_dim, device=arguments.device)
    encoded = compiled.encode(keys)
    back = compiled.decode(encoded, torch.float32)

    error = ((back - keys).square().mean() / keys.square().mean()).item()
    print(f"{arguments.format}: {compiled.bits_per_element:.3f} bits per element, relative squared error {error:.4f}")
    print(f"codes are {encoded.codes.dtype} {tuple(encoded.codes.shape)} on {encoded.codes.device}")


if __name__ == "__main__":
    main()
