"""Ranks of several nodes: an engine inside each node, and MPI between them.

Dispatch: a row crosses once for each node that its token goes to, to the rank of the same index
there (the *rail peer*), and the node's engine spreads it as if it were the rail peer's own. Combine
goes the same way back: summed in the node and rounded once for the wire, then added at the origin.

Here ranks keep step and learn where rows go; `rail_moves` and `device_rail_moves` move them, in the
CPU's memory and on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from epcomm import routing, streams
from epcomm.arrays import ArrayView
from epcomm.board import Call, check_agreement, define_call
from epcomm.engines.agreed_values import (
    AGREED_ROWS,
    AGREED_SUMS,
    AGREED_TOPK,
    OWN_TOKENS,
    combine_values,
    dispatch_values,
    row_values,
)
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchInto,
    DispatchRequest,
    DispatchResult,
    LayoutViews,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
    NodeEngine,
    StreamOrder,
    TopK,
)
from epcomm.engines.host_layout import check_layout, check_pairs, check_worst_tokens
from epcomm.engines.rail_routes import RailRoutes, make_routes
from epcomm.engines.sections import Sections
from epcomm.errors import (
    CommTimeout,
    InvalidArgument,
    RankMismatch,
    TransportError,
    UnsupportedConfig,
)
from epcomm.group import Group, MpiGroup
from epcomm.handle import DispatchHandle
from epcomm.rail_link import Bytes, Message, RailLink, Window
from epcomm.topology import Topology

_DISPATCH = define_call(
    "dispatch", (*AGREED_ROWS, *AGREED_TOPK, "num_chunk_tokens", "num_in_flight"), OWN_TOKENS
)
_DISPATCH_AGAIN = define_call("dispatch with a handle", ("handle", *AGREED_ROWS, "num_in_flight"))
_COMBINE = define_call("combine", (*AGREED_SUMS, "num_in_flight"))
_CALL_WORDS = 24

#: By so much longer a rank waits for its own node than for others, whose failures it hears of.
GRACE_S = 2.0

#: Makes the engine of a node: (its ranks' group, their numbers in the whole group).
MakeEngine = Callable[[Group, Sequence[int]], NodeEngine]


class Moves(Protocol):
    """What depends on where rows are: `rail_moves` for the CPU's memory, `device_rail_moves`."""

    def empty(self, num_bytes: int) -> Bytes:
        """Return memory for the rows that MPI sends and receives."""
        ...

    def empty_on_host(self, num_bytes: int) -> Bytes | None:
        """Return memory for what the host itself sends; None where `empty` gives such."""
        ...

    def view_memory(self, memory: Bytes) -> ArrayView:
        """View what `empty` gave."""
        ...

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        ...

    def fetch(self, layout: LayoutViews, topk: TopK | None) -> tuple[LayoutViews, ArrayView | None]:
        """Return the layout, but for tokens by node, and the choices in memory of the host."""
        ...

    def put(self, array: npt.NDArray[Any], view: ArrayView) -> None:
        """Copy an array of the host to one where rows are."""
        ...

    def check(self, request: DispatchRequest | CombineRequest, max_tokens: int = 0) -> None:
        """Raise InvalidArgument if the node's engine would, before anything is sent.

        Args:
            request: The call.
            max_tokens: Most tokens of any rank, as far as known.
        """
        ...

    def dispatch(
        self,
        link: RailLink,
        request: DispatchRequest,
        routes: RailRoutes,
        pairs: Sequence[npt.NDArray[np.int32]] | None,
        out: DispatchInto,
    ) -> npt.NDArray[np.int64]:
        """Send, receive and spread all rows.

        Args:
            link: The way to the rail peers.
            request: The call.
            routes: Where rows go; with ``pairs`` the record of a new handle, to be completed.
            pairs: By node, the rail peer's choices of each of this node's experts; None where the
                handle is an earlier dispatch's.
            out: The outputs, without ``first_rows``; rows behind the last that arrives get no
                choices.

        Returns:
            Pairs that arrive for each local expert; with a handle nothing of worth.
        """
        ...

    def combine(
        self, link: RailLink, request: CombineRequest, routes: RailRoutes, out: CombineResult
    ) -> None:
        """Sum in the node and send, receive and sum here, all rows."""
        ...

    def close(self) -> None:
        """Let go of the staging memory."""
        ...


