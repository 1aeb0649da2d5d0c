"""Engines move rows; each fulfils `epcomm.engines.base.Engine`. Here one is chosen."""

from __future__ import annotations

from epcomm.errors import UnsupportedConfig
from epcomm.gpus import find_num_gpus


def choose_engine(wanted: str) -> str:
    """Return the engine, ``"host"`` or ``"cuda"``, that a name of ``env.ENGINES`` stands for here.

    ``"auto"`` is the cuda engine where CuPy finds a GPU.

    Args:
        wanted: The name.

    Raises:
        UnsupportedConfig: It is ``"cuda"``, and there is no GPU.
    """
    if wanted == "auto":
        return "cuda" if find_num_gpus() else "host"
    if wanted == "cuda" and not find_num_gpus():
        raise UnsupportedConfig(
            "engine='cuda' found no GPU that CuPy can use; install 'epcomm[cuda12]' or "
            "'epcomm[cuda13]' where there is one (python -m epcomm info tells what was found), or "
            "use engine='host' with CPU arrays."
        )
    return wanted
