"""A compiler for the KV cache of LLMs."""

__version__ = "0.1.0"
