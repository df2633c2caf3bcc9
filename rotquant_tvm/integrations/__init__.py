"""Packed KV caches inside other libraries' models: ``RotQuantCache`` for transformers."""
