"""Making the engine of a Buffer, whose name `epcomm.engines.choose_engine` has given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epcomm.arrays import CPU, Device
from epcomm.engines.base import Engine
from epcomm.engines.host import HostEngine
from epcomm.engines.rails import GRACE_S, RailsEngine
from epcomm.engines.staged import StagedEngine
from epcomm.group import Group
from epcomm.topology import Topology


@dataclass(frozen=True)
class EngineSetup:
    """What a Buffer tells its engine.

    Attributes:
        device: Where all arrays of calls are.
        num_bytes: Bytes to reserve for throughput calls inside a node.
        num_further_bytes: The same for low-latency calls, or for rows between nodes.
        can_mask: Whether low-latency calls mask ranks that do not answer.
        num_sms: Gives the multiprocessors of a call without a config.
        shm_dir: Folder for shared memory files, or None for memory without a name.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this Buffer.
    """

    device: Device
    num_bytes: int
    num_further_bytes: int
    can_mask: bool
    num_sms: Callable[[], int]
    shm_dir: str | None
    timeout_s: float
    buffer_id: int


def make_engine(name: str, group: Group, topology: Topology, setup: EngineSetup) -> Engine:
    """Return a new engine. Collective.

    Args:
        name: ``"host"`` or ``"cuda"``.
        group: The ranks.
        topology: Their nodes.
        setup: Alike on all ranks, but for the device.
    """
    if name == "cuda":
        return _make_cuda(group, topology, setup)
    make = _make_rails if topology.num_nodes > 1 else _make_host
    if setup.device == CPU:
        return make(group, topology, setup)
    from epcomm.engines.device_copies import DeviceCopies

    copies = DeviceCopies(setup.device.index)
    return StagedEngine(make(group, topology, setup), copies, setup.device)


def _make_host(group: Group, topology: Topology, setup: EngineSetup) -> Engine:
    return HostEngine(
        group,
        topology,
        num_bytes=setup.num_bytes,
        num_low_latency_bytes=setup.num_further_bytes,
        shm_dir=setup.shm_dir,
        timeout_s=setup.timeout_s,
        can_mask=setup.can_mask,
        buffer_id=setup.buffer_id,
    )


def _make_cuda(group: Group, topology: Topology, setup: EngineSetup) -> Engine:
    from epcomm.engines.cuda import CudaEngine

    return CudaEngine(
        group,
        topology,
        device=setup.device.index,
        num_bytes=setup.num_bytes,
        num_low_latency_bytes=setup.num_further_bytes,
        can_mask=setup.can_mask,
        num_sms=setup.num_sms,
        timeout_s=setup.timeout_s,
        buffer_id=setup.buffer_id,
    )


def _make_rails(group: Group, topology: Topology, setup: EngineSetup) -> Engine:
    def make_node_engine(node_group: Group, names: Sequence[int]) -> HostEngine:
        return HostEngine(
            node_group,
            Topology(node_group.rank, (0,) * node_group.size),
            num_bytes=setup.num_bytes,
            num_low_latency_bytes=0,
            shm_dir=setup.shm_dir,
            timeout_s=setup.timeout_s + GRACE_S,
            can_mask=False,
            buffer_id=setup.buffer_id,
            names=names,
        )

    return RailsEngine(
        group,
        topology,
        make_node_engine,
        num_bytes=setup.num_further_bytes,
        timeout_s=setup.timeout_s,
        buffer_id=setup.buffer_id,
    )
