"""Takes tensors of a layout from a file, as our parameters.

Shapes: D width, h w sides of the grid of positions, n entries of it.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from navit_jax.errors import ConfigError
from navit_jax.initialise import Origin, format_table
from navit_jax.weights import official
from navit_jax.weights.axes import to_ours
from navit_jax.weights.files import Tensors
from navit_jax.weights.layouts import Layout
from navit_jax.weights.sections import find_heads, guess_heads

LEAVES = {
    "norm": {"scale": "weight", "bias": "bias"},
    "plain": {"": ""},
    "rows": {"": ""},
    "table": {"": ""},
    "pairs": {"": ""},
    "module": {"kernel": "weight", "bias": "bias"},
}


class Reader:
    """Takes the tensors of one file one by one, and tells what is left.

    Attributes:
      origins: Of what was taken so far.
      guessed: Whether neither the tensors nor the config say the number of heads.
    """

    def __init__(
        self,
        tensors: Tensors,
        layout: Layout,
        prefix: str,
        config: Mapping[str, Any],
    ):
        self.origins: list[Origin] = []
        self.guessed = False
        self._tensors, self._layout, self._prefix = tensors, layout, prefix
        self._used: set[str] = set()
        self._aside: set[str] = set()
        self._config = config

    def beside(
        self, layout: Layout, prefix: str, config: Mapping[str, Any]
    ) -> "Reader":
        """A reader of another part of the file; what both take is taken."""
        other = Reader(self._tensors, layout, prefix, config)
        other.origins, other._used = self.origins, self._used
        return other

    def collect(self, grid: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """All parameters by our paths."""
        layout = self._layout
        norm, _ = layout.parts["blocks/norm_1"]
        first = self._prefix + norm + ("/scale" if layout.flax else ".weight")
        depth = 0
        while first.format(depth) in self._tensors:
            depth += 1
        # All of a SparseFormer's first version have 64 heads, of the second 64 wide.
        num_heads = official.num_heads(self._tensors)
        if layout.positions or layout.root != "encoder":
            num_heads = self._find_heads(depth)
        found = {}
        for module, (theirs, how) in layout.parts.items():
            leaves = LEAVES.get(how, LEAVES["module"])
            for leaf, suffix in leaves.items():
                name = self._join(theirs, leaf if layout.flax else suffix)
                blocks = range(depth) if "{}" in name else (None,)
                names = [name if i is None else name.format(i) for i in blocks]
                missing = [n for n in names if n not in self._tensors]
                if missing and len(missing) < len(names):
                    raise ConfigError(f"{missing[0]} is missing; other blocks have it")
                if missing:
                    continue
                values = [
                    to_ours(
                        self._tensors[n], how, leaf == "kernel", num_heads, layout.flax
                    )
                    for n in names
                ]
                value = np.stack(values) if "{}" in name else values[0]
                where = "" if module.split("/")[0] in HEADS else f"{layout.root}/"
                self._take(found, f"{where}{module}/{leaf}".rstrip("/"), value, names)
        self._fit_head(found)
        if layout.positions:
            self._split_positions(found, grid)
        return found

    def take_scalar(self, found: dict[str, np.ndarray], ours: str, name: str) -> None:
        """Adds a parameter without axes to those found."""
        self._take(found, ours, self._tensors[name].reshape(()), [name])

    def record_unused(self) -> None:
        """Puts what is left over among the origins."""
        for name, value in self._tensors.items():
            if name not in self._used:
                shape = tuple(value.shape)
                self.origins.append(Origin(name, "unused", name, shape))

    def refuse_unused(self, allowed: Sequence[str], path: str) -> None:
        """Looks at what is left over.

        Raises:
          ConfigError: it is of the encoder, and neither allowed nor without effect.
        """
        unused = [name for name in self._tensors if name not in self._used]
        patterns = [
            *(re.escape(self._prefix) + each for each in self._layout.ignored),
            *allowed,
        ]
        refused = [
            name
            for name in unused
            if name.startswith(self._prefix)
            and name not in self._aside
            and not any(re.fullmatch(pattern, name) for pattern in patterns)
        ]
        if refused:
            raise ConfigError(
                f"{path}: {len(refused)} tensors of the encoder are not used: "
                f"{', '.join(refused)}.\n{format_table(self.origins)}\nThe model would "
                "not be the same without them; list them in allow_unused if it may"
            )

    def _join(self, theirs: str, suffix: str) -> str:
        """The name in the file; a head may be outside of the encoder's prefix."""
        between = "/" if self._layout.flax else "."
        if not suffix or theirs.endswith("_"):
            between = ""
        name = f"{theirs}{between}{suffix}"
        if self._prefix + name not in self._tensors and name in self._tensors:
            return name
        return self._prefix + name

    def _find_heads(self, depth: int) -> int:
        parts, flax = self._layout.parts, self._layout.flax
        leaf = "kernel" if flax else "weight"
        query = self._tensors.get(
            self._join(parts["blocks/attention/query"][0], leaf).format(0)
        )
        if query is not None and flax and query.ndim == 3:
            return query.shape[1]
        up = self._tensors[self._join(parts["blocks/mlp/up"][0], leaf).format(0)]
        out, width = up.shape[::-1] if flax else up.shape
        num_heads = find_heads(self._config, width)
        self.guessed = num_heads is None
        images = self._layout.root == "encoder"
        if num_heads is None:
            # All of CLIP's towers of texts have heads of 64.
            num_heads = guess_heads(width, depth if images else 0, out)
        if width % num_heads:
            where = (
                "--set num_heads=..." if images else "text_cfg.heads beside the file"
            )
            raise ConfigError(
                f"{num_heads} heads{' (a guess)' if self.guessed else ''} do not divide"
                f" the width {width}: give their number ({where})"
            )
        return num_heads

    def _take(
        self,
        found: dict[str, np.ndarray],
        ours: str,
        value: np.ndarray,
        names: Sequence[str],
    ) -> None:
        found[ours] = np.ascontiguousarray(value)
        self._used.update(names)
        source = names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"
        source = f"{source} {tuple(self._tensors[names[0]].shape)}"
        self.origins.append(Origin(ours, "loaded", source, tuple(value.shape)))

    def _fit_head(self, found: dict[str, np.ndarray]) -> None:
        """Leaves a head on other vectors aside; one without bias is a projection."""
        kernel = found.get("head/dense/kernel")
        if kernel is None:
            return
        width = len(found["encoder/norm/scale"])
        # vit_jax's layer between the class token and the classes of ImageNet-21k.
        between = f"{self._prefix}pre_logits/kernel" in self._tensors
        if between or len(kernel) != width:
            for origin in [o for o in self.origins if o.name.startswith("head/")]:
                del found[origin.name]
                self.origins.remove(origin)
                self._aside.add(origin.source.split(" ")[0])
            self._used -= self._aside
        elif "head/dense/bias" not in found:
            ours = "image_head" if self._layout.positions else "encoder/projection"
            found[f"{ours}/kernel"] = found.pop("head/dense/kernel")

    def _split_positions(
        self, found: dict[str, np.ndarray], grid: Sequence[int] | None
    ) -> None:
        """Puts the table on its grid, and adds to other tokens what it has for them."""
        name = self._prefix + self._layout.positions
        if name not in self._tensors:
            raise ConfigError(
                f"{name} is missing: only learned tables of positions can be read"
            )
        table = self._tensors[name]
        table = table.reshape(-1, table.shape[-1])
        special = []
        if (cls := self._prefix + self._layout.class_token) in self._tensors:
            token = self._tensors[cls].reshape(1, -1)
            self._take(found, "encoder/class_token", token, [cls])
            special.append("encoder/class_token")
        if "encoder/registers" in found:
            special.append("encoder/registers")
        sizes = [0, *itertools.accumulate(len(found[each]) for each in special)]
        extra, (rows, columns) = _fit_grid(
            len(table), sizes, grid or self._grid(), name
        )
        used = 0
        for each in special[: sizes.index(extra)]:
            size = len(found[each])
            # As they are added, before anything is computed with either.
            found[each] = found[each] + table[used : used + size]
            used += size
        places = table[extra:].reshape(rows, columns, -1)
        self._take(found, "encoder/position_embedding/table", places, [name])

    def _grid(self) -> Sequence[int] | None:
        config = self._config
        config = {**config, **config.get("vision_config", {})}
        side, pixels = config.get("patch_size"), config.get("image_size")
        if not side or not pixels:
            return None
        pixels = pixels if isinstance(pixels, Sequence) else (pixels, pixels)
        return [each // side for each in pixels]


HEADS = ("head", "image_head", "text_head")


def _fit_grid(
    num: int, extras: Sequence[int], grid: Sequence[int] | None, name: str
) -> tuple[int, tuple[int, int]]:
    for extra in extras:
        side = round((num - extra) ** 0.5)
        rows, columns = grid or (side, side)
        if rows * columns == num - extra:
            return extra, (rows, columns)
    given = f"the grid {tuple(grid)}" if grid else "no square"
    raise ConfigError(
        f"{name} has {num} entries, with those of {', '.join(map(str, extras))} other "
        f"tokens {given}: give grid=(rows, columns)"
    )
