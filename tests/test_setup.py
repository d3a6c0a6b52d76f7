"""Set-up: if this fails, two installations of the same version compute with other packages."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from sysconfig import get_path

from tests.conftest import ROOT

# torch's range stands in pyproject.toml, and its CUDA builds bring packages of their own.
FREE = re.compile(r"torch|triton|nvidia-.*|cuda-.*|esm-ledger|pip")


def normalised(name: str) -> str:
    """Return a package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Return the versions that constraints.txt allows, by package."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {normalised(name): version for name, version in pairs}


def here() -> Iterable[Distribution]:
    """Return what is installed beside torch: Ray brings packages in a folder that it adds."""
    return distributions(path=sorted({get_path("purelib"), get_path("platlib")}))


def test_every_installed_package_has_the_version_that_is_pinned() -> None:
    installed = {normalised(one.name): one.version for one in here()}
    pinned = pins()
    free = {name for name in installed if FREE.fullmatch(name)}
    assert {"torch", "esm-ledger"} <= free
    others = {name: version for name, version in installed.items() if name not in free}
    assert others == {name: pinned.get(name) for name in others}


def test_what_the_pages_tell_to_install_is_pinned() -> None:
    told = (ROOT / "README.md").read_text() + (ROOT / "docs" / "reading.md").read_text()
    lines = re.findall(r"pip install -c constraints.txt ([^`]+)`", told)
    lines += re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "install.md").read_text(), re.M)
    names = {name for line in lines for name in line.split()}
    assert {"polars", "peft"} < names
    assert names - pins().keys() == {"ipykernel"}  # as the page says


def test_every_pin_is_of_a_package_that_is_installed() -> None:
    elsewhere = {"duckdb-extension-sqlite-scanner", "setuptools"}  # by platform, by torch's build
    installed = {normalised(one.name) for one in here()}
    assert set(pins()) - installed <= elsewhere
