"""The Buffer: the public object. It checks arguments and asks an engine; it touches no pointer."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, ClassVar

from epcomm import arguments, env, topology
from epcomm.arguments import KnownLayout, Place, view_of
from epcomm.arrays import CPU, ArrayView, gpu, packed_strides
from epcomm.config import Config, check_num_sms
from epcomm.engines import choose_engine
from epcomm.engines.base import (
    DEFAULT_CHUNKS,
    Allocate,
    Chunks,
    CombineRequest,
    DispatchRequest,
    Engine,
    StreamOrder,
)
from epcomm.engines.make import EngineSetup, make_engine
from epcomm.errors import ClosedError, InvalidArgument, RankMismatch, UnsupportedConfig, kind_of
from epcomm.events import EventHandle, EventOverlap
from epcomm.frameworks import Framework, framework_of, framework_of_dtype
from epcomm.gpus import CudaErrors, current_gpu, find_num_gpus, has_bulk_copies
from epcomm.group import Group, as_group
from epcomm.handle import DispatchHandle
from epcomm.low_latency import LowLatencyCalls

_buffer_ids = itertools.count(1)


class Buffer(LowLatencyCalls):
    """Moves tokens to the ranks of their experts, and experts' results back.

    All arrays of a call are of one device; what comes out is of the framework of ``x``. Transfers,
    construction and `destroy` are collective: every rank of the group calls them, in one order, and
    from one thread at a time.

    Args:
        group: The ranks: an mpi4py communicator, a torch.distributed ProcessGroup, or a group from
            `run_threads`.
        num_nvl_bytes: Bytes a rank to reserve for dispatch and combine, see
            `Config.get_nvl_buffer_size_hint`; 0 reserves at the first calls. Grows when too small.
        num_rdma_bytes: The same for low-latency calls, see `get_low_latency_rdma_size_hint`; and
            where the group spans nodes, for rows on their way between them, see
            `Config.get_rdma_buffer_size_hint`.
        low_latency_mode: Kept as an attribute; low-latency calls work either way.
        num_qps_per_rank: Not used.
        allow_nvlink_for_low_latency_mode: Not used.
        allow_mnnvl: Not used.
        use_fabric: Not used.
        explicitly_destroy: Kept as an attribute; `destroy` may be called either way.
        enable_shrink: Let low-latency calls go on without ranks that do not answer in time: that
            for ``timeout_s`` neither come nor wait for others in a low-latency call themselves.
        comm: An mpi4py communicator, in place of ``group``.
        engine: ``"cuda"`` for arrays on GPUs that reach each other inside a node; ``"host"`` for
            arrays in CPU memory or, with ``device=``, for arrays on that GPU, which are copied
            through host memory; ``"auto"`` is the cuda engine where CuPy finds a GPU, else the
            host engine. None takes EPCOMM_ENGINE.
        timeout_s: Deadline of every wait, in seconds; None takes EPCOMM_TIMEOUT_S.
        device: Number of this rank's GPU; None takes the one that is current (CuPy, torch), and
            with ``engine="host"`` the CPU. JAX changes it at will, so name it there.

    Attributes:
        rank: This rank.
        group_size: Number of ranks.
        group: What was passed as group or comm.
        id: Number of this Buffer in this process; its handles carry it.

    Raises:
        InvalidArgument: An argument is wrong.
        RankMismatch: Ranks passed different values.
        UnsupportedConfig: The engine cannot serve this group.
        TransportError: Memory could not be shared.

    Where a call of CUDA fails, the calls of a Buffer raise CudaError.
    """

    #: Multiprocessors of a GPU that calls without a config may use.
    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        engine: str | None = None,
        timeout_s: float | None = None,
        device: int | None = None,
    ) -> None:
        self._engine: Engine | None = None
        #: The last layout, until it is dispatched.
        self._known_layout: KnownLayout | None = None
        if (group is None) == (comm is None):
            raise InvalidArgument(
                "Buffer needs a group or a comm, and not both; pass an mpi4py communicator, a "
                "torch.distributed ProcessGroup, or the group that run_threads gives."
            )
        self.group = comm if group is None else group
        self.num_nvl_bytes = arguments.whole_number(num_nvl_bytes, "num_nvl_bytes", 0, None)
        self.num_rdma_bytes = arguments.whole_number(num_rdma_bytes, "num_rdma_bytes", 0, None)
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        settings = env.settings()
        self.timeout_s = settings.timeout_s if timeout_s is None else _seconds(timeout_s)
        name, number = engine_and_gpu(engine, device)  # before any peer is touched
        ranks = as_group(self.group, self.timeout_s)
        self.rank = ranks.rank
        self._cuda_errors = CudaErrors(self.rank)
        self.group_size = ranks.size
        self.id = next(_buffer_ids)
        _agree_on_setup(
            ranks,
            {
                "num_nvl_bytes": self.num_nvl_bytes,
                "num_rdma_bytes": self.num_rdma_bytes,
                "enable_shrink": enable_shrink,
                "engine": name,
                "EPCOMM_SHM_DIR": settings.shm_dir,
            },
            self.timeout_s,
        )
        self._topology = topology.discover(ranks, settings, self.timeout_s)
        if name == "cuda" and number is None:
            number = current_gpu()
        self._place = Place(CPU if number is None else gpu(number), ranks.size)
        setup = EngineSetup(
            device=self._place.device,
            num_bytes=self.num_nvl_bytes,
            num_rdma_bytes=self.num_rdma_bytes,
            can_mask=self.enable_shrink,
            num_sms=lambda: Buffer.num_sms,
            shm_dir=settings.shm_dir,
            timeout_s=self.timeout_s,
            buffer_id=self.id,
        )
        with self._cuda_errors:
            self._engine = make_engine(name, ranks, self._topology, setup)

    def __repr__(self) -> str:
        if self._engine is None:
            return f"<epcomm.Buffer rank {self.rank} of {self.group_size}, destroyed>"
        slab = self._engine.slab_bytes() / 2**20
        return (
            f"<epcomm.Buffer rank {self.rank} of {self.group_size}, {self._engine.name} engine, "
            f"slab {slab:.1f} MiB>"
        )

    def destroy(self) -> None:
        """Let go of all shared memory. Every rank calls it; calling it again does nothing."""
        if self._engine is not None:
            engine, self._engine, self._known_layout = self._engine, None, None
            with self._cuda_errors:
                engine.close(is_collective=True)

    def __del__(self) -> None:
        # Collected without destroy(), at a moment of its own: peers cannot be waited for.
        engine = getattr(self, "_engine", None)
        if engine is not None and not sys.is_finalizing():
            engine.close(is_collective=False)

    @property
    def is_destroyed(self) -> bool:
        """Whether `destroy` was called."""
        return self._engine is None

    def _open(self) -> Engine:
        if self._engine is None:
            raise ClosedError(f"{self!r}: this call came after destroy(); make a new Buffer.")
        return self._engine

    # --- settings ------------------------------------------------------------------------------

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the multiprocessors that calls without a config may use: even, at least 2."""
        check_num_sms(new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """Return the recommended config of dispatch for a number of ranks."""
        arguments.whole_number(num_ranks, "num_ranks", 1)
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """Return the recommended config of combine for a number of ranks."""
        return Buffer.get_dispatch_config(num_ranks)

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Return whether this machine's GPU gets kernels with Hopper's bulk copies (sm_90)."""
        return find_num_gpus() > 0 and has_bulk_copies()

    @staticmethod
    def capture() -> EventOverlap:
        """Return an event recorded now on the caller's current stream."""
        return EventOverlap(EventHandle())

    def get_comm_stream(self) -> Any:
        """Return the communication stream, a cupy.cuda.Stream; None for arrays in CPU memory."""
        return self._open().comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: Any,
        size: Any = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Any:
        """Return this rank's own slab as an array. No copy; valid until the slab grows.

        The host engine's is CPU memory, for arrays on a GPU as well.

        Args:
            dtype: A NumPy or torch dtype; decides the framework of what is returned.
            size: Shape, or a number of elements, or None for all there are.
            offset: Bytes to skip, a multiple of the dtype's size.
            use_rdma_buffer: Take the memory of low-latency calls.
        """
        memory = self._open().local_memory(use_rdma_buffer)
        framework, numpy_dtype = framework_of_dtype(dtype, memory.device)
        skip = arguments.whole_number(offset, "offset", 0, None)
        itemsize = numpy_dtype.itemsize
        if size is None:
            size = max(0, memory.num_bytes - skip) // itemsize
        sizes = size if isinstance(size, Iterable) else (size,)
        shape = tuple(arguments.whole_number(n, "size", 0, None) for n in sizes)
        end = skip + math.prod(shape) * itemsize
        if skip % itemsize or end > memory.num_bytes:
            raise InvalidArgument(
                f"size {list(shape)} of {numpy_dtype.name} from byte {skip} ends at byte {end}; it "
                f"must begin at a multiple of {itemsize} and end within the slab's "
                f"{memory.num_bytes} bytes. Ask for less, or pass a larger num_nvl_bytes or "
                "num_rdma_bytes to the Buffer."
            )
        return framework.finish(
            memory._replace(
                ptr=memory.ptr + skip,
                shape=shape,
                strides=packed_strides(shape, numpy_dtype),
                dtype=numpy_dtype,
            )
        )

    # --- layout, dispatch and combine ----------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, Any, Any, EventOverlap]:
        """Count where this rank's tokens go. Not collective.

        Args:
            topk_idx: ``[num_tokens, num_topk]`` int64 or int32 expert ids, -1 for no choice.
            num_experts: Experts over all ranks, a multiple of the number of ranks.
            previous_event: Event to wait for in place of the current stream, unless it is empty;
                arrays of CuPy and JAX are waited for on the current stream as well.
            async_finish: Whether the caller waits through the returned event.
            allocate_on_comm_stream: Allowed with the two above alone; torch's outputs then belong
                to the communication stream, as always with a previous_event.

        Returns:
            ``num_tokens_per_rank [num_ranks] int32``; ``num_tokens_per_rdma_rank [num_nodes]
            int32``, None inside one node; ``num_tokens_per_expert [num_experts] int32``;
            ``is_token_in_rank [num_tokens, num_ranks] bool``; the event.
        """
        engine = self._open()
        arguments.check_events(previous_event, async_finish, allocate_on_comm_stream)
        experts = arguments.num_experts_of(num_experts, self.group_size)
        idx = view_of(
            topk_idx,
            "topk_idx",
            self._place,
            shape=("num_tokens", "num_topk"),
            dtypes=arguments.INDEX_DTYPES,
        )
        framework = framework_of(topk_idx, "topk_idx")
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, previous_event, async_finish, [topk_idx])
            layout = engine.make_layout(idx, experts, self._allocate(framework, order))
            event = self._end(engine, framework, order, (topk_idx, layout))
        per_node = layout.num_tokens_per_node
        # What JAX returns is never what comes back: another array over the same memory.
        self._known_layout = KnownLayout(framework, idx, layout) if framework.is_mutable else None
        return (
            framework.finish(layout.num_tokens_per_rank),
            None if per_node is None else framework.finish(per_node),
            framework.finish(layout.num_tokens_per_expert),
            framework.finish(layout.is_token_in_rank),
            event,
        )

    def dispatch(
        self,
        x: Any,
        handle: DispatchHandle | None = None,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        topk_idx: Any = None,
        topk_weights: Any = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
        *,
        num_experts: int | None = None,
    ) -> tuple[Any, Any, Any, list[int] | None, DispatchHandle | None, EventOverlap]:
        """Move every token's row to each rank that holds one of its experts. Collective.

        Rows arrive by source rank ascending, then source token ascending, bitwise the same in
        every run. M is the number of rows that arrive here.

        Args:
            x: ``[num_tokens, hidden]`` bool, 8- to 64-bit integers, f16, bf16, f32, f64 or fp8, a
                row being a multiple of 16 bytes; or a pair of such data of one byte an element and
                ``[num_tokens, num_scales]`` f32 or int32.
            handle: An earlier dispatch whose routes are taken again, and so many rows come out;
                then no choices are passed, and layout, alignment and num_worst_tokens are not used.
            num_tokens_per_rank: From `get_dispatch_layout`, as the three that follow.
            num_tokens_per_rdma_rank: Not used: the other arrays tell it.
            is_token_in_rank: See above.
            num_tokens_per_expert: See above.
            topk_idx: ``[num_tokens, num_topk]`` int64 or int32 expert ids, -1 for no choice; they
                travel along, with their weights.
            topk_weights: ``[num_tokens, num_topk] f32``.
            expert_alignment: The returned counts are rounded up to it.
            num_worst_tokens: If above 0, exactly so many rows come out, and the host learns no
                count. More arrivals than that are an error on every rank. On the cuda engine all
                ranks pass one, or none does.
            config: Tuning numbers; None takes the recommended ones.
            previous_event: Event to wait for in place of the current stream, unless it is empty;
                arrays of CuPy and JAX are waited for on the current stream as well.
            async_finish: Whether the caller waits through the returned event.
            allocate_on_comm_stream: Allowed with the two above alone; torch's outputs then belong
                to the communication stream, as always with a previous_event.
            num_experts: In place of the layout arrays, with topk_idx: the layout is made here.

        Returns:
            ``recv_x`` of the form of x, ``[M, hidden]`` (and scales ``[M, num_scales]``);
            ``recv_topk_idx [M, num_topk]`` local expert ids, -1 where the expert is elsewhere;
            ``recv_topk_weights [M, num_topk] f32``, 0.0 there; tokens for each local expert as a
            list; the handle; the event. With a handle the middle four are None. Arrays are the
            caller's; on GPUs they may be the first rows of somewhat larger memory.

        Raises:
            InvalidArgument: An argument is wrong; nothing was sent.
            RankMismatch: Ranks disagree; nothing was sent.
            CommTimeout: A rank did not take part in time.
        """
        engine = self._open()
        arguments.check_events(previous_event, async_finish, allocate_on_comm_stream)
        _check_config(config)
        framework, data, scales = arguments.view_rows(x, self._place)
        topk = layout = known = None
        experts = 0
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise InvalidArgument(
                    "topk_idx and topk_weights were passed with a handle; the handle already "
                    "holds the routes: pass one or the other."
                )
            known = arguments.check_handle(handle, self.id, data)
            inputs = [x]
        else:
            num_tokens, place = data.shape[0], self._place
            known_layout = self._known_layout
            topk = arguments.view_topk(topk_idx, topk_weights, num_tokens, place, known_layout)
            given = (num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank)
            if num_experts is not None:
                if (
                    topk is None
                    or num_tokens_per_rank is not None
                    or num_tokens_per_expert is not None
                    or is_token_in_rank is not None
                ):
                    raise InvalidArgument(
                        "num_experts= stands for the layout arrays: pass it with topk_idx and "
                        "without num_tokens_per_rank, num_tokens_per_expert and is_token_in_rank."
                    )
                experts = arguments.num_experts_of(num_experts, self.group_size)
                if not engine.makes_layout_in_dispatch:
                    given = self._layout_of(topk_idx, experts, previous_event, async_finish)
                    experts = 0
                    known_layout = self._known_layout
            if not experts:
                layout = arguments.view_layout(
                    *given, num_tokens, place, known_layout, has_choices=topk is not None
                )
                if known_layout is not None and layout is known_layout.layout:
                    self._known_layout = None
            inputs = [x, topk_idx, topk_weights, *given]
        alignment = arguments.whole_number(expert_alignment, "expert_alignment", 1)
        num_rows = arguments.whole_number(num_worst_tokens, "num_worst_tokens", 0)
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, previous_event, async_finish, inputs)
            request = DispatchRequest(
                data=data,
                scales=scales,
                layout=layout,
                topk=topk,
                handle=known,
                expert_alignment=alignment,
                num_worst_tokens=num_rows,
                num_sms=config.num_sms if config else None,
                allocate=self._allocate(framework, order),
                chunks=_chunks_of(config),
                num_experts=experts,
            )
            result = engine.dispatch(request)
            event = self._end(engine, framework, order, (inputs, result))
        recv_x = _finish(framework, result.data, result.scales)
        if handle is not None:
            return recv_x, None, None, None, None, event
        idx = weights = None
        if result.topk is not None:
            idx, weights = map(framework.finish, (result.topk.idx, result.topk.weights))
        return recv_x, idx, weights, result.num_recv_tokens_per_expert, result.handle, event

    def _layout_of(
        self,
        topk_idx: Any,
        num_experts: int,
        previous_event: EventOverlap | None,
        async_finish: bool,
    ) -> tuple[Any, Any, Any]:
        per_rank, _, per_expert, in_rank, _ = self.get_dispatch_layout(
            topk_idx, num_experts, previous_event, async_finish
        )
        return per_rank, per_expert, in_rank

    def combine(
        self,
        x: Any,
        handle: DispatchHandle,
        topk_weights: Any = None,
        bias: Any = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Any, EventOverlap]:
        """Bring rows back to their tokens' ranks and sum them. Collective.

        The sum is plain, in fp32, rank ascending from the bias, and rounded once. A token that
        went nowhere gives the bias, or zeros.

        Args:
            x: ``[M, hidden]`` bf16, f16 or f32, the rows in the order of dispatch.
            handle: From the dispatch that is undone.
            topk_weights: ``[M, num_topk] f32``, summed elementwise alongside.
            bias: None, or one or two ``[num_tokens, hidden]`` of the dtype of x.
            config: Tuning numbers; None takes the recommended ones.
            previous_event: Event to wait for in place of the current stream, unless it is empty;
                arrays of CuPy and JAX are waited for on the current stream as well.
            async_finish: Whether the caller waits through the returned event.
            allocate_on_comm_stream: Allowed with the two above alone; torch's outputs then belong
                to the communication stream, as always with a previous_event.

        Returns:
            ``combined_x [num_tokens, hidden]``; ``combined_topk_weights [num_tokens, num_topk]``
            or None; the event.

        Raises:
            InvalidArgument: An argument is wrong; nothing was sent.
            RankMismatch: Ranks disagree; nothing was sent.
            CommTimeout: A rank did not take part in time.
        """
        engine = self._open()
        arguments.check_events(previous_event, async_finish, allocate_on_comm_stream)
        _check_config(config)
        known = arguments.check_handle(handle, self.id)
        framework = framework_of(x, "x")
        views = arguments.view_combine(x, known, topk_weights, bias, self._place)
        inputs = [x, topk_weights, bias]
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, previous_event, async_finish, inputs)
            request = CombineRequest(
                data=views.data,
                topk_weights=views.topk_weights,
                biases=views.biases,
                handle=known,
                num_sms=config.num_sms if config else None,
                allocate=self._allocate(framework, order),
                chunks=_chunks_of(config),
            )
            result = engine.combine(request)
            event = self._end(engine, framework, order, (inputs, known, result))
        weights = result.topk_weights
        return (
            framework.finish(result.data),
            None if weights is None else framework.finish(weights),
            event,
        )

    # --- streams -------------------------------------------------------------------------------

    def _begin(
        self,
        engine: Engine,
        framework: Framework,
        previous_event: EventOverlap | None,
        async_finish: bool,
        inputs: Sequence[Any],
    ) -> StreamOrder:
        """Order the next call after the caller's work."""
        if not framework.has_streams:
            framework.wait_ready(inputs)
        # An empty event, as of a call that was not asynchronous, says nothing of the caller's work.
        event = None if previous_event is None else previous_event.event
        order = StreamOrder(
            current_stream=framework.current_stream(self._place.device),
            # Where memory of the current stream may be reused, waiting for it is the price.
            waits_for_current=event is None or not framework.tracks_streams,
            previous_event=event,
            is_async=async_finish,
        )
        engine.begin(order)
        return order

    def _end(
        self, engine: Engine, framework: Framework, order: StreamOrder, keep: Any
    ) -> EventOverlap:
        """Order the caller's work after the call; return the call's event."""
        event = engine.end(order, keep)
        if not framework.has_streams:
            engine.synchronize()
        if not order.is_async:
            return EventOverlap()
        device = self._place.device
        handle = EventHandle.of(event, lambda: framework.current_stream(device))
        return EventOverlap(handle, (keep,))

    def _allocate(self, framework: Framework, order: StreamOrder) -> Allocate:
        device, empty = self._place.device, framework.empty
        stream = None
        if not order.waits_for_current:
            comm_stream = self._open().comm_stream()
            stream = None if comm_stream is None else comm_stream.ptr
        return lambda shape, dtype: empty(shape, dtype, device, stream)


