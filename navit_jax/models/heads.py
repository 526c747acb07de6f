"""Heads: what is put on an encoder's vectors.

Shapes: D width, C classes.
"""

import flax.linen as nn
from jaxtyping import Array, Float


class Linear(nn.Module):
    """A linear layer that starts at a constant: kernel 0, bias `bias_init`.

    Computed in float32, whatever the vectors' dtype, since losses take float32.

    Attributes:
      num_classes: C.
      bias_init: Initial value of every bias.
    """

    num_classes: int
    bias_init: float | int = 0.0

    @nn.compact
    def __call__(self, vectors: Float[Array, "*S D"]) -> Float[Array, "*S C"]:
        """One value a class."""
        dense = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(self.bias_init),
            dtype="float32",
            name="dense",
        )
        return dense(vectors)
