"""How libraries of flax name the parameters of a ViT, as `layouts.py` has it.

Names: vit_jax and big_vision `models/vit.py`.
"""

from navit_jax.weights.layouts import HALF, Layout


def _flax(attention: str, norm_2: str, mlp: str, positions: str) -> Layout:
    heads = {
        f"attention/{name}": (f"{attention}/{name}", "heads")
        for name in ("query", "key", "value")
    }
    block = {
        "norm_1": ("LayerNorm_0", "norm"),
        **heads,
        "attention/out": (f"{attention}/out", "merge"),
        "norm_2": (norm_2, "norm"),
        "mlp/up": (f"{mlp}/Dense_0", "linear"),
        "mlp/down": (f"{mlp}/Dense_1", "linear"),
    }
    pool = "MAPHead_0/MultiHeadDotProductAttention_0"
    return Layout(
        parts={
            "patch_embedding": ("embedding", "patches"),
            **{
                f"blocks/{ours}": (f"Transformer/encoderblock_{{}}/{theirs}", how)
                for ours, (theirs, how) in block.items()
            },
            "norm": ("Transformer/encoder_norm", "norm"),
            "pool/probe": ("MAPHead_0/probe", "rows"),
            "pool/query": (f"{pool}/query", "heads"),
            "pool/key": (f"{pool}/key", "heads"),
            "pool/value": (f"{pool}/value", "heads"),
            "pool/out": (f"{pool}/out", "merge"),
            "pool/norm": ("MAPHead_0/LayerNorm_0", "norm"),
            "pool/mlp/up": ("MAPHead_0/MlpBlock_0/Dense_0", "linear"),
            "pool/mlp/down": ("MAPHead_0/MlpBlock_0/Dense_1", "linear"),
            "head/dense": ("head", "linear"),
        },
        class_token="cls",
        positions=positions,
        assumed={
            "activation": "gelu_tanh",
            "eps": 1e-6,
            "mean": HALF,
            "std": HALF,
            # They resize with scipy.ndimage.zoom(order=1).
            "filter": "corners",
        },
        signs=(f"Transformer/encoderblock_0/{attention}/query/kernel",),
        flax=True,
        # Of the classes of ImageNet-21k.
        ignored=("pre_logits/.*",),
    )


AUGREG = _flax(
    "MultiHeadDotProductAttention_1",
    "LayerNorm_2",
    "MlpBlock_3",
    "Transformer/posembed_input/pos_embedding",
)
BIG_VISION = _flax(
    "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0", "pos_embedding"
)
