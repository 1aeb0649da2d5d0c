"""Calls between nodes whose rows are in the CPU's memory, chunk by chunk (see `rail_routes`).

While one chunk is spread or summed in the node, messages of others are under way. All ranks go
through the same *rounds*: round k of a chunk, k from 1, sends from every node n to node n + k, so
that no node is everybody's first. Whoever waits in a round has sent what others wait for in that
round and earlier ones, and what a full window waits for is received in earlier rounds: so some rank
can always go on, whatever the window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from epcomm import routing
from epcomm.arrays import ArrayView, view_numpy
from epcomm.engines.base import (
    Allocate,
    CombineRequest,
    CombineResult,
    DispatchInto,
    DispatchRequest,
    DispatchResult,
    FurtherRows,
    LayoutViews,
    NodeEngine,
    TopK,
)
from epcomm.engines.host_layout import make_layout
from epcomm.engines.rail_routes import RailRoutes, node_experts
from epcomm.engines.sections import Sections, as_rows, gather_rows
from epcomm.handle import DispatchHandle
from epcomm.rail_link import Bytes, Message, RailLink, Transfer, Window, empty_bytes
from epcomm.topology import Topology

Arrays = dict[str, npt.NDArray[Any]]


class ChunkRecord(NamedTuple):
    """A chunk of a node's rows, as it was spread.

    Attributes:
        handle: What the node's engine returned for them.
        first_rows: The row where each of the node's ranks begins.
    """

    handle: DispatchHandle
    first_rows: tuple[int, ...]


#: By node and chunk.
ChunkRecords = dict[tuple[int, int], ChunkRecord]


class HostMoves:
    """See `epcomm.engines.rail_moves.Moves`.

    Args:
        topology: The nodes.
        engine: Of this rank's node, the host engine.
    """

    def __init__(self, topology: Topology, engine: NodeEngine) -> None:
        self._topology, self._engine = topology, engine

    def empty(self, num_bytes: int) -> Bytes:
        """See `Moves.empty`."""
        return empty_bytes(num_bytes)

    def empty_on_host(self, num_bytes: int) -> Bytes | None:
        """See `Moves.empty_on_host`: `empty` gives it."""
        return None

    def view_memory(self, memory: Bytes) -> ArrayView:
        """See `Moves.view_memory`."""
        return view_numpy(memory)

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Moves.make_layout`."""
        return make_layout(topk_idx, num_experts, self._topology, allocate)

    def fetch(self, layout: LayoutViews, topk: TopK | None) -> tuple[LayoutViews, ArrayView | None]:
        """See `Moves.fetch`: it is there."""
        return layout, None if topk is None else topk.idx

    def put(self, array: npt.NDArray[Any], view: ArrayView) -> None:
        """See `Moves.put`."""
        view.numpy()[...] = array

    def check(self, request: DispatchRequest | CombineRequest, max_tokens: int = 0) -> None:
        """See `Moves.check`: the host engine takes all that the Buffer does."""

    def close(self) -> None:
        """See `Moves.close`: there is none."""

    def dispatch(
        self,
        link: RailLink,
        request: DispatchRequest,
        routes: RailRoutes,
        pairs: Sequence[npt.NDArray[np.int32]] | None,
        out: DispatchInto,
    ) -> npt.NDArray[np.int64]:
        """See `Moves.dispatch`."""
        spread = Spread(self._topology, self._engine, request, routes, out)
        if pairs is not None:
            spread.route(np.cumsum(routes.num_arriving) - routes.num_arriving, pairs)
        self._spread(link, request, routes, spread)
        if out.topk is not None:
            out.topk.idx.numpy()[int(routes.num_arriving.sum()) :] = -1
        return spread.num_tokens_per_expert

    def _spread(
        self, link: RailLink, request: DispatchRequest, routes: RailRoutes, spread: Spread
    ) -> None:
        """Send, receive and spread all chunks."""
        forward, backward = self._topology.nodes_after(), self._topology.nodes_before()
        own, num_chunks = self._topology.node, max(routes.num_chunks)
        sends = deque(
            (chunk, k, node)
            for chunk in range(num_chunks)
            for k, node in enumerate(forward, start=1)
            if len(routes.outgoing_in(node, chunk))
        )
        receives = [
            Message(node, spread.sections(num_rows).end)
            for chunk in range(num_chunks)
            for node in backward
            if (num_rows := len(routes.incoming_in(node, chunk)))
        ]
        largest = spread.sections(min(routes.num_chunk_tokens, int(routes.num_tokens.max())))
        depth = request.chunks.num_in_flight
        window = Window(largest.end, depth, depth)
        with link.transfer("dispatch: rows", window, receives) as transfer:

            def send_next() -> None:
                chunk, _, node = sends.popleft()
                spread.send(transfer, node, chunk)

            def pump() -> None:
                while sends and transfer.can_send():
                    send_next()

            for chunk in range(num_chunks):
                for k, node in enumerate((own, *backward)):
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

    def combine(
        self, link: RailLink, request: CombineRequest, routes: RailRoutes, out: CombineResult
    ) -> None:
        """See `Moves.combine`.

        A chunk's sums are finished some chunks after this node's sums of it were sent, so that
        the other nodes' have time to arrive.
        """
        forward, backward = self._topology.nodes_after(), self._topology.nodes_before()
        own = self._topology.node
        sums = Sums(self._topology, self._engine, request, routes, out)
        num_chunks = max(routes.num_chunks)
        depth, num_others = request.chunks.num_in_flight, len(forward)
        lag = depth // num_others
        receives = [
            Message(node, sums.sections(num_rows).end)
            for chunk in range(routes.num_chunks[own])
            for node in backward
            if (num_rows := len(routes.outgoing_in(node, chunk)))
        ]
        largest = min(routes.num_chunk_tokens, int(routes.num_tokens.max()))
        # NOTE: a chunk's messages of all nodes are held at once, and those of the chunks that lag.
        window = Window(sums.sections(largest + 1).end, depth, depth + num_others)
        with link.transfer("combine: rows", window, receives) as transfer:
            for step in range(num_chunks + lag):
                for node in forward:
                    if step < routes.num_chunks[node]:
                        sums.send(transfer, node, step)
                if 0 <= step - lag < routes.num_chunks[own]:
                    sums.finish(transfer, step - lag)


