"""Making the engine of a Buffer, whose name `epcomm.engines.choose_engine` has given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from epcomm.arrays import CPU, Device
from epcomm.engines.base import DeviceNodeEngine, Engine, NodeEngine
from epcomm.engines.host import HostEngine
from epcomm.engines.host_rail_moves import HostMoves
from epcomm.engines.rail_moves import Moves
from epcomm.engines.rails import GRACE_S, RailsEngine
from epcomm.engines.staged import StagedEngine
from epcomm.group import Group
from epcomm.mpi_memory import takes_device_pointers
from epcomm.topology import Topology


@dataclass(frozen=True)
class EngineSetup:
    """What a Buffer tells its engine.

    Attributes:
        device: Where all arrays of calls are.
        num_bytes: Bytes to reserve for throughput calls inside a node.
        num_rdma_bytes: The same for low-latency calls, or for rows between nodes.
        can_mask: Whether low-latency calls mask ranks that do not answer.
        num_sms: Gives the multiprocessors of a call without a config.
        shm_dir: Folder for shared memory files, or None for memory without a name.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this Buffer.
    """

    device: Device
    num_bytes: int
    num_rdma_bytes: int
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
    if topology.num_nodes > 1:
        made: Engine = _make_rails(name, group, topology, setup)
    elif name == "cuda":
        made = _make_cuda(group, setup)
    else:
        made = _make_host(group, setup)
    if name == "cuda" or setup.device == CPU:
        return made
    from epcomm.engines.device_copies import DeviceCopies

    return StagedEngine(made, DeviceCopies(setup.device.index), setup.device)


def _make_host(group: Group, setup: EngineSetup, names: Sequence[int] | None = None) -> NodeEngine:
    return HostEngine(
        group,
        Topology(group.rank, (0,) * group.size),
        num_bytes=setup.num_bytes,
        num_low_latency_bytes=setup.num_rdma_bytes,
        shm_dir=setup.shm_dir,
        timeout_s=setup.timeout_s,
        can_mask=setup.can_mask,
        buffer_id=setup.buffer_id,
        names=names,
    )


def _make_cuda(
    group: Group, setup: EngineSetup, names: Sequence[int] | None = None
) -> DeviceNodeEngine:
    from epcomm.engines.cuda import CudaEngine

    return CudaEngine(
        group,
        device=setup.device.index,
        num_bytes=setup.num_bytes,
        num_low_latency_bytes=setup.num_rdma_bytes,
        can_mask=setup.can_mask,
        num_sms=setup.num_sms,
        timeout_s=setup.timeout_s,
        buffer_id=setup.buffer_id,
        names=names,
    )


def _make_rails(name: str, group: Group, topology: Topology, setup: EngineSetup) -> Engine:
    # Inside a node waits last longer, and there are no low-latency calls.
    in_node = replace(setup, num_rdma_bytes=0, can_mask=False, timeout_s=setup.timeout_s + GRACE_S)

    def make_node(node_group: Group, names: Sequence[int]) -> tuple[NodeEngine, Moves]:
        if name != "cuda":
            on_host = _make_host(node_group, in_node, names)
            return on_host, HostMoves(topology, on_host)
        from epcomm.engines.device_copies import DeviceCopies
        from epcomm.engines.device_rail_moves import DeviceMoves

        on_device = _make_cuda(node_group, in_node, names)
        copies, has_pointers = DeviceCopies(setup.device.index), takes_device_pointers()
        moves = DeviceMoves(topology, on_device, copies, setup.device, has_pointers)
        return on_device, moves

    return RailsEngine(
        group,
        topology,
        make_node,
        num_bytes=setup.num_rdma_bytes,
        timeout_s=setup.timeout_s,
        buffer_id=setup.buffer_id,
    )
