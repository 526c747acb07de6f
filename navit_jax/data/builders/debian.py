"""Fetches and unpacks packages of Debian, which serves one version at a time."""

import pathlib
import shutil
import subprocess
from collections.abc import Sequence

from navit_jax.errors import ConfigError


def fetch(names: Sequence[str], folder: pathlib.Path, flag: str) -> None:
    """Downloads packages into `folder` with apt-get; nothing is installed.

    Args:
      flag: Of the command, that takes what was got elsewhere.

    Raises:
      ConfigError: there is no apt-get, or it failed.
    """
    pages = ", ".join(f"https://packages.debian.org/{name}" for name in names)
    remedy = f"Get {', '.join(n + '_*.deb' for n in names)} from {pages}: {flag}"
    if not shutil.which("apt-get"):
        raise ConfigError(f"apt-get is not on this machine. {remedy}")
    folder.mkdir(parents=True, exist_ok=True)
    command = ["apt-get", "download", *names]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise ConfigError(
            f"`{' '.join(command)}` failed: {result.stderr.strip()[-500:]}\n"
            f"Try `apt-get update` first. {remedy}"
        )


def find(names: Sequence[str], folder: pathlib.Path) -> list[pathlib.Path]:
    """The package files in `folder`, in the order of the names; [] if one lacks."""
    found = [sorted(folder.glob(f"{name}_*.deb")) for name in names]
    return [files[-1] for files in found] if all(found) else []


def unpack(packages: Sequence[pathlib.Path], folder: pathlib.Path) -> None:
    """Unpacks package files below `folder`.

    Raises:
      ConfigError: there is no dpkg-deb, or a package is broken.
    """
    if not shutil.which("dpkg-deb"):
        raise ConfigError("dpkg-deb is not on this machine; install dpkg")
    for package in packages:
        command = ["dpkg-deb", "-x", str(package), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ConfigError(
                f"{package} is broken: {result.stderr.strip()}\n"
                "Remove it and run the command again"
            )
