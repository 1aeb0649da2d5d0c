"""What the tests of emulated kernels share: kernels compiled for the CPU, kept from run to run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from emulator.build import Toolchain

#: How long compiled kernels are kept.
KEPT_S = 24 * 3600


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where compiled kernels stay from run to run."""
    if pytestconfig.cache is None:
        return tmp_path_factory.mktemp("emulator")
    folder = Path(pytestconfig.cache.mkdir("emulator"))
    for library in folder.glob("*.so"):
        if time.time() - library.stat().st_mtime > KEPT_S:
            library.unlink()
    return folder


@pytest.fixture(scope="session")
def toolchain(cache: Path) -> Toolchain:
    """Return what compiles and launches kernels."""
    return Toolchain(cache)
