"""Rounds on a stream of the caller's, with consumers enqueued at once, and two handles in flight.

    gpu_streams.py FRAME [--rounds N] [--wait-elsewhere] [--engine ENGINE]

The host waits for nothing but the counts of a dispatch: outputs are compared on the GPU, right
behind `current_stream_wait`. With ``--wait-elsewhere`` another stream is current at that time than
at the call, and the consumers run there.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

from common import Checker, frame_of
from gpu_frameworks import GPUS
from gpu_rounds import NUM_LOCAL, NUM_SETS, factor_of, layout_arguments, round_sets

from epcomm import Buffer

INPUTS = ("x", "topk_idx", "topk_weights")
WANTED = ("recv_x", "recv_topk_idx", "recv_topk_weights", "combined_x", "combined_weights")
#: Micro-batches in flight.
NUM_LANES = 2


@dataclass
class Flight:
    """A dispatch that was made, and not combined yet."""

    which: int
    handle: Any
    recv: tuple[Any, Any, Any]
    event: Any


class Rounds:
    """One rank's rounds."""

    def __init__(self, check: Checker, gpu: Any, buffer: Buffer, waits_elsewhere: bool) -> None:
        self.check, self.gpu, self.buffer = check, gpu, buffer
        self.stream = gpu.new_stream()
        self.consumer = gpu.new_stream() if waits_elsewhere else self.stream
        sets = round_sets("streams", check.rank, check.size, same_routes=False)
        with gpu.use(self.stream):
            self.sets = [
                {name: check.frame.make(getattr(one, name)) for name in INPUTS + WANTED}
                for one in sets
            ]
            self.inputs = [
                {name: check.frame.make_writable(getattr(sets[0], name)) for name in INPUTS}
                for _ in range(NUM_LANES)
            ]
            self.num_wrong = {name: gpu.zeros(1) for name in WANTED}
        gpu.synchronize(self.stream)

    def options(self) -> dict[str, Any]:
        return {
            "previous_event": Buffer.capture(),
            "async_finish": True,
            "allocate_on_comm_stream": True,
        }

    def consume(self, which: int, **outputs: Any) -> None:
        """Count wrong elements, on the current stream."""
        for name, array in outputs.items():
            want = self.sets[which][name]
            self.check.equal(f"shape of {name}", tuple(array.shape), tuple(want.shape))
            self.gpu.add_differing(self.num_wrong[name], array, want)

    def dispatch(self, lane: int, which: int) -> Flight:
        """Change the inputs in place, and dispatch them."""
        inputs = self.inputs[lane]
        for name, array in inputs.items():
            self.gpu.copy(array, self.sets[which][name])
        num_experts = NUM_LOCAL * self.check.size
        layout = self.buffer.get_dispatch_layout(inputs["topk_idx"], num_experts, **self.options())
        options = self.options() | {"previous_event": layout[-1]}
        *recv, _, handle, event = self.buffer.dispatch(
            **inputs, **layout_arguments(layout), **options
        )
        return Flight(which, handle, tuple(recv), event)

    def combine(self, flight: Flight) -> None:
        """Consume what a dispatch gave, combine it, and consume that."""
        with self.gpu.use(self.consumer):
            flight.event.current_stream_wait()
            recv_x, recv_idx, recv_weights = flight.recv
            self.consume(
                flight.which,
                recv_x=recv_x,
                recv_topk_idx=recv_idx,
                recv_topk_weights=recv_weights,
            )
            rows = recv_x * factor_of(self.check.rank)
            ready = Buffer.capture()
        options = self.options() | {"previous_event": ready}
        combined, weights, event = self.buffer.combine(rows, flight.handle, recv_weights, **options)
        if self.consumer is not self.stream:
            self.gpu.synchronize(self.consumer)  # allocators do not know of its use of the rows
        # Freed memory is written again at once, where it was given back too early.
        del rows, recv_x, recv_idx, recv_weights
        flight.recv = (None, None, None)
        self.gpu.scratch(combined)
        with self.gpu.use(self.consumer):
            event.current_stream_wait()
            self.consume(flight.which, combined_x=combined, combined_weights=weights)
        if self.consumer is not self.stream:
            self.gpu.synchronize(self.consumer)  # the inputs are changed on the other stream

    def run(self, num_rounds: int) -> None:
        """Run all rounds; each has `NUM_LANES` dispatches before the first combine."""
        with self.gpu.use(self.stream):
            for number in range(num_rounds):
                self.check.case = f"round {number}"
                flights = [
                    self.dispatch(lane, (NUM_LANES * number + lane) % NUM_SETS)
                    for lane in range(NUM_LANES)
                ]
                # In either order: handles do not have to be taken as they came.
                for flight in flights if number % 2 else reversed(flights):
                    self.combine(flight)
            self.gpu.synchronize(self.stream)
            self.gpu.synchronize(self.consumer)
            self.check.case = f"after {num_rounds} rounds"
            for name, number in self.num_wrong.items():
                self.check.equal(f"wrong elements of {name}", int(number[0]), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("frame", choices=GPUS)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--wait-elsewhere", action="store_true")
    parser.add_argument("--engine", default="cuda", choices=("cuda", "staged", "auto"))
    options = parser.parse_args()
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    frame = frame_of(options.frame)
    frame.set_up(comm.rank)
    check = Checker(comm, frame, options.engine)
    with check.buffer() as buffer:
        rounds = Rounds(check, GPUS[options.frame](), buffer, options.wait_elsewhere)
        rounds.run(options.rounds)
    sys.stdout.write(f"EPCOMM-OK {comm.rank}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
