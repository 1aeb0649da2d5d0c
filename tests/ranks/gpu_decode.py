"""Low-latency calls on GPUs: graphs, hooks, masks and deadlines, with inputs that change in place.

    gpu_decode.py FRAME MODE [--replays N]

``graph``: one graph of dispatch and combine. ``hooks``: the same with hooks, two calls at a time.
``two-shapes``: two graphs of other most tokens, in turn. ``mixed``: a graph, and throughput calls
between its replays. ``overlap``: sending waits for no peer. ``shrink`` and ``gone``: a rank stops
answering, with enable_shrink and without.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import contract_dispatch as throughput
import numpy as np
import oracle
from common import Array, Checker, frame_of
from contract_low_latency import (
    BF16,
    FP8,
    Case,
    all_inputs,
    cast_of,
    experts_result,
    finish,
    inputs_of,
    receive,
    results_of_choices,
    send,
    send_back,
)
from gpu_frameworks import GPUS

from epcomm import Buffer, CommTimeout

NUM_SETS = 5
REPLAYS_A_CHECK = 101  # coprime with the sets, so that every set is checked
NUM_WARM_UPS = 3
TIMEOUT_S = 2.0

PLAIN = Case("graph", (24,), 24, 512, 4, 4, "some", "plain")
SMALL = Case("graph-small", (7,), 7, 256, 3, 4, "uniform", "none", "expert")
INPUTS = ("x", "topk_idx", "topk_weights", "rows")


@dataclass(frozen=True)
class RoundSet:
    """One rank's inputs, and what it must get."""

    x: Array
    topk_idx: Array
    topk_weights: Array
    rows: Array
    origins: oracle.ExpertRows
    parts: list[Array]
    combined_x: Array


@cache
def round_set(case: Case, number: int, me: int, num_ranks: int) -> RoundSet:
    """Return a set; NumPy."""
    everyone = all_inputs(case, number, num_ranks)
    mine, num_experts = everyone[me], case.num_local * num_ranks
    origins = oracle.expert_rows([one.topk_idx for one in everyone], num_experts, me)
    rows = np.zeros((case.num_local, num_ranks * case.num_max, case.hidden), BF16)
    for local, sources in enumerate(origins.origins):
        base = oracle.pick([one.base for one in everyone], sources)
        expert = me * case.num_local + local
        rows[local, : len(sources)] = experts_result(case, expert, base)
    casts = [cast_of(case, number, rank, num_ranks) for rank in range(num_ranks)]
    parts = [[part for part in cast if part is not None] for cast in casts]
    combined = oracle.low_latency_combine(
        results_of_choices(case, mine, num_experts),
        mine.topk_idx,
        mine.topk_weights,
        case.num_local,
        case.precision == "rank",
    )
    return RoundSet(
        x=mine.x,
        topk_idx=mine.topk_idx,
        topk_weights=mine.topk_weights,
        rows=rows,
        origins=origins,
        parts=list(zip(*parts, strict=True)),  # type: ignore[arg-type]
        combined_x=combined,
    )


