"""Random erasing, mixup and CutMix of packed images, on the device.

Zhong et al. 2017, Zhang et al. 2018, Yun et al. 2019. An image is mixed with another of
its own row, so neither the number of devices nor accumulation changes what is mixed;
only images of one grid, with all their patches, are. Draws are by image.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, S pixels of a
patch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from navit_jax.errors import ConfigError
from navit_jax.models.pooling import image_masks

Patches = UInt8[Array, "B L P"]
# Share of the area that is erased, and its aspect; noise as timm's "pixel" mode has it
# after normalisation by ImageNet's mean and deviation, here of the uint8 pixels.
ERASED, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
NOISE_MEAN, NOISE_STD = 116.0, 57.0


def erase(
    patches: Patches,
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
    keys: Key[Array, "B N"],
    rate: float | int,
) -> Patches:
    """Fills a random box of some images with noise.

    Args:
      rate: Share of the images that lose a box.
    """

    def draw(key: Array) -> Array:
        whether, area, aspect, place = jax.random.split(jax.random.fold_in(key, 3), 4)
        low, high = map(jnp.log, ASPECT)
        share = jax.random.uniform(area, minval=ERASED[0], maxval=ERASED[1])
        stretch = jnp.exp(jax.random.uniform(aspect, minval=low, maxval=high))
        extent = jnp.sqrt(share * jnp.array([stretch, 1 / stretch]))
        extent = jnp.minimum(extent, 1)
        corner = jax.random.uniform(place, (2,)) * (1 - extent)
        box = jnp.concatenate([corner, corner + extent])
        return jnp.where(jax.random.uniform(whether) < rate, box, 0)

    boxes = jax.vmap(jax.vmap(draw))(keys)
    hit = inside(boxes, patches.shape[-1], coords, segment_ids, grids)
    slots = jnp.maximum(segment_ids - 1, 0)

    def noise(key: Array, coord: Array) -> Array:
        for part in (4, *coord):
            key = jax.random.fold_in(key, part)
        return NOISE_MEAN + NOISE_STD * jax.random.normal(key, patches.shape[-1:])

    own = jnp.take_along_axis(keys, slots, axis=1)
    drawn = jax.vmap(jax.vmap(noise))(own, coords)
    drawn = jnp.clip(jnp.round(drawn), 0, 255).astype(jnp.uint8)
    return jnp.where(jnp.repeat(hit, 3, -1), drawn, patches)


def mix(
    patches: Patches,
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
    keys: Key[Array, "B N"],
    mixup: float | int,
    cutmix: float | int,
) -> tuple[Patches, Int[Array, "B N"], Float[Array, "B N"]]:
    """Mixes each image with a partner: as a whole, or a box of the partner in it.

    Args:
      mixup, cutmix: a of the Beta(a, a) that the share is drawn from; 0 for neither. If
        both are given each image takes one of them by a fair coin.

    Returns:
      Patches; the slot of each image's partner; and the image's own share, 1 where
      nothing was mixed.

    Raises:
      ConfigError: a row has one slot, so that no image has a partner.
    """
    N, P = keys.shape[1], patches.shape[-1]
    if N == 1:
        raise ConfigError(
            "config.data.slots=1: mixup and CutMix mix images of one row; give 2 or "
            "more, and as many tokens"
        )
    partner, alike = choose_partners(segment_ids, grids)

    def draw(key: Array) -> tuple[Array, Array]:
        coin, blend, cut, place = jax.random.split(jax.random.fold_in(key, 5), 4)
        share = jax.random.beta(blend, mixup, mixup) if mixup else jnp.float32(1)
        side = 0.0
        if cutmix:
            side = jnp.sqrt(1 - jax.random.beta(cut, cutmix, cutmix))
        centre = jax.random.uniform(place, (2,))
        box = jnp.concatenate([centre - side / 2, centre + side / 2]).clip(0, 1)
        whole = jax.random.uniform(coin) < (0.5 if mixup and cutmix else bool(mixup))
        return jnp.where(whole, share, 1), jnp.where(whole, 0, box)

    shares, boxes = jax.vmap(jax.vmap(draw))(keys)
    shares = jnp.where(alike, shares, 1)
    boxes = jnp.where(alike[..., None], boxes, 0)
    hit = inside(boxes, P, coords, segment_ids, grids)

    slots = jnp.maximum(segment_ids - 1, 0)
    masks = image_masks(segment_ids, N)
    starts = jnp.argmax(masks, axis=-1)
    moved = jnp.take_along_axis(partner, slots, axis=1)
    places = jnp.arange(segment_ids.shape[1])
    places += jnp.take_along_axis(starts, moved, axis=1)
    places -= jnp.take_along_axis(starts, slots, axis=1)
    other = jnp.take_along_axis(patches, places[..., None], axis=1, mode="clip")
    weight = jnp.take_along_axis(shares, slots, axis=1)[..., None]
    blend = weight * patches.astype(jnp.float32) + (1 - weight) * other
    blend = jnp.where(jnp.repeat(hit, 3, -1), other, jnp.round(blend))

    # Of a box the share is the pixels that are left, counted.
    taken = jnp.einsum("BNL,BL->BN", masks, hit.sum(-1, dtype=jnp.float32))
    pixels = jnp.maximum(masks.sum(-1) * hit.shape[-1], 1)
    real = (segment_ids > 0)[..., None]
    mixed = jnp.where(real, blend.astype(jnp.uint8), patches)
    return mixed, partner, shares - taken / pixels


def choose_partners(
    segment_ids: Int[Array, "B L"], grids: Int[Array, "B N 2"]
) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
    """The slot of each image's partner, the order of a row reversed; and if it is one.

    It is one if both have all patches of one grid, and they are two.
    """
    N = grids.shape[1]
    counts = image_masks(segment_ids, N).sum(-1)
    last = jnp.max(jnp.where(counts > 0, jnp.arange(N), 0), axis=1, keepdims=True)
    partner = jnp.maximum(last - jnp.arange(N), 0)
    theirs = jnp.take_along_axis(grids, partner[..., None], axis=1)
    whole = (counts > 0) & (counts == grids.prod(-1))
    alike = whole & jnp.take_along_axis(whole, partner, axis=1)
    alike &= (theirs == grids).all(-1) & (partner != jnp.arange(N))
    return partner, alike


def inside(
    boxes: Float[Array, "B N 4"],
    patch_values: int,
    coords: Int[Array, "B L 2"],
    segment_ids: Int[Array, "B L"],
    grids: Int[Array, "B N 2"],
) -> Bool[Array, "B L S"]:
    """Which pixels have their centre in the box of their image.

    Args:
      boxes: (top, left, bottom, right) in fractions of the image's sides.
    """
    side = round((patch_values // 3) ** 0.5)
    slots = jnp.maximum(segment_ids - 1, 0)[..., None]
    own = jnp.take_along_axis(boxes, slots, axis=1)
    grid = jnp.maximum(jnp.take_along_axis(grids, slots, axis=1), 1)
    offsets = (jnp.arange(side) + 0.5) / side
    places = (coords[..., None] + offsets) / grid[..., None]
    ends = own.reshape(*own.shape[:2], 2, 2)
    hit = (places >= ends[:, :, 0, :, None]) & (places < ends[:, :, 1, :, None])
    both = hit[:, :, 0, :, None] & hit[:, :, 1, None, :]
    return both.reshape(*both.shape[:2], -1) & (segment_ids > 0)[..., None]