class Spread:
    """One dispatch: its parts that are sent, and spread in the node."""

    def __init__(
        self,
        topology: Topology,
        engine: NodeEngine,
        request: DispatchRequest,
        routes: RailRoutes,
        out: DispatchInto,
    ) -> None:
        self._topology = topology
        self._engine = engine
        self._request = request
        self._routes = routes
        self._records: ChunkRecords = routes.of_moves
        self.out = out
        self._inputs: Arrays = {"data": request.data.numpy()}
        if request.scales is not None:
            self._inputs["scales"] = request.scales.numpy()
        if request.topk is not None:
            self._inputs["topk_idx"] = request.topk.idx.numpy()
            self._inputs["topk_weights"] = request.topk.weights.numpy()
        self._numbers: dict[int, npt.NDArray[Any]] = {}
        self.num_tokens_per_expert = np.zeros(0, np.int64)

    def route(self, first: routing.Ints, pairs: Sequence[npt.NDArray[np.int32]]) -> None:
        """Prepare for a dispatch without a handle.

        Args:
            first: Row of each source rank's first token.
            pairs: By node, the rail peer's choices of each of this node's experts.
        """
        self._routes.of_moves = self._records = {}
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
            record = self._records[key]
            into = replace(self.out, first_rows=record.first_rows)
            self._dispatch(part, into, None, record.handle)
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
        self._records[key] = ChunkRecord(result.handle, first_rows)
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
            self._request._replace(
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


class Sums:
    """One combine: what is summed in the node and sent, and what is summed here."""

    def __init__(
        self,
        topology: Topology,
        engine: NodeEngine,
        request: CombineRequest,
        routes: RailRoutes,
        out: CombineResult,
    ) -> None:
        self._topology = topology
        self._engine = engine
        self._request = request
        self._routes = routes
        self._records: ChunkRecords = routes.of_moves
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
        for other in self._topology.nodes_before():
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
        record = self._records[node, chunk]
        self._engine.combine(
            self._request._replace(
                biases=biases,
                handle=record.handle,
                into=into,
                first_rows=record.first_rows,
                further=further,
            )
        )


def _first_byte(sections: Sections, slot: npt.NDArray[np.uint8]) -> int:
    """Return where a message's rows begin."""
    return int(sections.view(slot, "data").ctypes.data - slot.ctypes.data)
