"""Dispatch and combine in a CUDA graph, replayed with inputs that change in place.

    gpu_graphs.py FRAME worst|cached [--replays N]

``worst``: layout, dispatch with num_worst_tokens, experts, combine; routes change too. ``cached``:
dispatch and combine along a handle's routes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from common import Checker, frame_of
from gpu_frameworks import GPUS
from gpu_rounds import (
    NUM_LOCAL,
    NUM_SETS,
    NUM_TOKENS,
    RoundSet,
    factor_of,
    layout_arguments,
    round_sets,
)

from epcomm import Buffer

#: A graph cannot make the slabs grow.
NUM_BYTES = 32 * 2**20
REPLAYS_A_CHECK = 50
NUM_WARM_UPS = 3

INPUTS = ("x", "topk_idx", "topk_weights")


def run(check: Checker, gpu: Any, buffer: Buffer, mode: str, num_replays: int) -> None:
    """Capture, replay and check."""
    sets = round_sets(f"graphs {mode}", check.rank, check.size, same_routes=mode == "cached")
    stream = gpu.new_stream()
    with gpu.use(stream):
        on_gpu = [{name: check.frame.make(getattr(one, name)) for name in INPUTS} for one in sets]
        inputs = {name: check.frame.make_writable(getattr(sets[0], name)) for name in INPUTS}
        body = make_body(check, buffer, inputs, mode)
        for _ in range(NUM_WARM_UPS):
            body()  # compiles, and leaves memory in the pools
        gpu.synchronize(stream)
        check.ranks.barrier()
        replay, outputs = gpu.capture(stream, body)
        check.ranks.barrier()
        for number in range(1, num_replays + 1):
            which = number % NUM_SETS
            for name, array in inputs.items():
                gpu.copy(array, on_gpu[which][name])
            replay()
            if number % REPLAYS_A_CHECK == 0:
                gpu.synchronize(stream)
                check.case = f"{mode}, replay {number}, set {which}"
                check_outputs(check, outputs, sets[which])
        # Calls outside the graph go on from where it ended; they raise what went wrong in it.
        check.case = "after all replays"
        outputs = body()
        gpu.synchronize(stream)
        check_outputs(check, outputs, sets[num_replays % NUM_SETS])
        buffer.get_dispatch_layout(inputs["topk_idx"], NUM_LOCAL * check.size)
        gpu.synchronize(stream)
    check.ranks.barrier()


def make_body(
    check: Checker, buffer: Buffer, inputs: dict[str, Any], mode: str
) -> Callable[[], dict[str, Any]]:
    """Return the calls of one round; they return all arrays, which a graph goes on using."""
    num_experts = NUM_LOCAL * check.size
    num_worst = NUM_TOKENS * check.size
    factor = factor_of(check.rank)
    x, topk_idx, topk_weights = (inputs[name] for name in INPUTS)

    def worst() -> dict[str, Any]:
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
            x,
            **layout_arguments(layout),
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_worst_tokens=num_worst,
        )
        rows = recv_x * factor
        combined, weights, _ = buffer.combine(rows, handle, recv_weights)
        return {
            "recv_x": recv_x,
            "recv_topk_idx": recv_idx,
            "recv_topk_weights": recv_weights,
            "combined_x": combined,
            "combined_weights": weights,
            "kept": (layout, rows, handle),
        }

    if mode == "worst":
        return worst
    layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    *_, handle, _ = buffer.dispatch(x, **layout_arguments(layout))

    def cached() -> dict[str, Any]:
        recv_x, *_ = buffer.dispatch(x, handle=handle)
        rows = recv_x * factor
        combined, _, _ = buffer.combine(rows, handle)
        return {"recv_x": recv_x, "combined_x": combined, "kept": (rows, handle)}

    return cached


def check_outputs(check: Checker, outputs: dict[str, Any], want: RoundSet) -> None:
    """Compare what the last replay gave."""
    num_recv = len(want.recv_x)
    for name, array in outputs.items():
        if name == "kept":
            continue
        got, expected = check.frame.numpy(array), getattr(want, name)
        if name.startswith("recv"):
            if name == "recv_topk_idx":
                check.holds(bool((got[num_recv:] == -1).all()), name, "is not -1 past the end")
            got = got[:num_recv]
        check.equal(f"shape of {name}", got.shape, expected.shape)
        check.same(name, got, expected)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frame", choices=GPUS)
    parser.add_argument("mode", choices=("worst", "cached"))
    parser.add_argument("--replays", type=int, default=1000)
    options = parser.parse_args()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    frame = frame_of(options.frame)
    frame.set_up(comm.rank)
    check = Checker(comm, frame, "cuda")
    with check.buffer(NUM_BYTES) as buffer:
        run(check, GPUS[options.frame](), buffer, options.mode, options.replays)
    sys.stdout.write(f"EPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
