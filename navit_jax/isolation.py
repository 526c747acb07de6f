"""Proves that a packed image computes what it would alone, and finds who broke a row.

Shapes: B rows, L tokens a row, N image slots a row, P values a patch, D width.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from navit_jax.batch import PackedBatch

# PackedBatch -> [B N ...] or [B L ...]; to `find_nonfinite` [B N ...] where N = L.
Apply = Callable[[PackedBatch], Any]


class IsolationError(AssertionError):
    """A packed image depends on what it is packed with; the message names both."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check_isolation` did.

    Attributes:
      images: Images of the batch that own a token.
      changes: Batches with one image or one row's padding changed, each compared to
        the bit.
      gradients: Images whose gradient was followed into all others; 0 if not asked for.
      alone: Largest |packed - alone| over the largest |alone|.
    """

    images: int
    changes: int
    gradients: int
    alone: float


def check_isolation(
    apply: Apply,
    batch: PackedBatch,
    *,
    gradients: bool = True,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Report:
    """Checks that no image and no padding changes another image's output or gradient.

    Each image in turn gets other pixels, coordinates and another grid, and each row's
    padding too: every other image's output must keep its bits. Each image packed alone,
    at the start of a row, must give the same up to `tolerance`. The gradient of each
    image's output must be exactly 0 in the patches of all others and of padding.

    Args:
      apply: The module, deterministic: `lambda batch: model.apply(...)["pooled"]`. It
        is jitted. Use float32 and `jax.default_matmul_precision("highest")` unless
        `tolerance` allows for less.
      batch: Of at least two images; a few small rows are enough. Costs about one
        forward and one backward pass of the batch for each image.
      gradients: Whether gradients are checked. uint8 patches are then given to `apply`
        as floats in [-1, 1].
      tolerance: Of packed against alone, relative to the largest value alone.
      seed: Of what the changed images become.

    Raises:
      IsolationError: the first dependence found, or nothing in the output depends on
        the patches, so nothing would be proved.
    """
    batch = _tell_apart(jax.tree.map(np.asarray, batch))
    run = jax.jit(apply)
    before = np.asarray(run(batch))
    owners = _owners(before, batch)
    images = _images(batch)
    if not np.isfinite(before[owners[..., 1] >= 0].astype(np.float32)).all():
        raise IsolationError("the output is not finite; see find_nonfinite")
    rng = np.random.default_rng(seed)
    moved = False
    changes = [*images, *((row, -1) for row in range(len(batch.segment_ids)))]
    for source in changes:
        after = np.asarray(run(_changed(batch, *source, rng)))
        differs = (before.view(np.uint8) != after.view(np.uint8)).reshape(
            *before.shape[:2], -1
        )
        mine = (owners == source).all(-1)
        # By value: the zeros of a blind module change their sign.
        moved |= source[1] >= 0 and bool((before != after)[mine].any())
        for row, place in np.argwhere(differs.any(-1) & ~mine & (owners[..., 1] >= 0)):
            gap = np.abs(np.float32(after[row, place]) - np.float32(before[row, place]))
            raise IsolationError(
                f"{_name(owners[row, place], batch)} changes with "
                f"{_name(source, batch)}: max |difference| {gap.max():.3g}"
            )
    if not moved:
        raise IsolationError("the output depends on no patch: nothing is proved")
    difference = _compare_alone(run, batch, before, tolerance)
    if gradients:
        _check_gradients(apply, batch, images, owners, seed)
    count = len(images)
    return Report(count, len(changes), count * gradients, difference)


def find_nonfinite(apply: Apply, batch: PackedBatch) -> np.ndarray:
    """Finds the images that make a row non-finite.

    An image that is not finite spoils its row (0 x NaN is NaN in every matrix product)
    and no other row. Each image of a spoiled row is run again alone.

    Args:
      apply: Gives values by image or token: outputs, or losses [B N]; jitted by the
        caller, if it should be fast.
      batch: On the host, of the shapes that `apply` is compiled for.

    Returns:
      [n 2] uint32, (source, index) of the images that are not finite alone; none if
      the batch is finite, or only the packing made it otherwise.
    """
    batch = jax.tree.map(np.asarray, batch)
    spoiled = {row for row, _ in _nonfinite(np.asarray(apply(batch)), batch)}
    images = [image for image in _images(batch) if image[0] in spoiled]
    found = []
    for single, members in alone(batch, images):
        for row, _ in _nonfinite(np.asarray(apply(single)), single):
            found.append(batch.image_ids[members[row]])
    return np.array(found, np.uint32).reshape(-1, 2)


def alone(
    batch: PackedBatch, images: list[tuple[int, int]]
) -> Iterator[tuple[PackedBatch, list[tuple[int, int]]]]:
    """Repacks images alone: each in slot 0, at the start of a row, in the same shapes.

    Targets [B N ...] and [B L ...], and texts, go with their image; others stay.

    Args:
      batch: On the host.
      images: (row, slot) of each image to repack.

    Yields:
      A batch, its last rows empty if need be, and the (row, slot) that each row's image
      had.
    """
    B = len(batch.segment_ids)
    for start in range(0, len(images), B):
        members = images[start : start + B]

        def repack(path: Any, leaf: Any, members=members) -> Any:
            by_slot = _is_by_slot(path, leaf, batch)
            texts = batch.targets.get("text_segment_ids", batch.segment_ids)
            segments = texts if _is_text(path) else batch.segment_ids
            if not by_slot and leaf.shape[:2] != segments.shape:
                return leaf
            result = np.zeros_like(leaf)
            for new, (row, slot) in enumerate(members):
                own = leaf[row, [slot] if by_slot else segments[row] == slot + 1]
                result[new, : len(own)] = own
            return np.minimum(result, 1) if leaf is segments else result

        yield jax.tree_util.tree_map_with_path(repack, batch), members


def _replace(batch: Any, **leaves: Any) -> PackedBatch:
    return batch.replace(**leaves)


def _is_by_slot(path: Any, leaf: Any, batch: PackedBatch) -> bool:
    """Whether a leaf of the batch is [B N ...]; by name, as N may equal L."""
    by_token = path[0].name in ("patches", "coords", "segment_ids")
    return not (by_token or _is_text(path)) and leaf.shape[:2] == batch.image_mask.shape


def _is_text(path: Any) -> bool:
    return path[0].name == "targets" and path[-1].key.startswith("text_")


def _tell_apart(batch: PackedBatch) -> PackedBatch:
    """Adds an empty slot where N = L: outputs by slot and by token then differ."""
    if batch.image_mask.shape != batch.segment_ids.shape:
        return batch

    def widen(path: Any, leaf: Any) -> Any:
        by_slot = _is_by_slot(path, leaf, batch)
        return np.insert(leaf, leaf.shape[1], 0, axis=1) if by_slot else leaf

    return jax.tree_util.tree_map_with_path(widen, batch)


def _images(batch: PackedBatch) -> list[tuple[int, int]]:
    """(row, slot) of each image that owns a token."""
    return [
        (row, int(segment) - 1)
        for row, segments in enumerate(batch.segment_ids)
        for segment in np.unique(segments[segments > 0])
    ]


def _owners(output: np.ndarray, batch: PackedBatch) -> np.ndarray:
    """[B N 2] or [B L 2], (row, slot) of what owns each output; slot -1 is nobody."""
    B, L = batch.segment_ids.shape
    N = batch.image_mask.shape[1]
    if output.shape[:2] not in ((B, N), (B, L)):
        raise ValueError(f"apply gave {output.shape}; give [{B} {N} D] or [{B} {L} D]")
    slots = batch.segment_ids - 1
    if output.shape[1] == N:
        owned = [np.isin(np.arange(N), row) for row in slots]
        slots = np.where(owned, np.arange(N), -1)
    rows = np.broadcast_to(np.arange(B)[:, None], slots.shape)
    return np.stack([rows, slots], -1)


def _nonfinite(output: np.ndarray, batch: PackedBatch) -> list[tuple[int, int]]:
    """(row, slot) of each image with an output that is not finite."""
    bad = ~np.isfinite(output.astype(np.float32)).reshape(*output.shape[:2], -1).all(-1)
    owners = _owners(output, batch)
    places = np.unique(owners[bad & (owners[..., 1] >= 0)], axis=0)
    return [(int(row), int(slot)) for row, slot in places]


def _name(place: Any, batch: PackedBatch) -> str:
    row, slot = (int(value) for value in place)
    if slot < 0:
        return f"the padding of row {row}"
    source, index = batch.image_ids[row, slot]
    return f"row {row}, slot {slot} (image {index} of source {source})"


def _changed(
    batch: PackedBatch, row: int, slot: int, rng: np.random.Generator
) -> PackedBatch:
    """The batch with other content in one image, or with slot -1 in a row's padding."""
    tokens = batch.segment_ids[row] == slot + 1
    patches, coords, grids = (
        np.array(leaf) for leaf in (batch.patches, batch.coords, batch.grids)
    )
    own = patches[row, tokens]
    if own.dtype == np.uint8:
        patches[row, tokens] = own ^ rng.integers(1, 256, own.shape, np.uint8)
    else:
        patches[row, tokens] = rng.standard_normal(own.shape)
    shape = coords[row, tokens].shape
    coords[row, tokens] = rng.integers(0, max(int(batch.grids.max()), 1), shape)
    empty = ~np.isin(np.arange(grids.shape[1]) + 1, batch.segment_ids[row])
    grids[row, empty if slot < 0 else slot] += 1
    return _replace(batch, patches=patches, coords=coords, grids=grids)


