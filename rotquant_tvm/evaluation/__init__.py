"""Measures of quality: distortion, perplexity and KL."""
