"""What rows cost: bytes and microseconds on links, messages, and memory of a rank.

docs/scaling.md tells the model and its limits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from epcomm.arrays import BFLOAT16, FLOAT8_E4M3
from epcomm.cli.traffic import Floats, Job, Loads, load_by_rail, load_direct, simulate
from epcomm.config import Config
from epcomm.cuda_layout import areas_for, slot_row_bytes, staged_row_bytes
from epcomm.engines.base import DEFAULT_CHUNKS
from epcomm.engines.sections import Sections
from epcomm.fp8 import BLOCK
from epcomm.rail_link import Window

#: What long streams reach when each of four H200s pushes to all others at once: measured.
DEFAULT_NVLINK_GB_S = 357.0
#: NOTE: assumed, not measured: one 400 Gbit/s adapter a GPU.
DEFAULT_NETWORK_GB_S = 50.0
#: NOTE: about the least that recorded row moves took beyond their bytes over the wire, see
#: docs/results/row_moves.json. That a step over the network, or a chunk's call inside a node, takes
#: as long is assumed.
DEFAULT_LATENCY_US = 30.0

#: Dtypes that dispatch can carry; combine carries bf16.
DTYPES = {"bf16": BFLOAT16, "fp8": FLOAT8_E4M3}
_F32, _INT64 = np.dtype(np.float32), np.dtype(np.int64)


@dataclass(frozen=True)
class Rates:
    """What links do.

    Attributes:
        nvlink_gb_s: 10^9 bytes a second over a rank's NVLink, each way.
        network_gb_s: The same over its network adapter.
        latency_us: Fixed microseconds of a step over the network, and of a call inside a node.
    """

    nvlink_gb_s: float = DEFAULT_NVLINK_GB_S
    network_gb_s: float = DEFAULT_NETWORK_GB_S
    latency_us: float = DEFAULT_LATENCY_US


@dataclass(frozen=True)
class Spread:
    """Least, mean and largest of some numbers; 0 where there are none."""

    min: float
    mean: float
    max: float

    @classmethod
    def of(cls, values: Floats) -> Spread:
        """Return what spread the values have."""
        if values.size == 0:
            return cls(0.0, 0.0, 0.0)
        return cls(float(values.min()), float(values.mean()), float(values.max()))


@dataclass(frozen=True)
class Cost:
    """What a dispatch or a combine costs.

    Attributes:
        nvlink_sent_bytes, nvlink_received_bytes: Over ranks.
        network_sent_bytes, network_received_bytes: Over ranks.
        num_messages: Messages that a rank sends over the network, at most: empty ones are not sent.
        message_bytes: Over messages.
        us: Microseconds of the slowest rank.
    """

    nvlink_sent_bytes: Spread
    nvlink_received_bytes: Spread
    network_sent_bytes: Spread
    network_received_bytes: Spread
    num_messages: int
    message_bytes: Spread
    us: float


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, with rails.

    Attributes:
        slab_bytes: What the cuda engine's slab takes for these calls.
        hint_bytes: The ``num_nvl_bytes`` with which a slab never grows.
        staging_bytes: Messages under way between nodes, those that are packed and received.
    """

    slab_bytes: int
    hint_bytes: int
    staging_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a job costs.

    Attributes:
        job: The job.
        rates: What its links do.
        row_bytes: Of a dispatched and a combined row, by ``"dispatch"`` and ``"combine"``.
        sampled_tokens: Tokens a rank that were simulated.
        costs: By way, ``"rails"`` (over the network once a node) or ``"direct"`` (once a rank);
            then by ``"dispatch"`` and ``"combine"``.
        memory: With rails.
    """

    job: Job
    rates: Rates
    row_bytes: dict[str, int]
    sampled_tokens: int
    costs: dict[str, dict[str, Cost]]
    memory: Memory


def make_plan(job: Job, rates: Rates) -> Plan:
    """Simulate a job's routing and tell what it costs.

    Raises:
        UnsupportedConfig: The cuda engine does not take so many ranks a node.
    """
    traffic = simulate(job)
    rails, direct = load_by_rail(traffic), load_direct(traffic)
    of_row = {
        "dispatch": row_bytes(job.dtype, job.hidden),
        "combine": row_bytes("bf16", job.hidden),
    }
    costs = {
        way: {
            "dispatch": cost_of(job, loads, of_row["dispatch"], rates),
            "combine": cost_of(job, loads.backwards(), of_row["combine"], rates),
        }
        for way, cost_of, loads in (
            ("rails", cost_by_rail, rails),
            ("direct", cost_direct, direct),
        )
    }
    return Plan(job, rates, of_row, job.sampled_tokens, costs, memory_by_rail(job))


def itemsize(dtype: str) -> int:
    """Return the bytes of an element of one of ``DTYPES``."""
    return int(DTYPES[dtype].itemsize)


def num_scales(dtype: str, hidden: int) -> int:
    """Return the scales of a row of one of ``DTYPES``."""
    return -(-hidden // BLOCK) if dtype == "fp8" else 0


def row_bytes(dtype: str, hidden: int) -> int:
    """Return the bytes of a row of one of ``DTYPES``, its scales included."""
    return hidden * itemsize(dtype) + num_scales(dtype, hidden) * _F32.itemsize


def num_chunks(job: Job) -> int:
    """Return in how many chunks a rank's tokens travel between nodes."""
    return -(-job.num_tokens // DEFAULT_CHUNKS.num_tokens)


def num_calls(job: Job) -> int:
    """Return how often a node's ranks call each other: for each source node and chunk."""
    return job.num_nodes * num_chunks(job) if job.num_nodes > 1 else 1


def cost_by_rail(job: Job, loads: Loads, bytes_a_row: int, rates: Rates) -> Cost:
    """Return the cost where chunks cross the network, then spread over NVLink.

    The two overlap but for one chunk: the last to arrive still has to spread. Calls inside the node
    follow each other, and each takes a step's fixed time.
    """
    nvlink_us, network_us = _link_times(loads, bytes_a_row, rates)
    node_us = nvlink_us + num_calls(job) * rates.latency_us
    if job.num_nodes > 1:
        network_us += rates.latency_us
    longer_us, shorter_us = np.maximum(node_us, network_us), np.minimum(node_us, network_us)
    us = (longer_us + shorter_us / num_chunks(job)).max()
    return _cost(job, loads, bytes_a_row, job.num_nodes - 1, float(us))


def cost_direct(job: Job, loads: Loads, bytes_a_row: int, rates: Rates) -> Cost:
    """Return the cost where rows go straight to their receivers, over both links at once."""
    us = np.maximum(*_link_times(loads, bytes_a_row, rates)).max() + rates.latency_us
    return _cost(job, loads, bytes_a_row, job.num_ranks - job.gpus_per_node, float(us))


def memory_by_rail(job: Job) -> Memory:
    """Return the memory that a rank needs for dispatch and combine.

    Raises:
        UnsupportedConfig: The cuda engine does not take so many ranks a node.
    """
    combine_bytes = row_bytes("bf16", job.hidden)
    # NOTE: with several nodes the node's engine moves a chunk of one node's tokens at a time, those
    # of its own node as well.
    num_tokens = _tokens_of_a_chunk(job) if job.num_nodes > 1 else job.num_tokens
    areas = areas_for(
        job.gpus_per_node,
        num_tokens,
        staged_row_bytes(
            job.hidden * itemsize(job.dtype), num_scales(job.dtype, job.hidden), job.num_topk
        ),
        slot_row_bytes(combine_bytes, job.num_topk),
    )
    return Memory(
        slab_bytes=areas.num_bytes,
        hint_bytes=Config().get_nvl_buffer_size_hint(
            combine_bytes, job.gpus_per_node, num_max_tokens=num_tokens
        ),
        staging_bytes=_staging_bytes(job),
    )


def _tokens_of_a_chunk(job: Job) -> int:
    return min(job.num_tokens, DEFAULT_CHUNKS.num_tokens)


def _staging_bytes(job: Job) -> int:
    """Return the bytes of the largest window of messages that the rails engine has.

    Choices are taken to be int64, and weights to travel in combine too: the most that can be.
    """
    if job.num_nodes == 1:
        return 0
    depth, num_others = DEFAULT_CHUNKS.num_in_flight, job.num_nodes - 1
    num_rows, num_topk = _tokens_of_a_chunk(job), job.num_topk
    routes = {
        "mask": ((job.num_tokens, job.gpus_per_node), np.dtype(bool)),
        "pairs": ((job.gpus_per_node, job.num_experts // job.num_ranks), np.dtype(np.int32)),
    }
    dispatch = {
        "data": ((num_rows, job.hidden), DTYPES[job.dtype]),
        "scales": ((num_rows, num_scales(job.dtype, job.hidden)), _F32),
        "topk_idx": ((num_rows, num_topk), _INT64),
        "topk_weights": ((num_rows, num_topk), _F32),
    }
    # With the spare row that the receiver adds, and the weights' own.
    combine = {
        "weights": ((num_rows + 2, num_topk), _F32),
        "data": ((num_rows + 1, job.hidden), BFLOAT16),
    }
    windows = (
        Window(Sections(routes).end, num_others, num_others),
        Window(Sections(dispatch).end, depth, depth),
        Window(Sections(combine).end, depth, depth + num_others),
    )
    return max(window.num_bytes for window in windows)


def _link_times(loads: Loads, bytes_a_row: int, rates: Rates) -> tuple[Floats, Floats]:
    """Return each rank's microseconds on NVLink and on the network; the busier way counts."""
    nvlink_rows = np.maximum(loads.nvlink_sent, loads.nvlink_received)
    network_rows = np.maximum(loads.network_sent, loads.network_received)
    kilobytes = bytes_a_row / 1e3  # 1 GB/s is 1 kilobyte a microsecond
    return (
        nvlink_rows * kilobytes / rates.nvlink_gb_s,
        network_rows * kilobytes / rates.network_gb_s,
    )


def _cost(job: Job, loads: Loads, bytes_a_row: int, num_receivers: int, us: float) -> Cost:
    return Cost(
        nvlink_sent_bytes=Spread.of(loads.nvlink_sent * bytes_a_row),
        nvlink_received_bytes=Spread.of(loads.nvlink_received * bytes_a_row),
        network_sent_bytes=Spread.of(loads.network_sent * bytes_a_row),
        network_received_bytes=Spread.of(loads.network_received * bytes_a_row),
        num_messages=num_receivers * num_chunks(job),
        message_bytes=Spread.of(loads.message_rows * (bytes_a_row / num_chunks(job))),
        us=us,
    )
