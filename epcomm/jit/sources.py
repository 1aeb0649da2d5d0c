"""Where the CUDA sources are, and a hash of all of them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from epcomm.errors import CompileError


@cache
def source_dir() -> Path:
    """Return the folder of the CUDA sources: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "kernels").is_dir():
            return folder
    raise CompileError(
        f"no CUDA sources in {package / 'cuda_src'} or {package.parent / 'cuda_src'}; the "
        "installation is incomplete: pip install --force-reinstall epcomm."
    )


@cache
def source_hash() -> str:
    """Return a hash of all sources, headers included."""
    digest = hashlib.sha256()
    for path in sorted(source_dir().rglob("*.cu*")):
        digest.update(str(path.relative_to(source_dir())).encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
