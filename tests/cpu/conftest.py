"""What tests of tests/cpu share: the host engine, and kernels compiled for the CPU.

Kernels are kept from run to run.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from pathlib import Path

import pytest
from emulator.build import Toolchain

# "auto" would be the cuda engine on a machine with GPUs. Here, before any test reads the settings.
os.environ["EPCOMM_ENGINE"] = "host"

#: How long compiled kernels are kept.
KEPT_S = 24 * 3600


@pytest.fixture(scope="session")
def cache(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder where the emulator's kernels stay from run to run."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the emulator's fibers need g++ and an x86-64 processor")
    # Without the plugin cacheprovider there is no such attribute.
    if getattr(pytestconfig, "cache", None) is None:
        return tmp_path_factory.mktemp("emulator")
    folder = Path(pytestconfig.cache.mkdir("emulator"))
    for library in folder.glob("*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - library.stat().st_mtime > KEPT_S:
                library.unlink()
    return folder


@pytest.fixture(scope="session")
def toolchain(cache: Path) -> Toolchain:
    """Return what compiles and launches kernels."""
    return Toolchain(cache)
