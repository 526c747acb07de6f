"""Random keys of images: by (seed, step, image), never by row or slot.

Shapes: B rows, N image slots a row.
"""

import jax
from jaxtyping import Array, Key, UInt32


def image_keys(
    key: Key[Array, ""], image_ids: UInt32[Array, "B N 2"]
) -> Key[Array, "B N"]:
    """A key for each image, the same wherever the image is packed.

    Args:
      key: Already folded with the step.
      image_ids: (source, index) of each image.
    """

    def fold(image_id):
        return jax.random.fold_in(jax.random.fold_in(key, image_id[0]), image_id[1])

    return jax.vmap(jax.vmap(fold))(image_ids)
