"""Ranks of several nodes: an engine inside each node, and MPI between them.

Dispatch: a row crosses once for each node that its token goes to, to the rank of the same index
there (the *rail peer*), and the node's engine spreads it as if it were the rail peer's own. Combine
goes the same way back: summed in the node and rounded once for the wire, then added at the origin.

Ranks keep step on the `rail_board`, and learn here where rows go; `host_rail_moves` and
`device_rail_moves` move them, in the CPU's memory and on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import routing, streams
from epcomm.arrays import ArrayView
from epcomm.board import Call, define_call
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
from epcomm.engines.node_group import NodeGroup
from epcomm.engines.rail_board import RailBoard
from epcomm.engines.rail_moves import Moves
from epcomm.engines.rail_routes import make_routes
from epcomm.engines.sections import Sections
from epcomm.errors import (
    InvalidArgument,
    RankMismatch,
    TransportError,
    UnsupportedConfig,
)
from epcomm.group import Group, MpiGroup
from epcomm.handle import DispatchHandle
from epcomm.rail_link import Message, RailLink, Window
from epcomm.topology import Topology

_DISPATCH = define_call(
    "dispatch", (*AGREED_ROWS, *AGREED_TOPK, "num_chunk_tokens", "num_in_flight"), OWN_TOKENS
)
_DISPATCH_AGAIN = define_call("dispatch with a handle", ("handle", *AGREED_ROWS, "num_in_flight"))
_COMBINE = define_call("combine", (*AGREED_SUMS, "num_in_flight"))

#: By so much longer a rank waits for its own node than for others, whose failures it hears of.
GRACE_S = 2.0

#: Makes a node's engine and what moves its rows: (its ranks' group, their numbers in the whole).
MakeNode = Callable[[Group, Sequence[int]], tuple[NodeEngine, Moves]]


class RailsEngine:
    """See `epcomm.engines.base.Engine`. Construction is collective.

    Args:
        group: The ranks.
        topology: Their nodes, more than one.
        make_node: Makes the engine of this rank's node, whose waits should last `GRACE_S` longer,
            and what moves the rows.
        num_bytes: Staging memory to reserve; grows when a call needs more.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this engine's Buffer.
    """

    makes_layout_in_dispatch = False

    def __init__(
        self,
        group: Group,
        topology: Topology,
        make_node: MakeNode,
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
        self._buffer_id = buffer_id
        self._num_dispatches = 0
        self._broken = ""
        #: Whether the call in hand has come to where ranks wait for what this one sends.
        self._is_sending = False
        index = self._ranks.index(topology.rank)
        node_group = NodeGroup(topology.split_by_node(group), self._ranks, self._progress)
        self._board = RailBoard(group.split(index), node_group, topology, timeout_s, GRACE_S)
        self._engine, self._moves = make_node(node_group, self._ranks)
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
        said, counts = self._board.agree(_DISPATCH, values, per_rank)
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
        self._board.agree(_DISPATCH_AGAIN, values)
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
            self._board.agree(_COMBINE, values)
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


def _allocate_outputs(request: DispatchRequest, num_rows: int) -> DispatchInto:
    def make(source: ArrayView) -> ArrayView:
        return request.allocate((num_rows, source.shape[1]), source.dtype)

    return DispatchInto(
        data=make(request.data),
        scales=make(request.scales) if request.scales else None,
        topk=TopK(make(request.topk.idx), make(request.topk.weights)) if request.topk else None,
        first_rows=(),
    )
