"""Installs navit_jax: `pip install -e .[test]`; `make test` does it for you."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "navit_jax/__init__.py").read_text(),
    re.MULTILINE,
)
assert VERSION, "navit_jax/__init__.py must set __version__"

# Ranges, not pins: what the code needs. requirements.txt holds the exact set that
# the tests ran with (`make lock`).
REQUIRE = [
    "jax>=0.10.2,<0.12",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorflow-datasets>=4.9.10",
    "array-record>=0.8.3",
    "grain>=0.2.18",
    "ml-collections>=1.1",
    "chex>=0.1.92",
    "clu>=0.0.12",
    "numpy>=2.1",
    "scipy>=1.14",
    "jaxtyping>=0.3",
    "pillow>=11",
    "tensorboardX>=2.6",
    "matplotlib>=3.9",
    "tqdm>=4.66",
]

# JPEGs are decoded and resized by these where they are installed (docs/data.md).
FAST = ["simplejpeg>=1.9", "opencv-python-headless>=4.10"]

# Captions are made tokens by these; nothing else needs them (docs/data.md).
TEXT = ["sentencepiece>=0.2.1", "tokenizers>=0.21"]

# Other people's checkpoints are read with these (docs/weights.md).
WEIGHTS = ["safetensors>=0.5", "onnx>=1.17", "onnxruntime>=1.20"]

EXTRAS = {
    "tpu": ["jax[tpu]"],
    "gpu": ["jax[cuda13]"],
    "fast": FAST,
    # RandAugment of the SparseFormer recipe; brings torch.
    "augment": ["timm>=1.0"],
    "text": TEXT,
    "weights": WEIGHTS,
    # What the tests compare the readers of checkpoints with; they skip without it.
    "parity": [
        *WEIGHTS,
        "torch>=2.4",
        "timm>=1.0.9",
        "transformers>=4.50",
        "open_clip_torch>=2.30",
    ],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "beartype>=0.20",
        "hypothesis>=6.120",
        "psutil>=6",
        "ruff>=0.9",
        "basedpyright>=1.28",
        *FAST,
        *TEXT,
        *WEIGHTS,
    ],
}

setuptools.setup(
    name="navit_jax",
    version=VERSION.group(1),
    description="Trains vision transformers on images of any size and shape, in JAX.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["navit_jax", "navit_jax.*"]),
    package_data={"navit_jax": ["data/clipart/**/*", "data/clipart.model", "py.typed"]},
    install_requires=REQUIRE,
    extras_require=EXTRAS,
)
