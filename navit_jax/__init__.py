"""Vision transformers on images of any size and shape, in JAX."""

__version__ = "0.1.0"
