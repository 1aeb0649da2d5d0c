"""What the demo found out while it trained, and how it says so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from epcomm.cli.exchange import EpExchange

# NumPy arrays, of dtypes and shapes that the attributes name.
HostArray = Any
NUM_PROGRESS_LINES = 20
BAR_WIDTH = 30


class Progress:
    """The lines that show how a training goes, each about the steps since the one before.

    Args:
        exchange: whose time is measured.
        num_tokens: tokens of all ranks in a step.
        num_steps: steps of the whole training.
    """

    def __init__(self, exchange: EpExchange, num_tokens: int, num_steps: int) -> None:
        self._exchange = exchange
        self._num_tokens = num_tokens
        self._num_steps = num_steps
        self._interval = max(1, num_steps // NUM_PROGRESS_LINES)
        self._begin = time.perf_counter()
        self.restart(0)

    def restart(self, step: int) -> None:
        """Begin the next line's span after this many steps."""
        self._step = step
        self._time = time.perf_counter()
        self._dispatch_s = self._exchange.dispatch_s
        self._combine_s = self._exchange.combine_s

    def is_due(self, step: int) -> bool:
        """Whether a line is due after this many steps."""
        return step > self._step and (step % self._interval == 0 or step == self._num_steps)

    def describe(self, losses: list[float]) -> str:
        """Return a line about the steps since the last one; losses of all steps."""
        now, recent = time.perf_counter(), losses[self._step :]
        span_s = max(now - self._time, 1e-9)
        dispatch = 100 * (self._exchange.dispatch_s - self._dispatch_s) / span_s
        combine = 100 * (self._exchange.combine_s - self._combine_s) / span_s
        speed = len(recent) * self._num_tokens / span_s
        self.restart(len(losses))
        return (
            f"step {len(losses):5d}/{self._num_steps}  loss {sum(recent) / len(recent):.3f}  "
            f"{speed:9,.0f} tokens/s  dispatch {dispatch:4.1f} %  combine {combine:4.1f} %  "
            f"{now - self._begin:5.1f} s"
        )


@dataclass
class Report:
    """Numbers of a whole training run, of all ranks.

    Attributes:
        losses: mean loss of every step, nats a byte.
        num_rows: [num_ranks, num_ranks] int64, rows dispatched from rank to rank.
        row_bytes: bytes of a row.
        expert_load: [num_layers, num_experts] int64, how often each expert was chosen.
    """

    losses: list[float]
    num_rows: HostArray
    row_bytes: int
    expert_load: HostArray

    @property
    def megabytes(self) -> HostArray:
        """Millions of bytes dispatched from rank to rank: [num_ranks, num_ranks] float64."""
        return self.num_rows * (self.row_bytes / 1e6)

    @property
    def load_shares(self) -> HostArray:
        """Each expert's part of its layer's choices: [num_layers, num_experts], 0 to 1."""
        return self.expert_load / np.maximum(self.expert_load.sum(axis=1, keepdims=True), 1)


def describe_traffic(report: Report) -> str:
    """Return the traffic matrix as a table of rows and MB."""
    num_ranks = len(report.num_rows)
    # Rows that stay on their rank never cross; combine mirrors dispatch.
    crossed = 2 * (report.megabytes.sum() - np.trace(report.megabytes))
    lines = [
        f"rows dispatched from rank to rank, tokens and gradients ({report.row_bytes} bytes each; "
        f"combine brings as many back; {crossed:,.1f} MB crossed between ranks in all)",
        "from \\ to" + "".join(f"{f'rank {rank}':>22}" for rank in range(num_ranks)),
    ]
    for rank, (rows, megabytes) in enumerate(zip(report.num_rows, report.megabytes, strict=True)):
        cells = (f"{f'{n:,} = {mb:,.1f} MB':>22}" for n, mb in zip(rows, megabytes, strict=True))
        lines.append(f"{f'rank {rank}':>9}" + "".join(cells))
    return "\n".join(lines)


def describe_load(report: Report) -> str:
    """Return each expert's share of its layer's choices, with a bar for each."""
    num_layers, num_experts = report.expert_load.shape
    num_local = num_experts // len(report.num_rows)
    lines = [f"expert load, % of a layer's choices (even: {100 / num_experts:.1f})"]
    lines.append("  expert  rank" + "".join(f"{f'layer {n}':>9}" for n in range(num_layers)))
    shares = report.load_shares
    top = max(float(shares.max()), 1e-9)
    for expert in range(num_experts):
        cells = "".join(f"{100 * share:9.1f}" for share in shares[:, expert])
        bar = "#" * round(BAR_WIDTH * float(shares[:, expert].mean()) / top)
        lines.append(f"{expert:8d}{expert // num_local:6d}{cells}  {bar}")
    return "\n".join(lines)


def describe_sample(prompt: bytes, continuation: bytes) -> str:
    """Return the generated text with anything but printable ASCII and line ends shown as a dot."""
    shown = "".join(
        chr(byte) if 32 <= byte < 127 or byte == 10 else "·" for byte in prompt + continuation
    )
    lines = "\n".join(f"  | {line}" for line in shown.split("\n"))
    return f"sample: {len(prompt)} held-out bytes, then {len(continuation)} by the model\n{lines}"