class Replayed:
    """Calls on inputs that stay where they are, captured in a graph."""

    def __init__(
        self, check: Checker, gpu: Any, buffer: Buffer, stream: Any, case: Case, *, hooks: bool
    ) -> None:
        self._check, self._gpu, self._case = check, gpu, case
        #: The set that the inputs hold.
        self.which = 0
        sets = [round_set(case, i, check.rank, check.size) for i in range(NUM_SETS)]
        make = check.frame.make
        self._sets = [{name: make(getattr(one, name)) for name in INPUTS} for one in sets]
        self._inputs = {name: check.frame.make_writable(getattr(sets[0], name)) for name in INPUTS}
        self._body = self._hooked(buffer) if hooks else self._plain(buffer)
        for _ in range(NUM_WARM_UPS):
            self._body()  # compiles, and leaves memory in the pools
        gpu.synchronize(stream)
        check.ranks.barrier()
        self._replay, self._outputs = gpu.capture(stream, self._body)

    def _dispatch(self, buffer: Buffer, **options: Any) -> Any:
        num_experts = self._case.num_local * self._check.size
        return buffer.low_latency_dispatch(
            self._inputs["x"],
            self._inputs["topk_idx"],
            self._case.num_max,
            num_experts,
            **FP8[self._case.fp8],
            **options,
        )

    def _combine(self, buffer: Buffer, handle: Any, **options: Any) -> Any:
        return buffer.low_latency_combine(
            self._inputs["rows"],
            self._inputs["topk_idx"],
            self._inputs["topk_weights"],
            handle,
            combine_precision=self._case.precision,
            **options,
        )

    def _plain(self, buffer: Buffer) -> Callable[[], Any]:
        def body() -> Any:
            recv_x, count, handle, _, _ = self._dispatch(buffer)
            combined, _, _ = self._combine(buffer, handle)
            return [(recv_x, count, handle, combined)]

        return body

    def _hooked(self, buffer: Buffer) -> Callable[[], Any]:
        def body() -> Any:
            first = self._dispatch(buffer, return_recv_hook=True)
            second = self._dispatch(buffer, return_recv_hook=True)
            first[4]()
            back = self._combine(buffer, first[2], return_recv_hook=True)
            second[4]()
            back_too = self._combine(buffer, second[2], return_recv_hook=True)
            back[2]()
            back_too[2]()
            pairs = ((first, back), (second, back_too))
            return [(*sent[:3], combined[0]) for sent, combined in pairs]

        return body

    def replay(self, which: int) -> None:
        """Change all inputs in place and replay."""
        self.which = which
        for name, array in self._inputs.items():
            self._gpu.copy(array, self._sets[which][name])
        self._replay()

    def call(self) -> None:
        """Make the calls outside of the graph."""
        self._outputs = self._body()

    def verify(self, which: int) -> None:
        """Compare what the last replay, or call, gave."""
        check, case = self._check, self._case
        want = round_set(case, which, check.rank, check.size)
        counts = np.array([*map(len, want.origins.origins)], np.int32)
        for recv_x, count, handle, combined in self._outputs:
            check.same("recv_count", check.frame.numpy(count), counts)
            got_ranges = check.frame.numpy(handle[1])
            check.same("layout_range", got_ranges, want.origins.layout_range)
            got = recv_x if isinstance(recv_x, tuple) else (recv_x,)
            check.equal("arrays in recv_x", len(got), len(want.parts))
            for array, by_rank in zip(got, want.parts, strict=True):
                values = check.frame.numpy(array)
                for local, sources in enumerate(want.origins.origins):
                    rows = oracle.pick(by_rank, sources)
                    check.same(f"rows of expert {local}", values[local, : len(sources)], rows)
            check.same("combined_x", check.frame.numpy(combined), want.combined_x)


# --- modes -------------------------------------------------------------------------------------


def run_replays(
    check: Checker, gpu: Any, num_replays: int, cases: tuple[Case, ...], *, hooks: bool = False
) -> None:
    """Replay the cases' graphs in turn."""
    hints = (
        Buffer.get_low_latency_rdma_size_hint(
            case.num_max, case.hidden, check.size, case.num_local * check.size, engine="cuda"
        )
        for case in cases
    )
    with check.buffer(0, max(hints)) as buffer:
        stream = gpu.new_stream()
        with gpu.use(stream):
            graphs = [Replayed(check, gpu, buffer, stream, case, hooks=hooks) for case in cases]
            check.ranks.barrier()
            for number in range(1, num_replays + 1):
                graph, which = graphs[number % len(graphs)], number % NUM_SETS
                graph.replay(which)
                if number % REPLAYS_A_CHECK == 0:
                    gpu.synchronize(stream)
                    check.case = f"replay {number}, set {which}"
                    graph.verify(which)
            # Calls outside the graphs go on from where these ended; they raise what went wrong.
            check.case = "after all replays"
            for graph in graphs:
                graph.call()
                gpu.synchronize(stream)
                graph.verify(graph.which)
        check.ranks.barrier()


def run_graph(check: Checker, gpu: Any, num_replays: int) -> None:
    run_replays(check, gpu, num_replays, (PLAIN,))


def run_hooks(check: Checker, gpu: Any, num_replays: int) -> None:
    run_replays(check, gpu, num_replays, (PLAIN,), hooks=True)


def run_two_shapes(check: Checker, gpu: Any, num_replays: int) -> None:
    run_replays(check, gpu, num_replays, (PLAIN, SMALL))