#: Makes what moves the rows of a node.
MakeMoves = Callable[[NodeEngine], Moves]


class RailsEngine:
    """See `epcomm.engines.base.Engine`. Construction is collective.

    Args:
        group: The ranks.
        topology: Their nodes, more than one.
        make_engine: Makes the engine of this rank's node; its waits should last `GRACE_S` longer.
        make_moves: Makes what moves the rows.
        num_bytes: Staging memory to reserve; grows when a call needs more.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this engine's Buffer.
    """

    makes_layout_in_dispatch = False

    def __init__(
        self,
        group: Group,
        topology: Topology,
        make_engine: MakeEngine,
        make_moves: MakeMoves,
        num_bytes: int,
        timeout_s: float,
        buffer_id: int,
    ) -> None:
        if not isinstance(group, MpiGroup):
            raise UnsupportedConfig(
                f"the group spans {topology.num_nodes} nodes {topology.node_of_rank}, and rows "
                f"cross between nodes by MPI, which a {type(group).__name__} is not. Pass an "
                "mpi4py communicator; or use one Buffer a node, or unset EPCOMM_RANKS_PER_NODE."
            )
        self._rail = topology.rail()
        self._topology = topology
        self._ranks = topology.ranks_of(topology.node)
        self._timeout_s = timeout_s
        self._buffer_id = buffer_id
        self._num_dispatches = 0
        self._broken = ""
        #: Whether the call in hand has come to where ranks wait for what this one sends.
        self._is_sending = False
        index = self._ranks.index(topology.rank)
        self._node_group = _NodeGroup(topology.split_by_node(group), self._ranks, self._progress)
        self._rail_group = group.split(index)
        self._engine = make_engine(self._node_group, self._ranks)
        self._moves = make_moves(self._engine)
        self.name = f"{self._engine.name}+rails"
        self._link = RailLink(
            group.split(index),
            self._rail,
            timeout_s,
            num_bytes,
            self._engine.check_failed,
            self._engine.fail,
            self._moves.empty,
        )
        #: The other nodes in the order in which this rank sends to them, and receives from them.
        self._forward = topology.nodes_after()
        self._backward = topology.nodes_before()

    def _progress(self) -> None:
        # The node's engine is made, and may wait, before the link is.
        if hasattr(self, "_link"):
            self._link.progress()

    # --- what the node's engine does -----------------------------------------------------------

    def slab_bytes(self) -> int:
        """See `Engine.slab_bytes`; with the memory in which rows are staged for MPI."""
        return self._engine.slab_bytes() + self._link.memory.size

    def active(self) -> AbstractContextManager[Any]:
        """See `Engine.active`."""
        return self._engine.active()

    def begin(self, order: StreamOrder) -> None:
        """See `Engine.begin`."""
        current = order.current_stream
        if current is not None and streams.is_capturing(current):
            raise UnsupportedConfig(
                f"a CUDA graph is being captured, and between nodes the {self.name} engine waits "
                "on the host, which a graph cannot repeat. Call outside of the capture, or use a "
                "Buffer of one node's ranks. Nothing was sent."
            )
        self._engine.begin(order)

    def end(self, order: StreamOrder, keep: Any) -> Any:
        """See `Engine.end`."""
        return self._engine.end(order, keep)

    def synchronize(self) -> None:
        """See `Engine.synchronize`."""
        self._engine.synchronize()

    def comm_stream(self) -> Any:
        """See `Engine.comm_stream`."""
        return self._engine.comm_stream()

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Engine.make_layout`."""
        return self._moves.make_layout(topk_idx, num_experts, allocate)

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """See `Engine.local_memory`; with True the memory in which rows are staged for MPI."""
        if is_low_latency:
            return self._moves.view_memory(self._link.memory)
        return self._engine.local_memory(False)

    def close(self, is_collective: bool) -> None:
        """See `Engine.close`."""
        self._engine.close(is_collective)
        self._moves.close()
        self._link.close()

    # --- keeping step --------------------------------------------------------------------------

    @contextmanager
    def _calling(self, call: Call) -> Iterator[None]:
        """Make all later calls fail once one has left ranks in different places."""
        if self._broken:
            raise TransportError(
                f"{call.name}: an earlier call on this Buffer failed ({self._broken}). Destroy "
                "this Buffer on every rank and make a new one."
            )
        self._is_sending = False
        try:
            yield
        except BaseException as error:
            if isinstance(error, (InvalidArgument, RankMismatch)) and not self._is_sending:
                raise
            self._broken = str(error).partition(". ")[0] or type(error).__name__
            raise

    def _agree(
        self, call: Call, values: Mapping[str, int], counts: npt.NDArray[Any] | None = None
    ) -> tuple[dict[str, routing.Ints], routing.Ints]:
        """Exchange values and counts; hold all ranks to the same arguments. Collective.

        First along the rail, then inside the node: a rank exchanges messages with as many ranks as
        there are nodes, and ranks of a node.

        Returns:
            Each value ``[num_ranks]`` by name, and the counts ``[num_ranks, num_ranks]``.
        """
        num_ranks = len(self._topology.node_of_rank)
        names = call.agreed + call.own
        header = np.zeros(_CALL_WORDS + num_ranks, np.int64)
        header[: 1 + len(names)] = call.code, *(values[name] for name in names)
        if counts is not None:
            header[_CALL_WORDS:] = counts
        phase = f"{call.name}: arrival"
        on_rail = self._hear_rail(header)
        by_index = self._hear_node(on_rail, phase)
        headers = np.empty((num_ranks, len(header)), np.int64)
        for rank, of_rail in zip(self._ranks, by_index, strict=True):
            if isinstance(of_rail, list):
                is_mine = rank == self._topology.rank
                detail = "" if is_mine else f"rank {rank} of this node gave up waiting for it"
                raise CommTimeout(phase, self._topology.rank, of_rail, self._timeout_s, detail)
        for index, of_rail in enumerate(by_index):
            for node, one in enumerate(of_rail):
                headers[self._topology.ranks_of(node)[index]] = one
        check_agreement(call, range(num_ranks), headers)
        by_name = {name: headers[:, 1 + i] for i, name in enumerate(names)}
        return by_name, headers[:, _CALL_WORDS:]

    def _hear_rail(self, header: routing.Ints) -> npt.NDArray[Any] | list[int]:
        """Return the headers of the rail by node, or the ranks that did not come."""
        try:
            # The phase is the same whatever the call is: ranks that make different ones must meet.
            said = self._rail_group.allgather(
                header, timeout_s=self._timeout_s, phase="rails: arrival"
            )
        except CommTimeout as error:
            return [self._rail[node] for node in error.peers]
        return np.stack(said)

    def _hear_node(self, mine: Any, phase: str) -> list[Any]:
        try:
            return self._node_group.allgather(
                mine, timeout_s=self._timeout_s + GRACE_S, phase="rails: arrival in the node"
            )
        except CommTimeout as error:
            raise CommTimeout(phase, error.rank, error.peers, error.timeout_s) from None

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        if request.handle is not None:
            with self._calling(_DISPATCH_AGAIN):
                return self._dispatch_again(request, request.handle)
        with self._calling(_DISPATCH):
            return self._dispatch_first(request)

    def _dispatch_first(self, request: DispatchRequest) -> DispatchResult:
        self._moves.check(request)
        assert request.layout is not None  # the Buffer gives it or a handle
        layout, choices = self._moves.fetch(request.layout, request.topk)
        mask = layout.is_token_in_rank.numpy()
        per_rank = layout.num_tokens_per_rank.numpy()
        per_expert = layout.num_tokens_per_expert.numpy()
        check_layout(mask, per_rank, per_expert, choices)
        check_pairs(choices, per_expert)
        values = {
            **dispatch_values(request, len(per_expert)),
            "num_chunk_tokens": request.chunks.num_tokens,
            "num_in_flight": request.chunks.num_in_flight,
        }
        said, counts = self._agree(_DISPATCH, values, per_rank)
        self._moves.check(request, int(said["num_tokens"].max()))
        check_worst_tokens(counts.sum(axis=0), said["num_worst_tokens"])
        self._is_sending = True
        in_node, pairs = self._exchange_routes(mask, per_expert, said["num_tokens"])
        routes = make_routes(
            *(self._topology, mask, in_node, said["num_tokens"]),
            num_arriving=counts[:, self._topology.rank],
            num_chunk_tokens=request.chunks.num_tokens,
        )
        num_recv_tokens = int(routes.num_arriving.sum())
        self._num_dispatches += 1
        handle = DispatchHandle(
            buffer_id=self._buffer_id,
            serial=self._num_dispatches,
            num_tokens=len(mask),
            num_recv_rows=request.num_worst_tokens or num_recv_tokens,
            num_recv_tokens=num_recv_tokens,
            routing=routes,
        )
        out = _allocate_outputs(request, handle.num_recv_rows)
        found = self._moves.dispatch(self._link, request, routes, pairs, out).tolist()
        per_local_expert: list[int] = []
        if not request.num_worst_tokens:
            alignment = request.expert_alignment
            per_local_expert = [routing.round_up(count, alignment) for count in found]
        return DispatchResult(out.data, out.scales, out.topk, per_local_expert, handle)

    def _dispatch_again(self, request: DispatchRequest, handle: DispatchHandle) -> DispatchResult:
        self._moves.check(request)
        values = {
            **row_values(request),
            "handle": handle.serial,
            "num_in_flight": request.chunks.num_in_flight,
        }
        self._agree(_DISPATCH_AGAIN, values)
        self._is_sending = True
        out = _allocate_outputs(request, handle.num_recv_rows)
        self._moves.dispatch(self._link, request, handle.routing, None, out)
        return DispatchResult(out.data, out.scales, None, [], handle)

    def _exchange_routes(
        self, mask: routing.Bools, per_expert: npt.NDArray[np.int32], num_tokens: routing.Ints
    ) -> tuple[list[routing.Bools], list[npt.NDArray[np.int32]]]:
        """Tell every rail peer which ranks of its node this rank's tokens go to, and how often.

        Returns:
            By node, ``[num_tokens of the rail peer, ranks of a node]`` of this node, and the rail
            peer's choices of each of this node's experts.
        """
        topology = self._topology
        num_local = len(per_expert) // len(topology.node_of_rank)
        by_rank = per_expert.reshape(-1, num_local)

        def sections(node: int) -> Sections:
            shape = (int(num_tokens[self._rail[node]]), len(self._ranks))
            return Sections(
                {"mask": (shape, mask.dtype), "pairs": ((shape[1], num_local), per_expert.dtype)}
            )

        def part(node: int) -> dict[str, npt.NDArray[Any]]:
            ranks = list(topology.ranks_of(node))
            return {"mask": mask[:, ranks], "pairs": by_rank[ranks]}

        mine = sections(topology.node)
        others = self._backward
        receives = [Message(node, sections(node).end) for node in others]
        largest = max([mine.end, *(message.num_bytes for message in receives)])
        found = {topology.node: part(topology.node)}
        window = Window(largest, len(others), len(others))
        memory = self._moves.empty_on_host(window.num_bytes)
        with self._link.transfer("dispatch: routes", window, receives, memory) as transfer:
            for node in self._forward:
                slot = transfer.next_send_slot()
                for name, array in part(node).items():
                    mine.view(slot, name)[...] = array
                transfer.send(node, mine.end)
            for node in others:
                slot = transfer.receive()
                found[node] = {
                    name: sections(node).view(slot, name).copy() for name in ("mask", "pairs")
                }
        nodes = range(topology.num_nodes)
        return (
            [found[node]["mask"] for node in nodes],
            [found[node]["pairs"].reshape(-1) for node in nodes],
        )

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        data, weights = request.data, request.topk_weights
        values = {**combine_values(request), "num_in_flight": request.chunks.num_in_flight}
        with self._calling(_COMBINE):
            self._moves.check(request)
            self._agree(_COMBINE, values)
            self._is_sending = True
            num_tokens = request.handle.num_tokens
            out = CombineResult(
                request.allocate((num_tokens, data.shape[1]), data.dtype),
                None
                if weights is None
                else request.allocate((num_tokens, weights.shape[1]), weights.dtype),
            )
            self._moves.combine(self._link, request, request.handle.routing, out)
        return out

    # --- low latency ---------------------------------------------------------------------------

    def low_latency_dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """See `Engine.low_latency_dispatch`; refused."""
        raise self._not_between_nodes("low_latency_dispatch")

    def low_latency_combine(self, request: LowLatencyCombineRequest) -> Callable[[], None]:
        """See `Engine.low_latency_combine`; refused."""
        raise self._not_between_nodes("low_latency_combine")

    def next_combine_buffer(self, shape: LowLatencyShape) -> ArrayView:
        """See `Engine.next_combine_buffer`; refused."""
        raise self._not_between_nodes("get_next_low_latency_combine_buffer")

    def copy_masks(self, out: ArrayView) -> None:
        """See `Engine.copy_masks`: nobody is masked."""
        self._moves.put(np.zeros(out.shape, out.dtype), out)

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """See `Engine.set_masked`; refused."""
        if is_masked:
            raise self._not_between_nodes("low_latency_update_mask_buffer")

    def _not_between_nodes(self, name: str) -> UnsupportedConfig:
        return UnsupportedConfig(
            f"{name}: the group spans {self._topology.num_nodes} nodes, and low-latency calls stay "
            "inside one. Use dispatch (num_worst_tokens= gives it a fixed shape) and combine, or a "
            "Buffer of one node's ranks."
        )


class _NodeGroup:
    """The ranks of a node; MPI between nodes moves on while they wait for each other.

    Args:
        group: The ranks.
        names: Their numbers in the whole group, for errors.
        progress: Lets MPI move on.
    """

    def __init__(self, group: Group, names: Sequence[int], progress: Callable[[], None]) -> None:
        self._group = group
        self._names = names
        self._progress = progress
        self.rank = group.rank
        self.size = group.size

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`."""
        try:
            return self._group.allgather(obj, timeout_s=timeout_s, phase=phase)
        except CommTimeout as error:
            peers = [self._names[index] for index in error.peers]
            me = self._names[error.rank]
            raise CommTimeout(error.phase, me, peers, error.timeout_s) from None

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> Group:
        """See `Group.split`."""
        return self._group.split(color)

    def check(self) -> None:
        """See `Group.check`."""
        self._group.check()
        self._progress()


def _allocate_outputs(request: DispatchRequest, num_rows: int) -> DispatchInto:
    def make(source: ArrayView) -> ArrayView:
        return request.allocate((num_rows, source.shape[1]), source.dtype)

    return DispatchInto(
        data=make(request.data),
        scales=make(request.scales) if request.scales else None,
        topk=TopK(make(request.topk.idx), make(request.topk.weights)) if request.topk else None,
        first_rows=(),
    )
