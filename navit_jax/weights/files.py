"""Reads the tensors of a checkpoint: safetensors, npz, ONNX. Never a pickle."""

import json
import pathlib
import shlex
import zipfile
from typing import Any

import numpy as np

from navit_jax.errors import ConfigError

Tensors = dict[str, np.ndarray]

# Parts of the program that makes safetensors of a pickle; double quotes alone, since a
# shell has single ones around it.
IMPORTS = "import sys, torch; from safetensors.torch import save_file"
LOAD = 'torch.load(sys.argv[1], map_location="cpu", weights_only=True)'
# As OpenAI distributes CLIP.
LOAD_SCRIPT = 'torch.jit.load(sys.argv[1], map_location="cpu").state_dict()'
UNWRAP = (
    'd = next((d[k] for k in ("state_dict", "model_state_dict", "model", "module") '
    "if isinstance(d.get(k), dict)), d)"
)
# Copies share no memory, which a file of safetensors refuses.
SAVE = (
    'save_file({k.removeprefix("module."): v.detach().contiguous().clone() '
    "for k, v in d.items() if torch.is_tensor(v)}, sys.argv[2])"
)


def read_tensors(path: pathlib.Path) -> Tensors:
    """The tensors of a file by name, float32 where they are floats.

    Args:
      path: A file, or a folder with `model.safetensors` or its index of several files.

    Raises:
      ConfigError: it is missing, no such file, or a pickle.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    _refuse_pickles(path)
    reader = READERS.get(path.suffix)
    if reader is None:
        raise ConfigError(f"{path}: give one of {', '.join(READERS)}, or a folder")
    try:
        tensors = reader(path)
    except ImportError as error:
        raise ConfigError(
            f"{path}: {error.name} is not installed: pip install 'navit_jax[weights]'"
        ) from error
    return {name: _as_float32(value) for name, value in tensors.items()}


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """What `config.json` and `preprocessor_config.json` beside the file say; or {}."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "open_clip_config.json", "config.json"):
        if (folder / name).is_file():
            found |= json.loads((folder / name).read_text())
    return found


def _read_folder(folder: pathlib.Path) -> Tensors:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_tensors(folder / "model.safetensors")
    files = set(json.loads(index.read_text())["weight_map"].values())
    tensors: Tensors = {}
    for name in sorted(files):
        tensors |= read_tensors(folder / pathlib.Path(name).name)
    return tensors


def _as_float32(value: np.ndarray) -> np.ndarray:
    # bfloat16 is of kind "V" to numpy.
    return value.astype(np.float32) if value.dtype.kind in "fV" else value


def _refuse_pickles(path: pathlib.Path) -> None:
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80"
    load = LOAD
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name.rpartition("/")[-1] for name in archive.namelist()]
        pickled |= any(name.endswith(".pkl") for name in names)
        load = LOAD_SCRIPT if "constants.pkl" in names else LOAD
    if pickled:
        program = f"{IMPORTS}; d = {load}; {UNWRAP}; {SAVE}"
        words = ["python", "-c", program, str(path)]
        command = shlex.join([*words, str(path.with_suffix(".safetensors"))])
        raise ConfigError(
            f"{path} is a pickle, which runs code when it is read. Where you trust it, "
            f"and torch and safetensors are installed:\n{command}"
        )


def _read_safetensors(path: pathlib.Path) -> Tensors:
    import safetensors.numpy

    return safetensors.numpy.load_file(path)


def _read_npz(path: pathlib.Path) -> Tensors:
    with np.load(path, allow_pickle=False) as file:
        try:
            return {name: file[name] for name in file.files}
        except ValueError as error:
            raise ConfigError(f"{path}: an array of objects is a pickle") from error


def _read_onnx(path: pathlib.Path) -> Tensors:
    """Initialisers by their names; the exporter's own names by what reads them.

    An exporter folds transposes: the weight of a product is stored (in, out), named
    `onnx::MatMul_12`. It comes back as (out, in) with the name of its module, which
    the node still has. So does a table of positions, whose first entry may be apart.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    found = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    tensors = {k: v for k, v in found.items() if not k.startswith("onnx::")}
    tables: dict[str, list[np.ndarray]] = {}
    for node in graph.node:
        module = ".".join(node.name.split("/")[1:-1])
        for name in node.input:
            if not name.startswith("onnx::") or name not in found:
                continue
            if node.op_type == "MatMul":
                tensors[f"{module}.weight"] = found[name].T
            elif module.endswith("embeddings"):
                tables.setdefault(module, []).append(found[name])
            else:
                tensors[name] = found[name]
    for module, parts in tables.items():
        parts.sort(key=lambda part: part.shape[1])
        tensors[f"{module}.position_embeddings"] = np.concatenate(parts, 1)
    return tensors


READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".onnx": _read_onnx}
