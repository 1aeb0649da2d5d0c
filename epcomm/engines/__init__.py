"""Engines move rows; each fulfils `epcomm.engines.base.Engine`. Here one is chosen."""

from __future__ import annotations

from epcomm import env
from epcomm.errors import InvalidArgument, UnsupportedConfig
from epcomm.gpus import find_num_gpus


def choose_engine(wanted: str, num_nodes: int = 1) -> str:
    """Return the engine, ``"host"`` or ``"cuda"``, that a name of ``env.ENGINES`` stands for here.

    ``"auto"`` is the cuda engine where CuPy finds a GPU and the group is on one node.

    Args:
        wanted: The name.
        num_nodes: Nodes of the group.

    Raises:
        InvalidArgument: It is no such name.
        UnsupportedConfig: It is ``"cuda"``, and there is no GPU.
    """
    if wanted not in env.ENGINES:
        raise InvalidArgument(f"engine is {wanted!r}; it must be one of {', '.join(env.ENGINES)}.")
    if wanted == "auto":
        return "cuda" if num_nodes == 1 and find_num_gpus() else "host"
    if wanted == "cuda" and not find_num_gpus():
        raise UnsupportedConfig(
            "engine='cuda' found no GPU that CuPy can use; install 'epcomm[cuda12]' or "
            "'epcomm[cuda13]' where there is one (python -m epcomm info tells what was found), or "
            "use engine='host' with CPU arrays."
        )
    return wanted


def is_staged(wanted: str, num_nodes: int, device: int | None) -> bool:
    """Return whether the host engine's arrays are on a GPU and copied through host memory.

    They are where the caller names the GPU, and where several nodes alone keep ``"auto"`` from
    being the cuda engine.

    Args:
        wanted: One of ``env.ENGINES``.
        num_nodes: Nodes of the group.
        device: The GPU that the caller names, or None.
    """
    if choose_engine(wanted, num_nodes) != "host":
        return False
    return device is not None or choose_engine(wanted) == "cuda"
