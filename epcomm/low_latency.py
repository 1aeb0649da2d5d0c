"""The low-latency half of the Buffer: fixed shapes, no host wait for counts, receive hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from epcomm import arguments, cuda_layout, env
from epcomm.arguments import INT32, INT64, Place, view_of
from epcomm.arrays import BFLOAT16, ArrayView
from epcomm.engines import choose_engine, host_low_latency
from epcomm.engines.base import (
    Allocate,
    CombinePrecision,
    Engine,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
    LowLatencyShape,
    StreamOrder,
)
from epcomm.errors import InvalidArgument, kind_of
from epcomm.events import EventOverlap
from epcomm.frameworks import Framework, framework_of, writable_framework
from epcomm.gpus import CudaErrors

Hook = Callable[[], None]


class LowLatencyCalls:
    """Calls of `Buffer` for decoding; the Buffer has the attributes and methods declared here."""

    group_size: int
    enable_shrink: bool
    _place: Place
    _cuda_errors: CudaErrors

    def _open(self) -> Engine:
        raise NotImplementedError

    def _begin(
        self,
        engine: Engine,
        framework: Framework,
        previous_event: Any,
        async_finish: bool,
        inputs: Sequence[Any],
    ) -> StreamOrder:
        raise NotImplementedError

    def _end(
        self, engine: Engine, framework: Framework, order: StreamOrder, keep: Any
    ) -> EventOverlap:
        raise NotImplementedError

    def _allocate(self, framework: Framework, order: StreamOrder) -> Allocate:
        raise NotImplementedError

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_ranks: int,
        num_experts: int,
        *,
        engine: str | None = None,
    ) -> int:
        """Return the bytes a rank with which low-latency calls of this shape never have to grow.

        Engines need different amounts.

        Args:
            num_max_dispatch_tokens_per_rank: Most tokens that a rank passes in one call.
            hidden: Elements of a row.
            num_ranks: Ranks of the group.
            num_experts: Experts over all ranks.
            engine: The Buffer's; None takes EPCOMM_ENGINE.
        """
        arguments.whole_number(num_ranks, "num_ranks", 1)
        shape = arguments.low_latency_shape(
            num_max_dispatch_tokens_per_rank, hidden, num_experts, num_ranks
        )
        name = arguments.engine_name(engine or env.settings().engine)
        if name == "cuda" or (name == "auto" and choose_engine(name) == "cuda"):
            return cuda_layout.low_latency_region_bytes(shape)
        return host_low_latency.region_bytes(shape)

    def low_latency_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Any = None,
        dispatch_wait_recv_cost_stats: Any = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Any, tuple[Any, Any, int, int, int], EventOverlap, Hook | None]:
        """Send each token to its experts, with fixed output shapes. Collective.

        L is the number of local experts. An expert's rows lie by source rank, then token.

        Args:
            x: ``[num_tokens, hidden] bf16``, at most num_max_dispatch_tokens_per_rank tokens.
            topk_idx: ``[num_tokens, num_topk]`` int64 or int32, at most 32 choices, all different,
                -1 for no choice.
            num_max_dispatch_tokens_per_rank: The same on every rank.
            num_experts: Experts over all ranks, a multiple of the number of ranks.
            cumulative_local_expert_recv_stats: ``[L] int32``; received rows are added.
            dispatch_wait_recv_cost_stats: ``[num_ranks] int64``; microseconds that were waited for
                each rank are added: on the cuda engine while this rank still sends, too.
            use_fp8: Send e4m3 with one scale a block of 128; hidden a multiple of 128.
            round_scale: Round the scales up to powers of two.
            use_ue8m0: Pack the exponents of four such scales into an int32.
            async_finish: Whether the caller waits through the returned event.
            return_recv_hook: Only send now; rows are received when the hook is called.

        Returns:
            ``recv_x [L, num_ranks * max, hidden] bf16``, or such e4m3 and scales ``[L, num_ranks *
            max, hidden / 128] f32`` (``hidden / 512`` int32), rows innermost in memory;
            ``recv_count [L] int32``; the handle; the event; the hook or None.

        Raises:
            InvalidArgument: An argument is wrong, or two earlier hooks were not called yet.
            RankMismatch: Ranks disagree. On the cuda engine the next call raises it, and the
                outputs of this one hold anything.
            CommTimeout: A rank did not take part in time.
        """
        engine = self._open()
        place = self._place
        framework = framework_of(x, "x")
        _check_hook(async_finish, return_recv_hook)
        data = view_of(x, "x", place, shape=("num_tokens", "hidden"), dtypes=(BFLOAT16,))
        arguments.check_row(data, "x")
        num_tokens, hidden = data.shape
        shape = arguments.low_latency_shape(
            num_max_dispatch_tokens_per_rank, hidden, num_experts, self.group_size
        )
        if num_tokens > shape.num_max_tokens:
            raise InvalidArgument(
                f"x has {num_tokens} tokens; num_max_dispatch_tokens_per_rank is "
                f"{shape.num_max_tokens}. Pass at least as many, the same on every rank."
            )
        idx = arguments.low_latency_topk(topk_idx, num_tokens, place)
        fp8 = arguments.fp8_format(use_fp8, round_scale, use_ue8m0, hidden)
        recv_stats = _optional_stats(
            cumulative_local_expert_recv_stats,
            "cumulative_local_expert_recv_stats",
            place,
            shape.num_local_experts,
            INT32,
        )
        wait_stats = _optional_stats(
            dispatch_wait_recv_cost_stats,
            "dispatch_wait_recv_cost_stats",
            place,
            self.group_size,
            INT64,
        )
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, None, async_finish, [x, topk_idx])
            request = LowLatencyDispatchRequest(
                data=data,
                topk_idx=idx,
                shape=shape,
                fp8=fp8,
                recv_stats=recv_stats,
                wait_stats=wait_stats,
                has_hook=return_recv_hook,
                allocate=self._allocate(framework, order),
            )
            result = engine.low_latency_dispatch(request)
            if not return_recv_hook:
                result.receive()
            event = self._end(engine, framework, order, (x, topk_idx, result))
        recv_x = framework.finish(result.data)
        if result.scales is not None:
            recv_x = recv_x, framework.finish(_rows_innermost(result.scales))
        handle = (
            framework.finish(result.src_info),
            framework.finish(result.layout_range),
            shape.num_max_tokens,
            hidden,
            shape.num_experts,
        )
        return (
            recv_x,
            framework.finish(result.recv_count),
            handle,
            event,
            self._hook(framework, result.receive, result) if return_recv_hook else None,
        )

    def _hook(self, framework: Framework, receive: Hook, keep: Any) -> Hook:
        """Return a function that receives, ordered by the stream that is current then.

        Arrays to keep live as long as the function does.
        """

        def hook() -> None:
            engine = self._open()
            with self._cuda_errors, engine.active():
                order = self._begin(engine, framework, None, False, [])
                receive()
                self._end(engine, framework, order, (receive, keep))

        return hook

    def low_latency_combine(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        handle: tuple[Any, Any, int, int, int],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Any = None,
        combine_wait_recv_cost_stats: Any = None,
        *,
        combine_precision: str = "rank",
    ) -> tuple[Any, EventOverlap, Hook | None]:
        """Bring experts' rows back and sum them, weighted. Collective.

        Args:
            x: ``[L, num_ranks * max, hidden] bf16``, laid out as low_latency_dispatch gave it.
            topk_idx: The choices that were dispatched.
            topk_weights: ``[num_tokens, num_topk] f32``.
            handle: From low_latency_dispatch.
            use_logfmt: Accepted; rows cross as bf16, which is more exact.
            zero_copy: x is the array of `get_next_low_latency_combine_buffer`, already in place.
            async_finish: Whether the caller waits through the returned event.
            return_recv_hook: Only send now; sums are made when the hook is called.
            out: ``[num_tokens, hidden] bf16`` to write, or None for a new array.
            combine_wait_recv_cost_stats: As dispatch_wait_recv_cost_stats of the dispatch.
            combine_precision: ``"rank"``: a rank's experts are summed and rounded to bf16 before
                they cross; ``"expert"``: every expert's row counts as it is.

        Returns:
            ``combined_x [num_tokens, hidden] bf16``; the event; the hook or None.

        Raises:
            InvalidArgument: An argument is wrong, or two earlier hooks were not called yet.
            RankMismatch: Ranks disagree. On the cuda engine the next call raises it, and the
                outputs of this one hold anything.
            CommTimeout: A rank did not take part in time.
        """
        engine = self._open()
        place = self._place
        framework = framework_of(x, "x")
        _check_hook(async_finish, return_recv_hook)
        layout_range, shape = self._open_handle(handle)
        sizes = (shape.num_local_experts, shape.num_recv_rows, shape.hidden)
        data = view_of(x, "x", place, shape=sizes, dtypes=(BFLOAT16,))
        idx = arguments.low_latency_topk(topk_idx, "num_tokens", place)
        num_tokens = idx.shape[0]
        if num_tokens > shape.num_max_tokens:
            raise InvalidArgument(
                f"topk_idx has {num_tokens} tokens; the handle's dispatch took at most "
                f"{shape.num_max_tokens}. Pass the topk_idx that was dispatched."
            )
        out_shape = (num_tokens, shape.hidden)
        given_out = None
        if out is not None:
            given_out = view_of(
                out, "out", place, shape=out_shape, dtypes=(BFLOAT16,), is_output=True
            )
        weights = arguments.view_weights(topk_weights, idx, place)
        precision = _precision(combine_precision)
        wait_stats = _optional_stats(
            combine_wait_recv_cost_stats,
            "combine_wait_recv_cost_stats",
            place,
            self.group_size,
            INT64,
        )
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, None, async_finish, [x, topk_idx, topk_weights])
            out_view = given_out or self._allocate(framework, order)(out_shape, BFLOAT16)
            request = LowLatencyCombineRequest(
                data=data,
                topk_idx=idx,
                topk_weights=weights,
                layout_range=layout_range,
                shape=shape,
                precision=precision,
                is_zero_copy=zero_copy,
                wait_stats=wait_stats,
                has_hook=return_recv_hook,
                out=out_view,
            )
            receive = engine.low_latency_combine(request)
            if not return_recv_hook:
                receive()
            event = self._end(engine, framework, order, (x, topk_idx, topk_weights, request))
        combined = framework.finish(out_view) if out is None else out
        hook = self._hook(framework, receive, request) if return_recv_hook else None
        return combined, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, Any, int, int, int]) -> Any:
        """Return the slab memory that the next low_latency_combine sends from with zero_copy=True.

        Args:
            handle: From low_latency_dispatch; its arrays decide the framework.

        Returns:
            ``[L, num_ranks * max, hidden] bf16``, valid for one combine. For JAX, whose arrays
            cannot be filled, a NumPy or CuPy array.
        """
        engine = self._open()
        _, shape = self._open_handle(handle)
        framework = writable_framework(framework_of(handle[0], "handle[0]"), self._place.device)
        with self._cuda_errors, engine.active():
            return framework.finish(engine.next_combine_buffer(shape))

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Check the shape; there is nothing to clean, because no state is left between calls."""
        self._open()
        arguments.low_latency_shape(
            num_max_dispatch_tokens_per_rank, hidden, num_experts, self.group_size
        )

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank, or unmask it: low-latency calls go on without a masked rank."""
        engine = self._open_mask()
        rank = arguments.whole_number(rank_to_mask, "rank_to_mask", 0)
        if rank >= self.group_size:
            raise InvalidArgument(f"rank_to_mask is {rank}; it must be below {self.group_size}.")
        self._set_masked(engine, [rank], bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: Any) -> None:
        """Write which ranks are masked: ``mask_status [num_ranks] int32``, 1 for a masked rank."""
        engine = self._open_mask()
        status = _optional_stats(mask_status, "mask_status", self._place, self.group_size, INT32)
        if status is None:
            raise InvalidArgument("mask_status is None; pass a [num_ranks] int32 array to write.")
        framework = framework_of(mask_status, "mask_status")
        with self._cuda_errors, engine.active():
            order = self._begin(engine, framework, None, False, [])
            engine.copy_masks(status)
            self._end(engine, framework, order, mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmask every rank."""
        engine = self._open_mask()
        self._set_masked(engine, range(self.group_size), False)

    def _set_masked(self, engine: Engine, ranks: Sequence[int], is_masked: bool) -> None:
        with self._cuda_errors, engine.active():
            for rank in ranks:
                engine.set_masked(rank, is_masked)

    def _open_mask(self) -> Engine:
        engine = self._open()
        if not self.enable_shrink:
            raise InvalidArgument("this Buffer masks no ranks; pass enable_shrink=True to it.")
        return engine

    def _open_handle(self, handle: Any) -> tuple[ArrayView, LowLatencyShape]:
        if not isinstance(handle, tuple | list) or len(handle) != 5:
            raise InvalidArgument(
                f"handle is {kind_of(handle)}; it must be the tuple of 5 that "
                "low_latency_dispatch returned."
            )
        _, layout_range, num_max_tokens, hidden, num_experts = handle
        shape = arguments.low_latency_shape(num_max_tokens, hidden, num_experts, self.group_size)
        view = view_of(
            layout_range,
            "handle[1]",
            self._place,
            shape=(shape.num_local_experts, self.group_size),
            dtypes=INT64,
        )
        return view, shape


def _check_hook(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise InvalidArgument("async_finish and return_recv_hook exclude each other; pass one.")


def _precision(name: str) -> CombinePrecision:
    try:
        return CombinePrecision[name.upper()]
    except (KeyError, AttributeError):
        raise InvalidArgument(
            f"combine_precision is {name!r}; it must be 'rank' or 'expert'."
        ) from None


def _optional_stats(
    array: Any, name: str, place: Place, size: int, dtypes: tuple[np.dtype[Any], ...]
) -> ArrayView | None:
    if array is None:
        return None
    return view_of(array, name, place, shape=(size,), dtypes=dtypes, is_output=True)


def _rows_innermost(view: ArrayView) -> ArrayView:
    """View ``[a, b, c]`` as ``[a, c, b]``."""
    swapped_shape = (view.shape[0], view.shape[2], view.shape[1])
    swapped_strides = (view.strides[0], view.strides[2], view.strides[1])
    return view._replace(shape=swapped_shape, strides=swapped_strides)
