"""Sets that TFDS prepared as array_record, read without TensorFlow."""

import os
from typing import Any

import tensorflow_datasets as tfds_lib
from tensorflow_datasets.core import constants, read_only_builder
from tensorflow_datasets.core.data_sources import base

from navit_jax.data.records import digest
from navit_jax.data.stored import Stored
from navit_jax.errors import ConfigError


def tfds(
    dataset: str,
    split: str,
    data_dir: str | None = None,
    image: str = "image",
    label: str | None = "label",
    caption: str | None = None,
    key: str | None = None,
    mask: str | None = None,
    num_classes: int = 0,
) -> Stored:
    """Opens a TFDS set that was prepared as array_record.

    Args:
      dataset: As TFDS writes it: "imagenet2012", "name/config", "name/config:1.0.0".
      split: As TFDS writes it: "train", "train[:90%]", "train+validation".
      data_dir: Where TFDS prepared it; None: $TFDS_DATA_DIR, or else
        ~/tensorflow_datasets.
      image: The feature with the picture; "a/b" for a nested one.
      label: A ClassLabel or a sequence of them; None: without labels.
      caption: A text feature or a sequence of them, such as "captions/text".
      key: A text feature that names the record, such as "file_name".
      mask: An image feature, the PNG of `masks.read_mask`, such as "annotation".
      num_classes: Of the mask, where no label names them: they are called by number.

    Raises:
      ConfigError: it is not prepared, or not as array_record (with the command that
        does it), or has no such split or feature, or is empty.
    """
    data_dir = os.path.expanduser(data_dir or constants.DATA_DIR)
    command = f"`tfds build {dataset} --file_format=array_record --data_dir={data_dir}`"
    try:
        builder = read_only_builder.builder_from_files(dataset, data_dir=data_dir)
    except tfds_lib.core.DatasetNotFoundError as error:
        raise ConfigError(
            f"dataset={dataset!r} is not prepared in {data_dir}; {command} prepares it "
            "(docs/data.md)"
        ) from error
    folder, info = str(builder.data_dir), builder.info
    formats = [f.value for f in (info.file_format, *info.alternative_file_formats) if f]
    if "array_record" not in formats:
        raise ConfigError(
            f"dataset={dataset!r} in {folder} is prepared as {', '.join(formats)}, "
            f"which has no random access: {command} prepares it anew, "
            f"`tfds convert_format --dataset_version_dir={folder} "
            "--out_file_format=array_record` converts it (docs/data.md)"
        )
    names = image, label, caption, key, mask
    return open_folder(f"{dataset}/{split}", folder, split, *names, num_classes)


def open_folder(
    name: str,
    folder: str,
    split: str,
    image: str,
    label: str | None,
    caption: str | None,
    key: str | None,
    mask: str | None = None,
    num_classes: int = 0,
) -> Stored:
    """Opens the folder of one version of a set; the arguments are those of `tfds`."""
    if num_classes and (label is not None or mask is None):
        raise ConfigError(
            f"num_classes={num_classes} of {name} is for a mask without a label: give "
            "mask=..., and label=None"
        )
    info: Any = read_only_builder.builder_from_directory(folder).info
    # A converted set still calls tfrecord its format.
    info.set_file_format("array_record", override=True, override_if_initialized=True)
    wanted = {"image": image, "label": label, "caption": caption, "key": key}
    wanted["mask"] = mask
    features = _list_features(info.features)
    for field, feature in wanted.items():
        if feature is not None and feature not in features:
            raise ConfigError(f"{field}={feature!r}: {name} has only {[*features]}")
    try:
        found = base.file_instructions(info, split)  # pyright: ignore[reportArgumentType]
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"split={split!r} of {folder}: {error}; it has {sorted(info.splits)}"
        ) from error
    parts = tuple((str(i.filename), i.skip, i.take) for i in found)
    if not sum(number for _, _, number in parts):
        raise ConfigError(f"split={split!r} of {folder} is empty")
    lacking = [path for path, _, _ in parts if not os.path.exists(path)]
    if lacking:
        raise ConfigError(f"{name} lacks {len(lacking)} files, first {lacking[0]}")
    # No times: a prepared file is never edited, and a copy or a checkout has new ones.
    files = [(os.path.basename(path), n, os.path.getsize(path)) for path, _, n in parts]
    return Stored(
        name=name,
        folder=folder,
        parts=parts,
        **wanted,
        class_names=_class_names(features, name, label)
        or tuple(map(str, range(num_classes))),
        stamp=digest([split, image, *files]),
    )


def _class_names(
    features: dict[str, Any], name: str, label: str | None
) -> tuple[str, ...]:
    """The names of the ClassLabel `label`; () without labels."""
    if label is None:
        return ()
    feature = features[label]
    if not isinstance(feature, tfds_lib.features.ClassLabel):
        raise ConfigError(
            f"label={label!r} of {name} is no ClassLabel but {feature}; name another "
            "feature or None"
        )
    return tuple(feature.names)


def _list_features(feature: Any, path: str = "") -> dict[str, Any]:
    """Features by path, "a/b" if nested; a sequence stands for what it repeats."""
    feature = getattr(feature, "feature", feature)
    if not isinstance(feature, tfds_lib.features.FeaturesDict):
        return {path: feature}
    found = {}
    for part in sorted(feature):
        found |= _list_features(feature[part], f"{path}/{part}".lstrip("/"))
    return found
