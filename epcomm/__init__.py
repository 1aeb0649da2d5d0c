"""Expert-parallel communication for mixture-of-experts models, for arrays of any framework.

`Buffer` moves tokens to their experts and back; `training` and `decoding` call it as a training
loop or an inference server does. Importing this needs neither a GPU nor MPI.
"""

from epcomm.buffer import Buffer
from epcomm.config import Config
from epcomm.errors import (
    ClosedError,
    CommTimeout,
    CompileError,
    CudaError,
    EpcommError,
    InvalidArgument,
    PeerMapError,
    RankMismatch,
    TransportError,
    UnsupportedConfig,
)
from epcomm.events import EventHandle, EventOverlap
from epcomm.group import Group, SingleGroup, as_group, run_threads
from epcomm.handle import DispatchHandle

__version__ = "0.1.0"

__all__ = [
    "Buffer",
    "ClosedError",
    "CommTimeout",
    "CompileError",
    "Config",
    "CudaError",
    "DispatchHandle",
    "EpcommError",
    "EventHandle",
    "EventOverlap",
    "Group",
    "InvalidArgument",
    "PeerMapError",
    "RankMismatch",
    "SingleGroup",
    "TransportError",
    "UnsupportedConfig",
    "__version__",
    "as_group",
    "run_threads",
]
