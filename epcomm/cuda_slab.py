"""GPU slabs: one cudaMalloc allocation a rank, mapped by all ranks of the node.

Between processes the mapping goes through CUDA IPC, which exports whole allocations and so fits a
slab of our own and nothing else; between threads of one process it is the plain pointer, with peer
access where the GPUs differ.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from epcomm.errors import (
    EpcommError,
    PeerMapError,
    RankMismatch,
    TransportError,
    UnsupportedConfig,
)
from epcomm.group import Group

#: Of this process, or of the one that it was forked from.
_TOKEN = secrets.token_hex(8)


@dataclass(frozen=True)
class _Offer:
    """What a rank tells its peers of its slab."""

    process: tuple[int, str]
    device: int
    num_bytes: int
    bus_id: str
    ptr: int
    handle: bytes
    error: str


class CudaSlabs:
    """The slabs of all ranks as this rank's GPU addresses them. Collective.

    Args:
        group: Ranks of one node.
        device: This rank's GPU; current in this thread.
        num_bytes: Size of every slab.
        num_zeroed_bytes: Bytes at its beginning that are zeroed before any peer can see them.
        timeout_s: Deadline of the exchange, in seconds.
        names: Numbers of the ranks in a larger group, for errors; None where there is none.

    Raises:
        TransportError: Some rank has not enough GPU memory. Every rank raises it.
        UnsupportedConfig: Two GPUs cannot reach each other. Every rank raises it.
        RankMismatch: Ranks want slabs of different sizes. Every rank raises it.
        PeerMapError: Some rank cannot map a peer's slab. Every rank raises it.
    """

    def __init__(
        self,
        group: Group,
        device: int,
        num_bytes: int,
        num_zeroed_bytes: int,
        timeout_s: float,
        names: Sequence[int] | None = None,
    ) -> None:
        self.num_bytes = num_bytes
        self._group = group
        self._names = tuple(range(group.size)) if names is None else tuple(names)
        self._timeout_s = timeout_s
        self._opened: list[int] = []
        self._own, error = _allocate(num_bytes, num_zeroed_bytes)
        #: Address of every rank's slab, by rank.
        self.ptrs: tuple[int, ...] = ()
        try:
            self._meet(_make_offer(device, num_bytes, self._own, error))
        except EpcommError:
            self._free()  # no call has used it, here or on a peer
            raise

    def _meet(self, offer: _Offer) -> None:
        """Exchange offers and map the peers' slabs."""
        group, timeout_s = self._group, self._timeout_s
        offers: list[_Offer] = group.allgather(
            offer, timeout_s=timeout_s, phase="exchanging GPU slabs"
        )
        sizes = [each.num_bytes for each in offers]
        if len(set(sizes)) > 1:
            raise RankMismatch(
                f"ranks {list(self._names)} need GPU slabs of {sizes} bytes, which differ. Every "
                "rank must pass the same sizes, shapes and dtypes. Nothing was sent."
            )
        self._raise_first(TransportError, [each.error for each in offers])
        unreachable = _find_unreachable(offers, group.rank, self._names)
        found = group.allgather(unreachable, timeout_s=timeout_s, phase="looking for peer access")
        self._raise_first(UnsupportedConfig, found)
        #: Whether another rank is a thread of this process.
        self.are_threads = any(
            each.process == offer.process for rank, each in enumerate(offers) if rank != group.rank
        )
        #: Threads of this process that use this rank's GPU, this rank among them.
        self.num_sharing = sum(
            (each.process, each.device) == (offer.process, offer.device) for each in offers
        )
        ptrs, error = self._map_all(offers)
        errors = group.allgather(error, timeout_s=timeout_s, phase="mapping GPU slabs")
        self._raise_first(PeerMapError, errors)
        self.ptrs = tuple(ptrs)

    def _raise_first(self, kind: type[EpcommError], errors: Sequence[str]) -> None:
        for name, error in zip(self._names, errors, strict=True):
            if error:
                raise kind(f"rank {name}: {error}")

    def _free(self) -> None:
        import cupy

        self._unmap()
        own, self._own = self._own, 0
        if own:
            cupy.cuda.runtime.free(own)

    def _unmap(self) -> None:
        import cupy

        for ptr in self._opened:
            cupy.cuda.runtime.ipcCloseMemHandle(ptr)
        self._opened.clear()

    def _map_all(self, offers: Sequence[_Offer]) -> tuple[list[int], str]:
        import cupy

        runtime = cupy.cuda.runtime
        ptrs = []
        for peer, offer in enumerate(offers):
            try:
                if offer.process == _process():
                    _enable_peer_access(offers[self._group.rank].device, offer.device)
                    ptrs.append(offer.ptr)
                else:
                    ptr = runtime.ipcOpenMemHandle(offer.handle, 1)  # lazy peer access
                    self._opened.append(ptr)
                    ptrs.append(ptr)
            except runtime.CUDARuntimeError as problem:
                return [], (
                    f"cannot map the GPU slab of rank {self._names[peer]} (GPU "
                    f"{offer.bus_id}): {problem}. Every process must see all GPUs of the node: "
                    "leave CUDA_VISIBLE_DEVICES alike and choose the GPU with "
                    "cupy.cuda.Device(i).use() or torch.cuda.set_device(i)."
                )
        return ptrs, ""

    def close(self, is_collective: bool) -> None:
        """Unmap the peers' slabs, and free the own one.

        Args:
            is_collective: Whether all ranks close now. If not, the own slab stays allocated until
                the process ends: peers may still have it mapped.
        """
        self._unmap()
        self.ptrs = ()
        if self._own and is_collective:
            try:
                self._group.barrier(timeout_s=self._timeout_s, phase="closing GPU slabs")
            except TransportError:
                self._own = 0  # a peer is gone or late and may still use the slab: it stays
        if is_collective:
            self._free()


