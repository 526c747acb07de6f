"""Sets that TFDS prepared as array_record, read without TensorFlow."""

import dataclasses
import functools
import os
from typing import Any

import tensorflow_datasets as tfds_lib
from tensorflow_datasets.core import read_only_builder
from tensorflow_datasets.core.data_sources import base

from navit_jax.data.records import digest
from navit_jax.data.stored import Stored
from navit_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Tfds(Stored):
    """A split of a set that TFDS prepared as array_record in `folder`; see `tfds`."""

    split: str

    @functools.cached_property
    def _info(self) -> tfds_lib.core.DatasetInfo:
        builder = read_only_builder.builder_from_directory(
            self.folder, file_format="array_record"
        )
        return builder.info

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the ClassLabel; () without labels."""
        return self._class_names

    @functools.cached_property
    def _class_names(self) -> tuple[str, ...]:
        if self.label is None:
            return ()
        feature = _find_feature(self._info.features, self.label)
        if not isinstance(feature, tfds_lib.features.ClassLabel):
            raise ConfigError(
                f"label={self.label!r} of {self.name} is no ClassLabel but {feature}; "
                "name another feature or None"
            )
        return tuple(feature.names)

    @functools.cached_property
    def _instructions(self) -> list[tuple[str, int, int]]:
        found = base.file_instructions(self._info, self.split)  # pyright: ignore[reportArgumentType]
        return [(str(i.filename), i.skip, i.take) for i in found]

    def _parts(self) -> list[tuple[str, int, int]]:
        return self._instructions

    def fingerprint(self) -> str:
        """Of split, names and sizes of the files."""
        # No times: a prepared file is never edited, and a copy or a checkout has new
        # ones.
        sizes = [
            (os.path.basename(p), n, os.path.getsize(p)) for p, _, n in self._parts()
        ]
        return digest([self.split, self.image, *sizes])


def _find_feature(features: Any, path: str) -> Any:
    """The feature at "a/b" or None; a sequence stands for what it repeats."""
    for name in path.split("/"):
        features = getattr(features, "feature", features)
        if not isinstance(features, tfds_lib.features.FeaturesDict):
            return None
        if name not in features:
            return None
        features = features[name]
    return getattr(features, "feature", features)


def tfds(
    dataset: str,
    split: str,
    data_dir: str | None = None,
    image: str = "image",
    label: str | None = "label",
    caption: str | None = None,
    key: str | None = None,
) -> Tfds:
    """Opens a TFDS set that was prepared as array_record.

    Args:
      dataset: As TFDS writes it: "imagenet2012", "name/config", "name/config:1.0.0".
      split: As TFDS writes it: "train", "train[:90%]", "train+validation".
      data_dir: Where TFDS prepared it; None: ~/tensorflow_datasets.
      image: The feature with the picture; "a/b" for a nested one.
      label: A ClassLabel or a sequence of them; None: without labels.
      caption: A text feature.
      key: A text feature that names the record, such as "file_name".

    Raises:
      ConfigError: it is not prepared, or not as array_record (with the command that
        does it), or has no such split or feature, or is empty.
    """
    where = f" --data_dir={data_dir}" if data_dir else ""
    data_dir = data_dir or "~/tensorflow_datasets"
    command = f"`tfds build {dataset} --file_format=array_record{where}`"
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds_lib.core.DatasetNotFoundError as error:
        raise ConfigError(
            f"dataset={dataset!r} is not prepared in {data_dir}; {command} prepares it "
            "(docs/data.md)"
        ) from error
    folder, info = str(builder.data_dir), builder.info
    features: Any = info.features
    formats = [info.file_format, *info.alternative_file_formats]
    if "array_record" not in [f.value for f in formats if f]:
        raise ConfigError(
            f"dataset={dataset!r} in {folder} is prepared as "
            f"{', '.join(f.value for f in formats if f)}, which has no random access: "
            f"{command} prepares it anew, `tfds convert_format --dataset_version_dir="
            f"{folder} --out_file_format=array_record` converts it (docs/data.md)"
        )
    for field, feature in {
        "image": image,
        "label": label,
        "caption": caption,
        "key": key,
    }.items():
        if feature is not None and _find_feature(features, feature) is None:
            raise ConfigError(
                f"{field}={feature!r}: {dataset} has only {sorted(features)}"
            )
    source = Tfds(f"{dataset}/{split}", folder, image, label, caption, key, split)
    try:
        empty = not len(source)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"split={split!r} of {dataset}: {error}; it has {sorted(info.splits)}"
        ) from error
    if empty:
        raise ConfigError(f"split={split!r} of {dataset} is empty")
    lacking = [p for p, _, _ in source._parts() if not os.path.exists(p)]
    if lacking:
        raise ConfigError(f"{dataset} lacks {len(lacking)} files, first {lacking[0]}")
    _ = source.class_names
    return source
