"""Compute the codebooks: Lloyd–Max on the sphere marginal, then its best int8 grid.

``python -m rotquant_tvm.formats.codebook_generator`` prints ``codebook_tables.py``. The table is frozen:
packed caches depend on it, so it changes only together with the layout version.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]

HEAD_DIMS = (*range(32, 257, 16), 512)
BITS = (1, 2, 3, 4)
GRID_LIMIT = 127
SCALE_TRIALS = 4001
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(256)


def half_moments(boundaries: Float64Array, head_dim: int) -> tuple[Float64Array, Float64Array, Float64Array]:
    """Return ∫f, ∫t·f and ∫t²·f over the cells [b_i, b_{i+1}] that ``boundaries`` [..., n+1] cuts.

    f ∝ (1−t²)^((d−3)/2) is the density of one coordinate of a uniform unit vector in Rᵈ, unnormalized.
    """
    low, high = boundaries[..., :-1, None], boundaries[..., 1:, None]
    t = (high + low) / 2 + (high - low) / 2 * _NODES
    mass = (1.0 - t * t) ** ((head_dim - 3) / 2) * _WEIGHTS * (high - low) / 2
    return mass.sum(-1), (mass * t).sum(-1), (mass * t * t).sum(-1)


def _cells(centroids: Float64Array) -> Float64Array:
    """Return the boundaries [..., n+1] in [0, 1] of the cells of the positive centroids [..., n]."""
    middles = (centroids[..., 1:] + centroids[..., :-1]) / 2
    ends = np.zeros_like(centroids[..., :1])
    return np.concatenate([ends, middles, ends + 1.0], axis=-1)


def lloyd_max(bits: int, head_dim: int, tolerance: float = 1e-13) -> Float64Array:
    """Return the positive centroids, float64 [2^(bits−1)] ascending, of the optimal symmetric quantizer.

    The density is log-concave, so Lloyd's iteration has one fixed point (Kieffer, 1983).
    """
    levels = 2 ** (bits - 1)
    centroids = (np.arange(levels) + 0.5) / levels * 3.0 / np.sqrt(head_dim)
    for _ in range(100_000):
        mass, first, _ = half_moments(_cells(centroids), head_dim)
        updated = first / mass
        if np.abs(updated - centroids).max() < tolerance / np.sqrt(head_dim):
            return updated
        centroids = updated
    raise ArithmeticError(f"Lloyd's iteration did not converge at {bits} bits, head_dim {head_dim}")


def distortion(centroids: Float64Array, head_dim: int) -> Float64Array:
    """Return D = E‖x−x̂‖²/E‖x‖² [...] of positive centroids [..., n] for isotropic x, raw gain."""
    mass, first, second = half_moments(_cells(centroids), head_dim)
    error = (second - 2.0 * centroids * first + centroids**2 * mass).sum(-1)
    relative: Float64Array = error / second.sum(-1)
    return relative


@dataclass(frozen=True)
class GridCodebook:
    """Positive grid values (ascending integers ≤ 127) and the float32 scale that they are multiplied by."""

    scale: np.float32
    grid: tuple[int, ...]

    @property
    def centroids(self) -> Float64Array:
        """The positive centroids, float64."""
        return np.array(self.grid) * np.float64(self.scale)


def int8_grid(centroids: Float64Array, head_dim: int) -> GridCodebook:
    """Return the int8 grid and scale near ``centroids`` of least D; of equal ones, the smallest integers."""
    top = np.linspace(GRID_LIMIT + 0.49, len(centroids) / 2, SCALE_TRIALS)
    grids = np.unique(np.rint(top[:, None] * centroids / centroids[-1]), axis=0)
    grids = grids[(np.diff(grids, axis=-1, prepend=0.0) > 0).all(-1)]
    scales = np.full(len(grids), centroids[-1]) / grids[:, -1]
    for _ in range(20):  # the best scale for its own cells; converges in a few steps
        mass, first, _ = half_moments(_cells(grids * scales[:, None]), head_dim)
        scales = (grids * first).sum(-1) / (grids**2 * mass).sum(-1)
    scales = scales.astype(np.float32)
    loss = distortion(grids * scales[:, None].astype(np.float64), head_dim)
    best = int(np.flatnonzero(loss <= loss.min() * (1 + 1e-9))[0])
    return GridCodebook(scales[best], tuple(int(value) for value in grids[best]))


def generate(bits: int, head_dim: int) -> GridCodebook:
    """Return the codebook of a bit width and head dimension."""
    return int8_grid(lloyd_max(bits, head_dim), head_dim)


def source() -> str:
    """Return the text of ``codebook_tables.py``."""
    lines = [
        '"""Frozen codebooks, by ``codebook_generator``: head_dim -> per bits 1..4 (scale, half grid)."""',
        "",
        "TABLES: dict[int, tuple[tuple[float, tuple[int, ...]], ...]] = {",
    ]
    for head_dim in HEAD_DIMS:
        lines.append(f"    {head_dim}: (")
        for bits in BITS:
            book = generate(bits, head_dim)
            lines.append(f"        ({book.scale!s}, {book.grid}),")
        lines.append("    ),")
    return "\n".join([*lines, "}", ""])


if __name__ == "__main__":
    print(source(), end="")