def run_mixed(check: Checker, gpu: Any, num_replays: int) -> None:
    """Throughput calls between replays, on the same Buffer."""
    other = throughput.for_frame(
        throughput.Case("beside-graphs", (30, 7), 256, 4, 3, "zipf"), check.frame
    )
    with check.buffer() as buffer:
        stream = gpu.new_stream()
        with gpu.use(stream):
            graph = Replayed(check, gpu, buffer, stream, PLAIN, hooks=False)
            check.ranks.barrier()
            for number in range(num_replays // 100):
                which = number % NUM_SETS
                graph.replay(which)
                dispatched = throughput.check_dispatch(check, buffer, other, 0)
                graph.replay(which)
                throughput.check_combine(check, buffer, other, 0, dispatched)
                gpu.synchronize(stream)
                check.case = f"mixed, round {number}"
                graph.verify(which)
        check.ranks.barrier()


def run_overlap(check: Checker, gpu: Any, num_replays: int) -> None:
    """Rank 0 sends, and its stream is done, long before the others come."""
    with check.buffer() as buffer:
        receive(check, send(check, buffer, PLAIN, 0))  # compiles
        receive(check, send(check, buffer, PLAIN, 0, return_recv_hook=True))
        check.frame.synchronize()
        check.ranks.barrier()
        start = time.monotonic()
        if check.rank:
            time.sleep(1.0)
        sent = send(check, buffer, PLAIN, 1, return_recv_hook=True)
        check.frame.synchronize()
        seconds = time.monotonic() - start
        if check.rank == 0:
            check.holds(seconds < 0.5, "seconds to send", seconds)
        receive(check, sent)
        finish(check, send_back(check, buffer, sent))


def compile_kernels(check: Checker) -> None:
    """Have all kernels compiled before a deadline is short."""
    with check.buffer() as buffer:
        sent = send(check, buffer, PLAIN, 0)
        receive(check, sent)
        finish(check, send_back(check, buffer, sent))


def run_shrink(check: Checker, gpu: Any, num_replays: int) -> None:
    """The last rank stops answering: the others wait for it once."""
    compile_kernels(check)
    gone = check.size - 1
    num_experts = PLAIN.num_local * check.size
    hint = Buffer.get_low_latency_rdma_size_hint(24, 512, check.size, num_experts, engine="cuda")
    status = check.frame.make_writable(np.zeros(check.size, np.int32))
    with check.buffer(0, hint, enable_shrink=True, timeout_s=TIMEOUT_S) as buffer:
        sent = send(check, buffer, PLAIN, 0)
        receive(check, sent)
        finish(check, send_back(check, buffer, sent))
        check.frame.synchronize()
        check.ranks.barrier()
        for round_ in range(1, 5) if check.rank != gone else ():
            check.case = f"shrink, round {round_}"
            start = time.monotonic()
            sent = send(check, buffer, PLAIN, round_, skipped={gone})
            receive(check, sent)
            finish(check, send_back(check, buffer, sent, skipped={gone}))
            check.frame.synchronize()
            seconds = time.monotonic() - start
            check.holds((seconds > TIMEOUT_S) == (round_ == 1), "seconds", seconds)
            buffer.low_latency_query_mask_buffer(status)
            want = np.array([rank == gone for rank in range(check.size)], np.int32)
            check.same("mask", check.frame.numpy(status), want)
        check.ranks.barrier()


def run_gone(check: Checker, gpu: Any, num_replays: int) -> None:
    """Without enable_shrink all ranks get CommTimeout, the late one too; a new Buffer works."""
    compile_kernels(check)
    buffer = Buffer(check.group, engine=check.engine, timeout_s=TIMEOUT_S, device=check.frame.gpu())
    receive(check, send(check, buffer, PLAIN, 0))
    check.frame.synchronize()
    check.ranks.barrier()
    if check.rank == check.size - 1:
        time.sleep(2 * TIMEOUT_S)
    mine = inputs_of(PLAIN, 1, check.rank, check.size)
    x, idx = check.frame.make(mine.x), check.frame.make(mine.topk_idx)
    try:
        # The device's failure is told by the call after it; and the late rank finds its first
        # call's rows, which were sent to it before.
        for _ in range(3):
            buffer.low_latency_dispatch(x, idx, PLAIN.num_max, PLAIN.num_local * check.size)
            check.frame.synchronize()
    except CommTimeout as error:
        check.holds(error.phase.startswith("low latency"), "phase", error)
    else:
        check.fail("calls without a rank", "raised nothing")
    check.ranks.barrier()
    buffer.destroy()
    with check.buffer() as other:
        for round_ in range(3):
            receive(check, send(check, other, PLAIN, round_))


MODES: dict[str, Callable[[Checker, Any, int], None]] = {
    "graph": run_graph,
    "hooks": run_hooks,
    "two-shapes": run_two_shapes,
    "mixed": run_mixed,
    "overlap": run_overlap,
    "shrink": run_shrink,
    "gone": run_gone,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frame", choices=GPUS)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--replays", type=int, default=10_000)
    options = parser.parse_args()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    frame = frame_of(options.frame)
    frame.set_up(comm.rank)
    check = Checker(comm, frame, "cuda")
    check.case = options.mode
    MODES[options.mode](check, GPUS[options.frame](), options.replays)
    sys.stdout.write(f"EPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
