"""Models: packed encoders, their positions, attention, pooling and heads."""

from navit_jax.models.navit import NaViT
from navit_jax.models.sizes import patch_size, spec
from navit_jax.models.text import TextTower

MODELS = {"navit": NaViT}

__all__ = ["MODELS", "NaViT", "TextTower", "patch_size", "spec"]
