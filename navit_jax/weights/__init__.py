"""Reads and writes other people's checkpoints of vision transformers."""

from navit_jax.weights.read import Weights, read

__all__ = ["Weights", "read"]
