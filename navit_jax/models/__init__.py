"""Models: packed encoders, their positions, attention, pooling and heads."""

from navit_jax.models.navit import NaViT
from navit_jax.models.sizes import patch_size, spec
from navit_jax.models.sparseformer import SparseFormer
from navit_jax.models.text import TextTower

Encoder = NaViT | SparseFormer
MODELS = {"navit": NaViT, "sparseformer": SparseFormer}

__all__ = [
    "MODELS",
    "Encoder",
    "NaViT",
    "SparseFormer",
    "TextTower",
    "patch_size",
    "spec",
]