def _agree_on_setup(group: Group, mine: dict[str, Any], timeout_s: float) -> None:
    """Hold all ranks to the same construction arguments. Collective."""
    said = group.allgather(mine, timeout_s=timeout_s, phase="making a Buffer")
    for name in mine:
        values = [other.get(name) for other in said]
        if any(value != values[0] for value in values):
            shown = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values[:16]))
            raise RankMismatch(
                f"Buffer: ranks disagree on {name} ({shown}). Every rank must pass the same."
            )


def engine_and_gpu(engine: str | None, device: Any) -> tuple[str, int | None]:
    """Return which engine and which GPU a Buffer's arguments stand for, or raise.

    Args:
        engine: As in `Buffer`.
        device: As in `Buffer`.

    Returns:
        The engine's name; the GPU's number, None where none was named.

    Raises:
        InvalidArgument: There is no such engine or GPU.
        UnsupportedConfig: This machine cannot serve it.
    """
    name = choose_engine(arguments.engine_name(engine or env.settings().engine))
    return name, None if device is None else _gpu_number(device)


def _gpu_number(device: Any) -> int:
    """Return the number of a GPU, or raise."""
    num_gpus = find_num_gpus()
    if not num_gpus:
        raise UnsupportedConfig(
            f"device={device}, but CuPy finds no GPU here (python -m epcomm info tells what was "
            "found); leave device out, for CPU arrays."
        )
    number = arguments.whole_number(device, "device", 0)
    if number >= num_gpus:
        raise InvalidArgument(f"device is {number}; it must be below {num_gpus}, a GPU's number.")
    return number


def _seconds(timeout_s: Any) -> float:
    seconds = float(timeout_s) if isinstance(timeout_s, Real) else 0.0
    if not 0 < seconds < float("inf"):
        raise InvalidArgument(f"timeout_s is {timeout_s!r}; it must be a number of seconds > 0.")
    return seconds


def _check_config(config: Any) -> None:
    if config is not None and not isinstance(config, Config):
        raise InvalidArgument(f"config is {kind_of(config)}; pass an epcomm.Config or None.")


def _chunks_of(config: Config | None) -> Chunks:
    if config is None:
        return DEFAULT_CHUNKS
    return Chunks(config.num_max_rdma_chunked_recv_tokens, config.num_max_rdma_chunked_send_tokens)


def _finish(framework: Framework, data: ArrayView, scales: ArrayView | None) -> Any:
    if scales is None:
        return framework.finish(data)
    return framework.finish(data), framework.finish(scales)
