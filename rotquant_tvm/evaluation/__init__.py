"""How good a KV cache is: perplexity, KL divergence, retrieval and attention error, against the 16-bit cache.

``tvmc eval`` is the command line over these modules.
"""
