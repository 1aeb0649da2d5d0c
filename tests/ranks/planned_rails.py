"""Rows on GPUs between nodes take the memory, calls and messages that are planned for them.

Of every number ``python -m epcomm plan`` tells that of the rank with the most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import contract_dispatch as calls
import numpy as np
from common import TIMEOUT_S, Checker
from contract_dispatch import E4M3, F32, Case, Scales
from frames import NumpyFrame

from epcomm import Buffer, routing
from epcomm.cli import cost
from epcomm.cli.traffic import Job, Traffic, load_by_rail
from epcomm.engines.device_rail_moves import DeviceMoves
from epcomm.rail_link import RailLink

CASES = (
    Case("several-messages", (700,), 64, 3, 2, "uniform"),
    Case("one-message", (60,), 136, 2, 1, "zipf"),
    Case("one-token", (1,), 8, 1, 1, "uniform"),
    Case("nothing-crosses-to-most", (300,), 64, 1, 2, "one_rank"),
    Case("flags-are-more-than-rows", (3000,), 8, 1, 1, "uniform"),
    Case("fp8", (530,), 1024, 4, 2, "uniform", E4M3, scales=Scales(8, F32, "rows")),
)


def job_of(check: Checker, case: Case) -> Job:
    return Job(
        check.num_nodes,
        check.size // check.num_nodes,
        *(case.num_tokens[0], case.hidden, case.num_topk, case.num_local * check.size),
        dtype="fp8" if case.scales else "bf16",
    )


def traffic_of(check: Checker, case: Case, job: Job) -> Traffic:
    """Return what the case sends, as if it had been simulated."""
    layouts = [
        routing.make_layout(inputs.topk_idx, job.num_experts, check.nodes)
        for inputs in calls.all_inputs(case, 0, check.size)
    ]
    rank_rows = np.array([layout.num_tokens_per_rank for layout in layouts], float)
    node_rows = np.array([layout.num_tokens_per_node for layout in layouts], float)
    shape = (job.num_nodes, job.gpus_per_node)
    return Traffic(rank_rows.reshape(*shape, *shape), node_rows.reshape(*shape, job.num_nodes))


@contextmanager
def counted(moves: DeviceMoves) -> Iterator[Counter[str]]:
    """Count the calls of the node's engine, and the messages of rows, by operation."""
    counts, engine = Counter[str](), moves._engine
    begin_send = RailLink.begin_send

    def send(link: RailLink, node: int, memory: Any, phase: str) -> Any:
        counts[phase] += 1
        return begin_send(link, node, memory, phase)

    def calling(name: str) -> Any:
        call = getattr(engine, name)

        def counting(request: Any) -> Any:
            counts[name] += 1
            return call(request)

        return counting

    with (
        mock.patch.object(RailLink, "begin_send", send),
        mock.patch.multiple(engine, dispatch=calling("dispatch"), combine=calling("combine")),
    ):
        yield counts


def check_case(check: Checker, buffer: Buffer, case: Case) -> None:
    moves, link = buffer._engine._moves, buffer._engine._link
    check.holds(isinstance(moves, DeviceMoves), "moves", type(moves))
    with counted(moves) as counts:
        sent = calls.check_dispatch(check, buffer, case, 0)
        calls.check_combine(check, buffer, case, 0, sent)
    staging_bytes = sum(num_bytes for _, num_bytes in moves._staging.values())
    used = (staging_bytes, link.memory.size, counts["dispatch: rows"], counts["combine: rows"])
    most = np.max(check.ranks.allgather(used, timeout_s=TIMEOUT_S), axis=0).tolist()
    job = job_of(check, case)
    traffic = traffic_of(check, case, job)
    memory, loads = cost.memory_by_rail(job, traffic.node_rows), load_by_rail(traffic)
    planned = [
        memory.gpu_staging_bytes,
        memory.pinned_staging_bytes,
        *(cost.cost_of(each, 1, 0.0).num_messages for each in (loads, loads.backwards())),
    ]
    what = "staging bytes on the GPU and of the host, messages of dispatch and combine"
    check.equal(what, most, planned)
    for name in ("dispatch", "combine"):
        check.equal(f"calls of {name} in the node", counts[name], cost.num_calls(job))


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all cases, each on a Buffer of its own; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    for case in CASES:
        check.case = f"case {case.id}"
        with check.buffer() as buffer:
            check_case(check, buffer, case)
            # What comes later needs no more.
            before = dict(buffer._engine._moves._staging)
            calls.check_dispatch(check, buffer, replace(case, num_tokens=(1,)), 0)
            check.holds(before == buffer._engine._moves._staging, "staging memory", "has grown")
    return check.digest()