def _process() -> tuple[int, str]:
    """Return what no other process has; pids repeat where ranks have namespaces of their own."""
    return os.getpid(), _TOKEN


def _allocate(num_bytes: int, num_zeroed_bytes: int) -> tuple[int, str]:
    import cupy

    runtime = cupy.cuda.runtime
    try:
        ptr = int(runtime.malloc(num_bytes))
        runtime.memset(ptr, 0, num_zeroed_bytes)
        runtime.deviceSynchronize()
        return ptr, ""
    except runtime.CUDARuntimeError as problem:
        free = runtime.memGetInfo()[0]
        return 0, (
            f"no room for a GPU slab of {num_bytes / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are "
            f"free: {problem}. Pass fewer tokens a call or a smaller num_nvl_bytes, or leave more "
            "to it (torch: PYTORCH_CUDA_ALLOC_CONF, JAX: XLA_PYTHON_CLIENT_MEM_FRACTION)."
        )


def _make_offer(device: int, num_bytes: int, ptr: int, error: str) -> _Offer:
    import cupy

    runtime = cupy.cuda.runtime
    handle = runtime.ipcGetMemHandle(ptr) if ptr else b""
    bus_id = runtime.deviceGetPCIBusId(device)
    return _Offer(_process(), device, num_bytes, bus_id, ptr, handle, error)


def _find_unreachable(offers: Sequence[_Offer], rank: int, names: Sequence[int]) -> str:
    """Return what is wrong, or an empty string. GPUs this process does not see are left to IPC."""
    import cupy

    runtime = cupy.cuda.runtime
    mine = offers[rank]
    for peer, offer in enumerate(offers):
        try:
            device = runtime.deviceGetByPCIBusId(offer.bus_id)
        except runtime.CUDARuntimeError:
            continue
        if device != mine.device and not runtime.deviceCanAccessPeer(mine.device, device):
            return (
                f"GPU {mine.bus_id} has no peer access to GPU {offer.bus_id} "
                f"(rank {names[peer]}); the cuda engine needs NVLink or PCIe peer access between "
                "all ranks of a node. Use engine='host', device=i, which copies arrays of GPU i "
                "through host memory; or engine='host' with CPU arrays."
            )
    return ""


def _enable_peer_access(device: int, peer: int) -> None:
    import cupy

    if device == peer:
        return
    runtime = cupy.cuda.runtime
    try:
        runtime.deviceEnablePeerAccess(peer)
    except runtime.CUDARuntimeError as problem:
        if "PeerAccessAlreadyEnabled" not in str(problem):
            raise
