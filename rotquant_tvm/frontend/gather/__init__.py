"""Attention that a model spells out in products and a softmax, gathered into single calls (``gather_attention``)."""

from .gather_attention import gather_attention, near_misses
from .near_miss import NearMiss

__all__ = ["NearMiss", "gather_attention", "near_misses"]
