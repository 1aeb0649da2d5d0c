"""Ranks of several nodes: an engine inside each node, and MPI between them.

Dispatch: a row crosses once for each node that its token goes to, to the rank of the same index
there (the *rail peer*), and the node's engine spreads it as if it were the rail peer's own. Combine
goes the same way back: summed in the node and rounded once for the wire, then added at the origin.

Everything goes chunk by chunk (see `rail_routes`): while one chunk is spread or summed in the node,
messages of others are under way. All ranks go through the same *rounds*: round k of a chunk, k from
1, sends from every node n to node n + k, so that no node is everybody's first. Whoever waits in a
round has sent what others wait for in that round and earlier ones, and what a full window waits for
is received in earlier rounds: so some rank can always go on, whatever the window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import routing
from epcomm.arrays import DTYPE_INDEX, ArrayView, view_numpy
from epcomm.board import Call, check_agreement, define_call
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchInto,
    DispatchRequest,
    DispatchResult,
    FurtherRows,
    LayoutViews,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    LowLatencyShape,
    NodeEngine,
    StreamOrder,
    TopK,
)
from epcomm.engines.host import (
    check_layout,
    check_pairs,
    check_worst_tokens,
    make_layout,
    row_values,
)
from epcomm.engines.rail_routes import RailRoutes, make_routes, node_experts
from epcomm.engines.sections import Sections, as_rows, gather_rows
from epcomm.errors import (
    CommTimeout,
    InvalidArgument,
    RankMismatch,
    TransportError,
    UnsupportedConfig,
)
from epcomm.group import Group, MpiGroup
from epcomm.handle import DispatchHandle
from epcomm.rail_link import Message, RailLink, Transfer, Window
from epcomm.topology import Topology

_AGREED_ROWS = ("hidden", "dtype", "num_scales", "scales_dtype")
_AGREED_TOPK = ("num_topk", "topk_dtype", "num_experts", "expert_alignment")
_DISPATCH = define_call(
    "dispatch",
    (*_AGREED_ROWS, *_AGREED_TOPK, "num_chunk_tokens", "num_in_flight"),
    ("num_tokens", "num_worst_tokens"),
)
_DISPATCH_AGAIN = define_call("dispatch with a handle", ("handle", *_AGREED_ROWS, "num_in_flight"))
_COMBINE = define_call("combine", ("handle", "hidden", "dtype", "num_topk", "num_in_flight"))
_CALL_WORDS = 24

_NO_DTYPE = -1
#: By so much longer a rank waits for its own node than for others, whose failures it hears of.
GRACE_S = 2.0

Arrays = dict[str, npt.NDArray[Any]]
#: Makes the engine of a node: (its ranks' group, their numbers in the whole group).
MakeEngine = Callable[[Group, Sequence[int]], NodeEngine]


class RailsEngine:
    """See `epcomm.engines.base.Engine`. Construction is collective.

    Args:
        group: The ranks.
        topology: Their nodes, more than one.
        make_engine: Makes the engine of this rank's node; its waits should last `GRACE_S` longer.
        num_bytes: Staging memory to reserve; grows when a call needs more.
        timeout_s: Deadline of every wait, in seconds.
        buffer_id: Marks the handles of this engine's Buffer.
    """

    def __init__(
        self,
        group: Group,
        topology: Topology,
        make_engine: MakeEngine,
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
        index = self._ranks.index(topology.rank)
        self._node_group = _NodeGroup(topology.split_by_node(group), self._progress)
        self._rail_group = group.split(index)
        self._engine = make_engine(self._node_group, self._ranks)
        self.name = f"{self._engine.name}+rails"
        self._link = RailLink(
            group.split(index),
            self._rail,
            timeout_s,
            num_bytes,
            self._engine.check_failed,
            self._engine.fail,
        )
        node, num_nodes = topology.node, topology.num_nodes
        #: The other nodes in the order in which this rank sends to them, and receives from them.
        self._forward = [(node + k) % num_nodes for k in range(1, num_nodes)]
        self._backward = [(node - k) % num_nodes for k in range(1, num_nodes)]

    def _progress(self) -> None:
        # The node's engine is made, and may wait, before the link is.
        if hasattr(self, "_link"):
            self._link.progress()

    # --- what the node's engine does -----------------------------------------------------------

    def slab_bytes(self) -> int:
        """See `Engine.slab_bytes`; with the staging memory."""
        return self._engine.slab_bytes() + self._link.memory.size

    def active(self) -> AbstractContextManager[Any]:
        """See `Engine.active`."""
        return self._engine.active()

    def begin(self, order: StreamOrder) -> None:
        """See `Engine.begin`."""
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
        return make_layout(topk_idx, num_experts, self._topology, allocate)

    def local_memory(self, is_low_latency: bool) -> ArrayView:
        """See `Engine.local_memory`; with True the memory in which rows are staged for MPI."""
        if is_low_latency:
            return view_numpy(self._link.memory)
        return self._engine.local_memory(False)

    def close(self, is_collective: bool) -> None:
        """See `Engine.close`."""
        self._engine.close(is_collective)
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
        try:
            yield
        except (InvalidArgument, RankMismatch):
            raise  # before anything was sent
        except BaseException as error:
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
            peers = [self._ranks[index] for index in error.peers]
            raise CommTimeout(phase, self._topology.rank, peers, error.timeout_s) from None

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """See `Engine.dispatch`."""
        if request.handle is not None:
            with self._calling(_DISPATCH_AGAIN):
                return self._dispatch_again(request, request.handle)
        with self._calling(_DISPATCH):
            return self._dispatch_first(request)

    def _dispatch_first(self, request: DispatchRequest) -> DispatchResult:
        layout, topk = request.layout, request.topk
        assert layout is not None  # the Buffer gives it or a handle
        mask = layout.is_token_in_rank.numpy()
        per_rank = layout.num_tokens_per_rank.numpy()
        per_expert = layout.num_tokens_per_expert.numpy()
        check_layout(mask, per_rank, per_expert, topk)
        check_pairs(topk, per_expert)
        values = {
            **row_values(request),
            "num_topk": topk.idx.shape[1] if topk else 0,
            "topk_dtype": DTYPE_INDEX[topk.idx.dtype] if topk else _NO_DTYPE,
            "num_experts": len(per_expert),
            "expert_alignment": request.expert_alignment,
            "num_chunk_tokens": request.chunks.num_tokens,
            "num_in_flight": request.chunks.num_in_flight,
            "num_tokens": len(mask),
            "num_worst_tokens": request.num_worst_tokens,
        }
        said, counts = self._agree(_DISPATCH, values, per_rank)
        check_worst_tokens(counts.sum(axis=0), said["num_worst_tokens"])
        in_node, pairs = self._exchange_routes(mask, per_expert, said["num_tokens"])
        routes = make_routes(
            self._topology, mask, in_node, said["num_tokens"], request.chunks.num_tokens
        )
        me = self._topology.rank
        num_recv_tokens = int(counts[:, me].sum())
        self._num_dispatches += 1
        handle = DispatchHandle(
            buffer_id=self._buffer_id,
            serial=self._num_dispatches,
            num_tokens=len(mask),
            num_recv_rows=request.num_worst_tokens or num_recv_tokens,
            num_recv_tokens=num_recv_tokens,
            routing=routes,
        )
        spread = _Spread(self, request, routes, _allocate_outputs(request, handle.num_recv_rows))
        spread.route(routing.first_positions(counts)[:, me], pairs)
        self._run_dispatch(request, routes, spread)
        out = spread.out
        if out.topk is not None:
            out.topk.idx.numpy()[num_recv_tokens:] = -1
        per_local_expert: list[int] = []
        if not request.num_worst_tokens:
            alignment = request.expert_alignment
            found = spread.num_tokens_per_expert.tolist()
            per_local_expert = [routing.round_up(count, alignment) for count in found]
        return DispatchResult(out.data, out.scales, out.topk, per_local_expert, handle)

    def _dispatch_again(self, request: DispatchRequest, handle: DispatchHandle) -> DispatchResult:
        values = {
            **row_values(request),
            "handle": handle.serial,
            "num_in_flight": request.chunks.num_in_flight,
        }
        self._agree(_DISPATCH_AGAIN, values)
        out = _allocate_outputs(request, handle.num_recv_rows)
        spread = _Spread(self, request, handle.routing, out)
        self._run_dispatch(request, handle.routing, spread)
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

        def part(node: int) -> Arrays:
            ranks = list(topology.ranks_of(node))
            return {"mask": mask[:, ranks], "pairs": by_rank[ranks]}

        mine = sections(topology.node)
        others = self._backward
        receives = [Message(node, sections(node).end) for node in others]
        largest = max([mine.end, *(message.num_bytes for message in receives)])
        found = {topology.node: part(topology.node)}
        window = Window(largest, len(others), len(others))
        with self._link.transfer("dispatch: routes", window, receives) as transfer:
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

    def _run_dispatch(self, request: DispatchRequest, routes: RailRoutes, spread: _Spread) -> None:
        """Send, receive and spread all chunks."""
        own, num_chunks = self._topology.node, max(routes.num_chunks)
        sends = deque(
            (chunk, k, node)
            for chunk in range(num_chunks)
            for k, node in enumerate(self._forward, start=1)
            if len(routes.outgoing_in(node, chunk))
        )
        receives = [
            Message(node, spread.sections(num_rows).end)
            for chunk in range(num_chunks)
            for node in self._backward
            if (num_rows := len(routes.incoming_in(node, chunk)))
        ]
        largest = spread.sections(min(routes.num_chunk_tokens, int(routes.num_tokens.max())))
        depth = request.chunks.num_in_flight
        window = Window(largest.end, depth, depth)
        with self._link.transfer("dispatch: rows", window, receives) as transfer:

            def send_next() -> None:
                chunk, _, node = sends.popleft()
                spread.send(transfer, node, chunk)

            def pump() -> None:
                while sends and transfer.can_send():
                    send_next()

            for chunk in range(num_chunks):
                for k, node in enumerate((own, *self._backward)):
                    if chunk >= routes.num_chunks[node]:
                        continue
                    # NOTE: while it waits in its node a rank sends nothing, so what the same round
                    # of another node waits for is sent before: else nodes could wait in a circle.
                    while sends and sends[0][:2] <= (chunk, k):
                        send_next()
                    pump()
                    num_rows = len(routes.incoming_in(node, chunk)) if node != own else 0
                    if num_rows:
                        slot = transfer.receive(pump)
                        spread.spread(node, chunk, spread.part_in(slot, num_rows))
                        transfer.release()
                    else:
                        spread.spread(node, chunk, spread.own_part(node, chunk))
            while sends:
                send_next()

    # --- combine -------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        """See `Engine.combine`."""
        data, weights = request.data, request.topk_weights
        values = {
            "handle": request.handle.serial,
            "hidden": data.shape[1],
            "dtype": DTYPE_INDEX[data.dtype],
            "num_topk": _NO_DTYPE if weights is None else weights.shape[1],
            "num_in_flight": request.chunks.num_in_flight,
        }
        with self._calling(_COMBINE):
            self._agree(_COMBINE, values)
            num_tokens = request.handle.num_tokens
            out = CombineResult(
                request.allocate((num_tokens, data.shape[1]), data.dtype),
                None
                if weights is None
                else request.allocate((num_tokens, weights.shape[1]), weights.dtype),
            )
            self._run_combine(request, out)
        return out

    def _run_combine(self, request: CombineRequest, out: CombineResult) -> None:
        """Sum in the node and send, receive and sum here, all chunks.

        A chunk's sums are finished some chunks after this node's sums of it were sent, so that
        the other nodes' have time to arrive.
        """
        routes: RailRoutes = request.handle.routing
        own = self._topology.node
        sums = _Sums(self, request, routes, out)
        num_chunks = max(routes.num_chunks)
        depth, num_others = request.chunks.num_in_flight, len(self._forward)
        lag = depth // num_others
        receives = [
            Message(node, sums.sections(num_rows).end)
            for chunk in range(routes.num_chunks[own])
            for node in self._backward
            if (num_rows := len(routes.outgoing_in(node, chunk)))
        ]
        largest = min(routes.num_chunk_tokens, int(routes.num_tokens.max()))
        # NOTE: a chunk's messages of all nodes are held at once, and those of the chunks that lag.
        window = Window(sums.sections(largest + 1).end, depth, depth + num_others)
        with self._link.transfer("combine: rows", window, receives) as transfer:
            for step in range(num_chunks + lag):
                for node in self._forward:
                    if step < routes.num_chunks[node]:
                        sums.send(transfer, node, step)
                if 0 <= step - lag < routes.num_chunks[own]:
                    sums.finish(transfer, step - lag)

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
        out.numpy()[...] = 0

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
    """The ranks of a node; MPI between nodes moves on while they wait for each other."""

    def __init__(self, group: Group, progress: Callable[[], None]) -> None:
        self._group = group
        self._progress = progress
        self.rank = group.rank
        self.size = group.size

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`."""
        return self._group.allgather(obj, timeout_s=timeout_s, phase=phase)

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self._group.barrier(timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> Group:
        """See `Group.split`."""
        return self._group.split(color)

    def check(self) -> None:
        """See `Group.check`."""
        self._group.check()
        self._progress()


class _Spread:
    """One dispatch: its parts that are sent, and spread in the node."""

    def __init__(
        self, engine: RailsEngine, request: DispatchRequest, routes: RailRoutes, out: DispatchInto
    ) -> None:
        self._topology = engine._topology
        self._engine = engine._engine
        self._request = request
        self._routes = routes
        self.out = out
        self._inputs: Arrays = {"data": request.data.numpy()}
        if request.scales is not None:
            self._inputs["scales"] = request.scales.numpy()
        if request.topk is not None:
            self._inputs["topk_idx"] = request.topk.idx.numpy()
            self._inputs["topk_weights"] = request.topk.weights.numpy()
        self._numbers: dict[int, npt.NDArray[Any]] = {}

    def route(self, first: routing.Ints, pairs: Sequence[npt.NDArray[np.int32]]) -> None:
        """Prepare for a dispatch without a handle.

        Args:
            first: Row of each source rank's first token.
            pairs: By node, the rail peer's choices of each of this node's experts.
        """
        self._next_rows = first.copy()
        self._pairs = pairs
        num_ranks = len(self._topology.ranks_of(0))
        self.num_tokens_per_expert = np.zeros(len(pairs[0]) // num_ranks, np.int64)

    # --- what crosses --------------------------------------------------------------------------

    def sections(self, num_rows: int) -> Sections:
        """Return how a message of so many rows is divided."""
        return Sections(
            {
                name: ((num_rows, *array.shape[1:]), array.dtype)
                for name, array in self._inputs.items()
            }
        )

    def send(self, transfer: Transfer, node: int, chunk: int) -> None:
        """Send a chunk's rows to a node."""
        tokens = self._routes.outgoing_in(node, chunk)
        sections, slot = self.sections(len(tokens)), transfer.next_send_slot()
        for name, array in self._inputs.items():
            out = sections.view(slot, name)
            if name == "topk_idx":
                out[...] = self._in_node(node, array[tokens])
            elif array.flags.c_contiguous:
                gather_rows(as_rows(array), tokens, as_rows(out))
            else:
                out[...] = array[tokens]
        transfer.send(node, sections.end)

    def _in_node(self, node: int, topk_idx: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Number choices as the node's engine does."""
        if node not in self._numbers:
            layout = self._request.layout
            assert layout is not None  # choices travel only with a layout
            num_experts = layout.num_tokens_per_expert.shape[0]
            self._numbers[node] = node_experts(self._topology, num_experts, node)
        numbers: npt.NDArray[Any] = self._numbers[node][topk_idx]
        return numbers.astype(topk_idx.dtype)

    # --- what is spread ------------------------------------------------------------------------

    def own_part(self, node: int, chunk: int) -> Arrays:
        """Return this rank's own rows of a chunk; of another node, no rows."""
        tokens = slice(0)
        if node == self._topology.node:
            tokens = self._routes.tokens(len(self._inputs["data"]), chunk)
        part = {name: array[tokens] for name, array in self._inputs.items()}
        if "topk_idx" in part:
            part["topk_idx"] = self._in_node(self._topology.node, part["topk_idx"])
        return part

    def part_in(self, slot: npt.NDArray[np.uint8], num_rows: int) -> Arrays:
        """Return the rows of a message."""
        sections = self.sections(num_rows)
        return {name: sections.view(slot, name) for name in self._inputs}

    def spread(self, node: int, chunk: int, part: Arrays) -> None:
        """Dispatch a chunk of a node's rows inside this node. Collective there."""
        key = (node, chunk)
        if self._request.handle is not None:
            into = replace(self.out, first_rows=self._routes.first_rows[key])
            self._dispatch(part, into, None, self._routes.handles[key])
            return
        ranks = list(self._topology.ranks_of(node))
        first_rows = tuple(self._next_rows[ranks].tolist())
        mask = self._mask_of(node, chunk)
        # A rail peer's choices of experts count once, with its first chunk.
        pairs = self._pairs[node] if chunk == 0 else np.zeros_like(self._pairs[node])
        layout = LayoutViews(
            num_tokens_per_rank=view_numpy(mask.sum(axis=0, dtype=np.int32)),
            num_tokens_per_node=None,
            num_tokens_per_expert=view_numpy(pairs),
            is_token_in_rank=view_numpy(mask),
        )
        result = self._dispatch(part, replace(self.out, first_rows=first_rows), layout, None)
        self._routes.handles[key] = result.handle
        self._routes.first_rows[key] = first_rows
        assert result.num_recv_tokens_per_source is not None  # the host waits for the counts
        self._next_rows[ranks] += result.num_recv_tokens_per_source
        self.num_tokens_per_expert += result.num_recv_tokens_per_expert

    def _mask_of(self, node: int, chunk: int) -> routing.Bools:
        routes = self._routes
        if node == self._topology.node:
            tokens = routes.tokens(len(routes.in_node[node]), chunk)
            return routes.in_node[node][tokens]
        return routes.in_node[node][routes.incoming_in(node, chunk)]

    def _dispatch(
        self,
        part: Arrays,
        into: DispatchInto,
        layout: LayoutViews | None,
        handle: DispatchHandle | None,
    ) -> DispatchResult:
        views = {name: view_numpy(array) for name, array in part.items()}
        topk = TopK(views["topk_idx"], views["topk_weights"]) if "topk_idx" in views else None
        return self._engine.dispatch(
            replace(
                self._request,
                data=views["data"],
                scales=views.get("scales"),
                layout=layout,
                topk=topk,
                handle=handle,
                expert_alignment=1,
                num_worst_tokens=0,
                into=into,
            )
        )


class _Sums:
    """One combine: what is summed in the node and sent, and what is summed here."""

    def __init__(
        self, engine: RailsEngine, request: CombineRequest, routes: RailRoutes, out: CombineResult
    ) -> None:
        self._topology = engine._topology
        self._backward = engine._backward
        self._engine = engine._engine
        self._request = request
        self._routes = routes
        self._out = out

    def sections(self, num_rows: int) -> Sections:
        """Return how a message of so many rows is divided.

        The rows come last: at the receiver a spare row follows them.
        """
        spec: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
        weights = self._request.topk_weights
        if weights is not None:
            spec["weights"] = ((num_rows + 1, weights.shape[1]), weights.dtype)
        data = self._request.data
        return Sections({**spec, "data": ((num_rows, data.shape[1]), data.dtype)})

    def send(self, transfer: Transfer, node: int, chunk: int) -> None:
        """Sum a chunk of a node's rows inside this node (collective there), and send the sums."""
        num_rows = len(self._routes.incoming_in(node, chunk))
        sections = self.sections(num_rows)
        slot = transfer.next_send_slot() if num_rows else np.empty(sections.end, np.uint8)
        weights = None
        if self._request.topk_weights is not None:
            weights = view_numpy(sections.view(slot, "weights")[:num_rows])
        into = CombineResult(view_numpy(sections.view(slot, "data")), weights)
        self._combine(node, chunk, (), (), into)
        if num_rows:
            transfer.send(node, sections.end)

    def finish(self, transfer: Transfer, chunk: int) -> None:
        """Sum a chunk of this rank's own tokens: its node's rows, then the other nodes' sums."""
        node = self._topology.node
        tokens = self._routes.tokens(self._request.handle.num_tokens, chunk)
        further = {}
        for other in self._backward:
            crossed = self._routes.outgoing_in(other, chunk)
            if len(crossed):
                further[other] = self._further(transfer.receive(), crossed, tokens)
        out_weights = self._out.topk_weights
        into = CombineResult(
            view_numpy(self._out.data.numpy()[tokens]),
            None if out_weights is None else view_numpy(out_weights.numpy()[tokens]),
        )
        biases = tuple(view_numpy(bias.numpy()[tokens]) for bias in self._request.biases)
        in_order = [further[other] for other in sorted(further)]
        self._combine(node, chunk, biases, in_order, into)
        transfer.release(len(further))

    def _further(
        self, slot: npt.NDArray[np.uint8], crossed: routing.Ints, tokens: slice
    ) -> FurtherRows:
        """Make a message's rows ready to be added: a spare row for the tokens that have none."""
        num_rows = len(crossed)
        weights = None
        if self._request.topk_weights is not None:
            weights = self.sections(num_rows).view(slot, "weights")
            weights[num_rows] = -0.0
        width, dtype = self._request.data.shape[1], self._request.data.dtype
        row_bytes = width * dtype.itemsize
        begin = _first_byte(self.sections(num_rows), slot)
        rows = slot[begin : begin + (num_rows + 1) * row_bytes].view(dtype)
        data = rows.reshape(num_rows + 1, width)
        data[num_rows] = -0.0
        slots = np.full(tokens.stop - tokens.start, num_rows, np.int64)
        slots[crossed - tokens.start] = np.arange(num_rows)
        return FurtherRows(data, weights, slots)

    def _combine(
        self,
        node: int,
        chunk: int,
        biases: tuple[ArrayView, ...],
        further: Sequence[FurtherRows],
        into: CombineResult,
    ) -> None:
        key = (node, chunk)
        self._engine.combine(
            replace(
                self._request,
                biases=biases,
                handle=self._routes.handles[key],
                into=into,
                first_rows=self._routes.first_rows[key],
                further=further,
            )
        )


def _first_byte(sections: Sections, slot: npt.NDArray[np.uint8]) -> int:
    """Return where a message's rows begin."""
    return int(sections.view(slot, "data").ctypes.data - slot.ctypes.data)


def _allocate_outputs(request: DispatchRequest, num_rows: int) -> DispatchInto:
    def make(source: ArrayView) -> ArrayView:
        return request.allocate((num_rows, source.shape[1]), source.dtype)

    return DispatchInto(
        data=make(request.data),
        scales=make(request.scales) if request.scales else None,
        topk=TopK(make(request.topk.idx), make(request.topk.weights)) if request.topk else None,
        first_rows=(),
    )
