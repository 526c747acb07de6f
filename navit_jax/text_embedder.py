"""Embeds lists of texts by the text tower of a run.

M texts or images, B rows, N slots, C classes, E embedding width.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float32

from navit_jax import experiment, sharding, zero_shot
from navit_jax.data.texts import pack_alone
from navit_jax.data.tokenizer import Tokenizer
from navit_jax.errors import ConfigError

# Rows that a device takes at once.
ROWS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class TextEmbedder:
    """A task's text tower on the devices of a mesh; compiled once.

    Attributes:
      task: With `embed_text`.
      tokenizer: Of the run.
      tokens: Of a row.
      slots: Texts of a row at most.
      mesh: Rows are split over its devices.
    """

    task: Any
    tokenizer: Tokenizer
    tokens: int
    slots: int
    mesh: Mesh

    def embed(
        self, params: Any, texts: Sequence[str]
    ) -> tuple[Float32[np.ndarray, "M E"], Bool[np.ndarray, " M"]]:
        """The embeddings, of length 1, and whether the tokenizer knows the text.

        Of a text that it leaves out, as one of blanks, the embedding is zeros.
        """
        rows = pack_alone(texts, self.tokenizer, self.tokens, self.slots)
        shards = math.prod(self.mesh.shape[axis] for axis in sharding.ROWS)
        wanted = -(-max(len(rows.tokens), 1) // shards)
        size = shards * min(2 ** math.ceil(math.log2(wanted)), ROWS)
        own = sharding.local_rows(self.mesh, size)
        found = []
        with jax.set_mesh(self.mesh):
            # Of no text too: its width is asked for.
            for start in range(0, max(len(rows.tokens), 1), size):
                whole = [_part(array, start, size)[own] for array in rows[:3]]
                placed = sharding.place(whole, self.mesh)
                found.append(jax.device_get(self._embed(params, *placed)))
        row, slot = np.where(rows.known[:, None], rows.places, 0).T
        vectors = np.concatenate(found)[row, slot]
        return np.where(rows.known[:, None], vectors, 0), rows.known

    def embed_all(
        self, params: Any, texts: Sequence[str]
    ) -> Float32[np.ndarray, "M E"]:
        """The embeddings of texts that all have to be known.

        Raises:
          ValueError: `texts` is no list of texts, or the tokenizer leaves one out.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            raise ValueError(f"texts={str(texts)[:100]!r}: give a list of texts")
        for place, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"texts[{place}]={str(text)[:100]}, {type(text).__name__}: "
                    "give a list of texts, as ['a dog']"
                )
        found, known = self.embed(params, texts)
        if not known.all():
            place = int(known.argmin())
            raise ValueError(
                f"texts[{place}]={texts[place][:100]!r} can not be used: the run's "
                "tokenizer finds nothing in it"
            )
        return found

    def embed_classes(
        self, params: Any, classes: Sequence[str], templates: Sequence[str]
    ) -> Float32[np.ndarray, "C E"]:
        """What classes are by their names in all templates; raises as `embed_all`."""
        prompts = zero_shot.list_prompts(classes, templates)
        return zero_shot.average_prompts(self.embed_all(params, prompts), len(classes))

    def compare(
        self,
        params: Any,
        images: Float32[np.ndarray, "M E"],
        texts: Float32[np.ndarray, "C E"],
    ) -> Float32[np.ndarray, "M C"]:
        """The task's probabilities of texts, by image."""
        return np.asarray(
            self.task.probabilities(params, jnp.asarray(images @ texts.T))
        )

    @functools.cached_property
    def _embed(self) -> Any:
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        embed = functools.partial(self.task.embed_text, num_slots=self.slots)
        return jax.jit(embed, out_shardings=everywhere)


def open_embedder(config: Mapping[str, Any], task: Any, mesh: Mesh) -> TextEmbedder:
    """The text tower of a config's task.

    Raises:
      ConfigError: the task has none.
    """
    if not hasattr(task, "embed_text"):
        raise ConfigError(
            f"the task {config['task']['name']!r} of this run has no text tower; "
            "texts need one of name 'contrastive', or 'bootstrapping' with task.text"
        )
    tokens, tokenizer = experiment.open_text(config)
    return TextEmbedder(task, tokenizer, tokens, config["data"]["slots"], mesh)


def _part(array: np.ndarray, start: int, size: int) -> np.ndarray:
    """Some rows; beyond the last they are empty."""
    part = array[start : start + size]
    return np.pad(part, [(0, size - len(part)), *[(0, 0)] * (array.ndim - 1)])
