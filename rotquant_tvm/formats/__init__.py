"""KV formats: rotations, codebooks, gains, packing; the NumPy reference."""
