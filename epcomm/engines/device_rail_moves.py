"""Calls between nodes whose rows are on GPUs: what `host_rail_moves` is for rows in CPU memory.

What crosses goes through staging memory, a chunk at a time: gathered on the GPU and copied there,
then sent; received, then copied to its place on this rank's GPU. Staging memory is pinned memory of
the host, or the GPU's where MPI takes pointers to it. The node's engine takes all rows of a
rail peer at once, as they cross: those of its tokens that come here and no others. So one kernel
spreads a node's rows, and one sums them, and the sums are what goes back.

Round k exchanges with the nodes k further and k before. When a round's messages are through, the
node's engine spreads what has come; before a round's it sums what goes. So a rank that waits in its
node has sent all of this round, or of those before; and of all ranks that wait, the one in the
earliest round can go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from epcomm import streams
from epcomm.arrays import ArrayView, Device, packed_strides, view_numpy
from epcomm.engines.base import (
    Allocate,
    Chunks,
    CombineRequest,
    CombineResult,
    DeviceNodeEngine,
    DispatchInto,
    DispatchRequest,
    FurtherSums,
    LayoutViews,
    TopK,
)
from epcomm.engines.device_exchange import Exchange, Piece
from epcomm.engines.device_rail_routes import (
    DeviceRoutes,
    Part,
    Run,
    make_device_routes,
)
from epcomm.engines.device_rows import (
    Rows,
    inputs_of,
    outputs_of,
    rows_of,
    sections_of,
    some_of,
    topk_of,
)
from epcomm.engines.host_layout import make_layout
from epcomm.engines.rail_routes import RailRoutes
from epcomm.engines.row_copies import RowCopies
from epcomm.engines.sections import Sections
from epcomm.errors import TransportError
from epcomm.rail_link import Bytes, Message, RailLink, Window, empty_bytes
from epcomm.topology import Topology

_UINT8 = np.dtype(np.uint8)


class DeviceMoves:
    """See `epcomm.engines.rail_moves.Moves`.

    Args:
        topology: The nodes.
        engine: Of this rank's node.
        copies: Of this rank's GPU.
        device: That GPU.
        has_device_pointers: Whether MPI takes pointers to the GPU's memory.
    """

    def __init__(
        self,
        topology: Topology,
        engine: DeviceNodeEngine,
        copies: RowCopies,
        device: Device,
        has_device_pointers: bool,
    ) -> None:
        self._topology, self._engine = topology, engine
        self._has_device_pointers = has_device_pointers
        self._copies, self._device = copies, device
        with copies.active():
            self._to_host, self._to_device = copies.new_stream(), copies.new_stream()
        self._exchange = Exchange(self._to_host.ptr, self._to_device.ptr)
        #: Staging memory by its use, and its bytes.
        self._staging: dict[str, tuple[Any, int]] = {}

    def empty(self, num_bytes: int) -> Bytes:
        """See `Moves.empty`: pinned memory, or the GPU's."""
        with self._copies.active():
            if self._has_device_pointers:
                return self._copies.bytes_on_device(num_bytes)
            return self._copies.empty_on_host(num_bytes)

    def empty_on_host(self, num_bytes: int) -> Bytes | None:
        """See `Moves.empty_on_host`."""
        return empty_bytes(num_bytes) if self._has_device_pointers else None

    def view_memory(self, memory: Bytes) -> ArrayView:
        """See `Moves.view_memory`."""
        if self._has_device_pointers:
            return self._view(self._copies.address(memory), memory.shape, _UINT8, memory)
        return view_numpy(memory)

    def close(self) -> None:
        """See `Moves.close`."""
        self._staging.clear()

    # --- memory --------------------------------------------------------------------------------

    def _stage(self, use: str, num_bytes: int) -> int:
        """Return the address of staging memory; what lay in it is lost where it grows.

        NOTE: CUDA may wait for kernels when it allocates, so a call asks for all before it runs.
        """
        if use not in self._staging or self._staging[use][1] < num_bytes:
            self._staging.pop(use, None)
            self._staging[use] = (self._copies.empty_on_device(max(1, num_bytes)), num_bytes)
        return int(self._staging[use][0].ptr)

    def _view(
        self, ptr: int, shape: tuple[int, ...], dtype: np.dtype[Any], owner: Any = None
    ) -> ArrayView:
        strides = packed_strides(shape, dtype)
        return ArrayView(ptr, shape, strides, dtype, self._device, False, owner)

    def _rows_at(self, ptr: int, sections: Sections) -> Rows:
        """Return the arrays that lie at an address."""
        return {
            name: self._view(ptr + sections.offset(name), *spec)
            for name, spec in sections.spec.items()
        }

    def _upload(self, arrays: dict[str, npt.NDArray[Any]]) -> Rows:
        """Copy arrays to the GPU, all in one piece of memory."""
        sections = Sections({name: (array.shape, array.dtype) for name, array in arrays.items()})
        packed = np.empty(sections.end, np.uint8)
        for name, array in arrays.items():
            sections.view(packed, name)[...] = array
        memory = self._copies.empty_in_pool(max(1, sections.end))
        self.put(packed, self._view(memory.ptr, packed.shape, packed.dtype))
        views = self._rows_at(memory.ptr, sections)
        return {name: view._replace(owner=memory) for name, view in views.items()}

    def put(self, array: npt.NDArray[Any], view: ArrayView) -> None:
        """See `Moves.put`; waits, as the array may go."""
        stream = self._engine.call_stream()
        if array.size:
            raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            self._copies.to_device(raw, view.ptr, stream)
            self._copies.synchronize(stream)

    def _fetch(self, views: Sequence[ArrayView]) -> list[npt.NDArray[Any]]:
        """Wait for contiguous arrays of the GPU, and return what they hold."""
        stream, found = self._engine.call_stream(), []
        for view in views:
            memory = self._copies.empty_on_host(view.num_bytes)
            if view.num_bytes:
                self._copies.to_host(view.ptr, memory, stream)
            found.append(memory.view(view.dtype).reshape(view.shape))
        self._copies.synchronize(stream)
        return found

    # --- layout --------------------------------------------------------------------------------

    def make_layout(self, topk_idx: ArrayView, num_experts: int, allocate: Allocate) -> LayoutViews:
        """See `Moves.make_layout`: counted on the host, which a dispatch needs it on."""
        (idx,) = self._fetch([topk_idx])
        made = make_layout(
            *(view_numpy(idx), num_experts, self._topology),
            lambda shape, dtype: view_numpy(np.empty(shape, dtype)),
        )
        given = []
        for host in made:
            view = None if host is None else allocate(host.shape, host.dtype)
            if host is not None and view is not None:
                self.put(host.numpy(), view)
            given.append(view)
        per_rank, per_node, per_expert, in_rank = given
        assert per_rank is not None
        assert per_expert is not None
        assert in_rank is not None
        return LayoutViews(per_rank, per_node, per_expert, in_rank)

    def fetch(self, layout: LayoutViews, topk: TopK | None) -> tuple[LayoutViews, ArrayView | None]:
        """See `Moves.fetch`."""
        wanted = [layout.num_tokens_per_rank, layout.num_tokens_per_expert, layout.is_token_in_rank]
        if topk is not None:
            wanted.append(topk.idx)
        per_rank, per_expert, in_rank, *choices = map(view_numpy, self._fetch(wanted))
        return LayoutViews(per_rank, None, per_expert, in_rank), choices[0] if choices else None

    def check(self, request: DispatchRequest | CombineRequest, max_tokens: int = 0) -> None:
        """See `Moves.check`."""
        self._engine.check_part(request, max_tokens)

    # --- messages ------------------------------------------------------------------------------

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Let copies begin behind what the call's stream holds; end when all are done."""
        begun = streams.record(self._engine.call_stream())
        for stream in (self._to_host, self._to_device):
            streams.wait(stream.ptr, begun)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, TransportError):  # of which the node has been told
                self._engine.fail(self._topology.rank)
            # Nobody may use memory that kernels of a call which has failed still write.
            self._copies.synchronize(self._engine.call_stream())
            raise
        finally:
            # Nor while it is copied.
            for stream in (self._to_host, self._to_device):
                self._copies.synchronize(stream.ptr)

    # --- dispatch ------------------------------------------------------------------------------

    def dispatch(
        self,
        link: RailLink,
        request: DispatchRequest,
        routes: RailRoutes,
        pairs: Sequence[npt.NDArray[np.int32]] | None,
        out: DispatchInto,
    ) -> npt.NDArray[np.int64]:
        """See `Moves.dispatch`."""
        topology, stream = self._topology, self._engine.call_stream()
        if pairs is not None:
            assert request.layout is not None  # the Buffer gives it or a handle
            num_experts = request.layout.num_tokens_per_expert.shape[0]
            routes.of_moves = make_device_routes(topology, routes, pairs, num_experts, self._upload)
        known: DeviceRoutes = routes.of_moves
        inputs, outputs = inputs_of(request), outputs_of(out)
        gathered = self._stage("gathered", sections_of(inputs, known.longest_chunk).end)
        largest = sections_of(inputs, self._most_coming(known)).end
        halves = [self._stage(f"received {i}", largest) for i in range(2)]
        self._stage_parts(known, outputs)
        own = self._own_rows(known, inputs)
        window = _window(inputs, known, request.chunks)
        messages = self._messages(inputs, known.coming)
        with link.transfer("dispatch: rows", window, messages) as transfer, self._copying():
            counts = self._spread(known.parts[topology.node], request, own, outputs)
            spread: deque[Any] = deque(maxlen=len(halves))
            for k, (to, source) in enumerate(self._rounds()):
                if len(spread) == len(halves):
                    streams.wait(self._to_device.ptr, spread[0])
                part = known.parts[source]
                rows = self._rows_at(halves[k % 2], sections_of(inputs, part.num_rows))
                self._exchange.run(
                    *(transfer, to),
                    [self._gathering(known, inputs, gathered, to, run) for run in known.going[to]],
                    source,
                    [self._filling(some_of(rows, run)) for run in known.coming[source]],
                )
                streams.wait(stream, streams.record(self._to_device.ptr))
                counts = counts + self._spread(part, request, rows, outputs)
                spread.append(streams.record(stream))
        if out.topk is not None:
            self._clear_choices(out.topk.idx, int(routes.num_arriving.sum()))
        return counts

    def _most_coming(self, known: DeviceRoutes) -> int:
        """Return the rows that come from the node of which most do."""
        return max(known.parts[node].num_rows for node in self._topology.nodes_before())

    def _gathering(
        self, known: DeviceRoutes, inputs: Rows, gathered: int, node: int, run: Run
    ) -> Piece:
        """Return the message with a chunk of this rank's rows for a node."""
        sections = sections_of(inputs, run.num_rows)

        def copy(slot: Bytes) -> None:
            stream, rows = self._to_host.ptr, self._rows_at(gathered, sections)
            tokens = rows_of(known.outgoing[node], run)
            for name, view in inputs.items():
                self._copies.gather(view, tokens, rows[name].ptr, stream)
            if "topk_idx" in rows:
                self._copies.look_up(known.numbers[node], rows["topk_idx"], stream)
            self._copies.copy(gathered, self._copies.address(slot), sections.end, stream)

        return Piece(sections.end, copy)

    def _clear_choices(self, idx: ArrayView, num_rows: int) -> None:
        """Set the choices behind so many rows to -1."""
        left = rows_of(idx, Run(num_rows, idx.shape[0] - num_rows))
        if left.num_bytes:
            self._copies.set_bits(left.ptr, left.num_bytes, self._engine.call_stream())

    def _own_rows(self, known: DeviceRoutes, inputs: Rows) -> Rows:
        """Return this rank's rows, with the experts' numbers in the node."""
        if "topk_idx" not in inputs:
            return inputs
        view, stream = inputs["topk_idx"], self._engine.call_stream()
        choices = self._view(self._stage("own choices", view.num_bytes), view.shape, view.dtype)
        if view.num_bytes:
            self._copies.copy(view.ptr, choices.ptr, view.num_bytes, stream)
            self._copies.look_up(known.numbers[self._topology.node], choices, stream)
        return {**inputs, "topk_idx": choices}

    def _spread(
        self, part: Part, request: DispatchRequest, rows: Rows, outputs: Rows
    ) -> npt.NDArray[np.int64]:
        """Dispatch a part's rows inside this node (collective there); return the experts' pairs."""
        into = self._in_one_piece(part, outputs)
        result = self._engine.dispatch(
            request._replace(
                data=rows["data"],
                scales=rows.get("scales"),
                layout=None if part.handle else part.layout,
                topk=topk_of(rows),
                handle=part.handle,
                expert_alignment=1,
                num_worst_tokens=0,
                into=DispatchInto(into["data"], into.get("scales"), topk_of(into), ()),
            )
        )
        self._copy_runs(part, into, outputs)
        part.handle = result.handle
        return np.array(result.num_recv_tokens_per_expert, np.int64)

    # --- combine -------------------------------------------------------------------------------

    def combine(
        self, link: RailLink, request: CombineRequest, routes: RailRoutes, out: CombineResult
    ) -> None:
        """See `Moves.combine`."""
        stream = self._engine.call_stream()
        known: DeviceRoutes = routes.of_moves
        inputs, outputs = {"data": request.data}, {"data": out.data}
        if request.topk_weights is not None and out.topk_weights is not None:
            inputs["topk_weights"] = request.topk_weights
            outputs["topk_weights"] = out.topk_weights
        sent = self._stage("sums to send", sections_of(inputs, self._most_coming(known)).end)
        all_sums = sections_of(inputs, known.num_sums)
        sums = self._rows_at(self._stage("sums", all_sums.end), all_sums)
        self._stage_parts(known, inputs)
        window = _window(inputs, known, request.chunks)
        messages = self._messages(inputs, known.going)
        with link.transfer("combine: rows", window, messages) as transfer, self._copying():
            for to, source in self._rounds():
                part, first = known.parts[to], known.first_sums[source]
                rows = self._rows_at(sent, sections_of(inputs, part.num_rows))
                self._sum(part, request, inputs, rows)
                streams.wait(self._to_host.ptr, streams.record(stream))
                runs = [Run(first + run.first, run.num_rows) for run in known.going[source]]
                self._exchange.run(
                    *(transfer, to),
                    [self._reading(some_of(rows, run)) for run in known.coming[to]],
                    source,
                    [self._filling(some_of(sums, run)) for run in runs],
                )
            streams.wait(stream, streams.record(self._to_device.ptr))
            further = FurtherSums(sums["data"], sums.get("topk_weights"), known.places)
            part = known.parts[self._topology.node]
            self._sum(part, request, inputs, outputs, request.biases, further)

    def _sum(
        self,
        part: Part,
        request: CombineRequest,
        inputs: Rows,
        outputs: Rows,
        biases: tuple[ArrayView, ...] = (),
        further: FurtherSums | None = None,
    ) -> None:
        """Sum a part's rows inside this node. Collective there."""
        assert part.handle is not None  # of the dispatch that is undone
        rows = self._in_one_piece(part, inputs)
        self._copy_runs(part, rows, inputs, is_back=True)
        self._engine.combine(
            request._replace(
                data=rows["data"],
                topk_weights=rows.get("topk_weights"),
                biases=biases,
                handle=part.handle,
                into=CombineResult(outputs["data"], outputs.get("topk_weights")),
                further_sums=further,
            )
        )

    # --- both ----------------------------------------------------------------------------------

    def _rounds(self) -> list[tuple[int, int]]:
        """Return, round by round, the node that is sent to and the one that is received from."""
        return list(zip(self._topology.nodes_after(), self._topology.nodes_before(), strict=True))

    def _messages(self, rows: Rows, chunks: Sequence[Sequence[Run]]) -> list[Message]:
        """Return all messages that come, given their chunks by node."""
        return [
            Message(node, sections_of(rows, run.num_rows).end)
            for node in self._topology.nodes_before()
            for run in chunks[node]
        ]

    def _reading(self, rows: Rows) -> Piece:
        """Return the message that carries arrays, all of them."""
        sections = sections_of(rows, rows["data"].shape[0])

        def copy(slot: Bytes) -> None:
            for name, view in rows.items():
                at = self._copies.address(slot) + sections.offset(name)
                if view.num_bytes:
                    self._copies.copy(view.ptr, at, view.num_bytes, self._to_host.ptr)

        return Piece(sections.end, copy)

    def _filling(self, rows: Rows) -> Piece:
        """Return the message that fills arrays, all of them."""
        sections = sections_of(rows, rows["data"].shape[0])

        def copy(slot: Bytes) -> None:
            for name, view in rows.items():
                at = self._copies.address(slot) + sections.offset(name)
                if view.num_bytes:
                    self._copies.copy(at, view.ptr, view.num_bytes, self._to_device.ptr)

        return Piece(sections.end, copy)

    def _stage_parts(self, known: DeviceRoutes, rows: Rows) -> None:
        """Have memory for the parts whose rows do not lie in one piece."""
        scattered = [part.num_recv for part in known.parts if len(part.runs) > 1]
        if scattered:
            self._stage("one part", sections_of(rows, max(scattered)).end)

    def _in_one_piece(self, part: Part, rows: Rows) -> Rows:
        """Return a part's rows among all that arrive here; memory for them if they are apart."""
        if len(part.runs) == 1:
            return some_of(rows, part.runs[0])
        sections = sections_of(rows, part.num_recv)
        return self._rows_at(self._stage("one part", sections.end), sections)

    def _copy_runs(self, part: Part, piece: Rows, rows: Rows, is_back: bool = False) -> None:
        """Copy a part in one piece to where its rows lie apart, or back; nothing if they do not."""
        if len(part.runs) == 1:
            return
        stream, begin = self._engine.call_stream(), 0
        for run in part.runs:
            for name, view in rows.items():
                here, there = rows_of(piece[name], Run(begin, run.num_rows)), rows_of(view, run)
                source, to = (there, here) if is_back else (here, there)
                if to.num_bytes:
                    self._copies.copy(source.ptr, to.ptr, to.num_bytes, stream)
            begin += run.num_rows


def _window(rows: Rows, known: DeviceRoutes, chunks: Chunks) -> Window:
    depth = chunks.num_in_flight
    return Window(sections_of(rows, known.longest_chunk).end, depth, depth)
