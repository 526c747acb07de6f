"""Latent tokens of a row: how many each image gets, where they stand, how they start.

Shapes: B rows, N image slots a row, Q latent tokens a row, D width, T entries of a
table.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from navit_jax.errors import ConfigError
from navit_jax.models import rois as boxes
from navit_jax.models.choices import pick
from navit_jax.models.feature_maps import take
from navit_jax.models.sparseformer_sizes import Shape


def allot(
    mode: str,
    counts: Sequence[int],
    room: int,
    num_tokens: Int[Array, "B N"],
    keys: Key[Array, "B N"] | None,
) -> Int[Array, "B N"]:
    """Which of `counts` each image gets; that of an empty slot means nothing.

    Args:
      mode: "fixed": the first of `counts`. "drawn": by the image's key any of them,
        each as likely; the first without keys. "budget": each image the largest within
        its share of the room, by its patches, over what the smallest takes of all.
      room: Q.
      num_tokens: Patches of each image; 0 of an empty slot.

    Raises:
      ConfigError: an unknown mode, or images for which there may be no room.
    """
    choose, most = pick("model.allot", mode, MODES)
    N, each = num_tokens.shape[1], most(counts)
    if N * each > room:
        raise ConfigError(
            f"config.model.latents={room}: {N} images a row may need {each} each; give "
            f"{N * each}, or lower config.data.slots"
        )
    return choose(counts, room, num_tokens, keys)


def _fixed(counts: Sequence[int], room: int, num: Array, keys: Array | None) -> Array:
    return jnp.zeros_like(num)


def _drawn(counts: Sequence[int], room: int, num: Array, keys: Array | None) -> Array:
    if keys is None:
        return jnp.zeros_like(num)

    def draw(key: Array) -> Array:
        # Drop path folds 0 and 1 into the same key.
        return jax.random.randint(jax.random.fold_in(key, 2), (), 0, len(counts))

    return jax.vmap(jax.vmap(draw))(keys)


def _budget(counts: Sequence[int], room: int, num: Array, keys: Array | None) -> Array:
    least, total = min(counts), jnp.maximum(num.sum(-1, keepdims=True), 1)
    spare = room - least * (num > 0).sum(-1, keepdims=True)
    share = least + spare * num // total
    fits = jnp.array(counts) <= share[..., None]
    return jnp.argmax(jnp.where(fits, jnp.array(counts), 0), -1)


MODES: dict[str, tuple[Callable[..., Array], Callable[[Sequence[int]], int]]] = {
    "fixed": (_fixed, lambda counts: counts[0]),
    "drawn": (_drawn, max),
    "budget": (_budget, min),
}


def place(
    num_latents: Int[Array, "B N"], room: int
) -> tuple[Int[Array, "B Q"], Int[Array, "B Q"]]:
    """Segment ids of the row's latent tokens, and the number of each in its image.

    They stand image by image, in the order of the slots, padding (0) at the end.
    """
    ends = jnp.cumsum(num_latents, -1)
    places = jnp.arange(room)
    slots = (places[:, None] >= ends[:, None]).sum(-1)
    real = slots < num_latents.shape[1]
    slots = jnp.where(real, slots, 0)
    inside = places - take(ends - num_latents, slots)
    return jnp.where(real, slots + 1, 0), jnp.where(real, inside, 0)


def read_tables(
    table: Float[Array, "own D"],
    counts: Sequence[int],
    chosen: Int[Array, "B N"],
    segment_ids: Int[Array, "B Q"],
    inside: Int[Array, "B Q"],
) -> Float[Array, "B Q D"]:
    """The entry of each latent token, in the table resized to its image's count."""
    tables = jnp.concatenate([boxes.resize_table(table, count) for count in counts])
    starts = jnp.cumsum(jnp.array((0, *counts)))[:-1]
    first = starts[take(chosen, jnp.maximum(segment_ids - 1, 0))]
    # A product rather than a gather: its gradient is summed in a fixed order.
    each = jax.nn.one_hot(first + inside, len(tables), dtype=tables.dtype)
    return jnp.einsum("BQT,TD->BQD", each, tables, precision="highest")


def start_boxes(shape: Shape) -> Float32[np.ndarray, "T 4"]:
    """The boxes of a shape's tables before training."""
    grid = boxes.cell_grid if shape.glimpse else boxes.half_grid
    return grid(shape.latents)


def by_image(
    rois: Float[Array, "B R Q 4"],
    points: Float[Array, "B R Q S 2"],
    num_latents: Int[Array, "B N"],
    most: int,
) -> Float[Array, "B N R most V"]:
    """Box and points of the tokens of each image, at each of R stages.

    Args:
      most: Tokens of an image, at most.

    Returns:
      Of a token V = 4 + 2 S values; NaN where an image has fewer.
    """
    values = jnp.concatenate([rois, points.reshape(*points.shape[:-2], -1)], -1)
    num, inside = num_latents[..., None], jnp.arange(most)
    first = jnp.cumsum(num, 1) - num
    places = jnp.minimum(first + inside, values.shape[2] - 1)
    found = jax.vmap(lambda row, own: row[:, own])(values, places)
    real = (inside < num)[:, :, None, :, None]
    return jnp.where(real, jnp.moveaxis(found, 1, 2), jnp.nan)


class Tables(nn.Module):
    """The learned start of tokens: boxes [T 4] and embeddings [T D], or one for all.

    Attributes:
      shape: Whose `latents` are T and `focus_width` D.
      counts: Tokens that an image may have.
      frozen: Whether boxes are not trained.
      clamp: Whether they stay in the image.
    """

    shape: Shape
    counts: tuple[int, ...]
    frozen: bool
    clamp: bool

    @nn.compact
    def __call__(
        self,
        chosen: Int[Array, "B N"],
        segment_ids: Int[Array, "B Q"],
        inside: Int[Array, "B Q"],
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B Q 4"]]:
        """Embeddings, 0 at padding, and boxes, there the whole image."""

        def read(table: jax.Array) -> jax.Array:
            return read_tables(table, self.counts, chosen, segment_ids, inside)

        size, shared = self.shape.latents, self.shape.shared
        rois = self.param("rois", lambda _: jnp.asarray(start_boxes(self.shape)))
        if self.frozen:
            rois = jax.lax.stop_gradient(rois)
        real = (segment_ids > 0)[..., None]
        placed = read(boxes.settle(rois, self.clamp))
        placed = jnp.where(real, placed, jnp.array(boxes.WHOLE))
        init = nn.initializers.truncated_normal(1.0)
        entries = (1 if shared else size, self.shape.focus_width)
        table = self.param("embedding", init, entries)
        return jnp.where(real, table if shared else read(table), 0), placed