def _compare_alone(
    run: Apply, batch: PackedBatch, packed: np.ndarray, tolerance: float
) -> float:
    owners, worst = _owners(packed, batch), 0.0
    for single, members in alone(batch, _images(batch)):
        output = np.asarray(run(single))
        places = _owners(output, single)
        for row, image in enumerate(members):
            reference = output[(places == (row, 0)).all(-1)].astype(np.float32)
            mine = packed[(owners == image).all(-1)].astype(np.float32)
            scale = np.abs(reference).max()
            difference = float(np.abs(mine - reference).max() / max(scale, 1e-30))
            if difference > tolerance:
                raise IsolationError(
                    f"{_name(image, batch)} differs from itself alone by "
                    f"{difference:.3g} of its largest value, more than {tolerance:g}"
                )
            worst = max(worst, difference)
    return worst


def _check_gradients(
    apply: Apply,
    batch: PackedBatch,
    images: list[tuple[int, int]],
    owners: np.ndarray,
    seed: int,
) -> None:
    patches = batch.patches
    if patches.dtype == np.uint8:
        patches = (patches / 127.5 - 1).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(patches, batch, mine):
        output = apply(_replace(batch, patches=patches)).astype(jnp.float32)
        weights = jax.random.normal(jax.random.key(seed), output.shape)
        mask = mine.reshape(*mine.shape, *(1,) * (output.ndim - 2))
        return jnp.where(mask, output * weights, 0).sum()

    for image in images:
        mine = (owners == image).all(-1)
        touched = np.asarray(gradient(patches, batch, mine))
        # NaN counts as touched.
        rows, tokens = np.nonzero((touched != 0).any(-1))
        for row, token in zip(rows, tokens, strict=True):
            place = (row, batch.segment_ids[row, token] - 1)
            if place != image:
                raise IsolationError(
                    f"the gradient of {_name(image, batch)} reaches "
                    f"{_name(place, batch)}"
                )
