"""Contract of what only several nodes show: chunks of any size, nodes of any ranks, MPI traffic."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import contract_dispatch as calls
import numpy as np
from common import TIMEOUT_S, Checker, main
from contract_dispatch import BF16, CASES, F32, Case
from frames import NumpyFrame

from epcomm import Buffer, Config, EpcommError, InvalidArgument, RankMismatch, topology

#: Tokens of a chunk, and messages under way.
CHUNKS = ((1, 1), (3, 1), (5, 2), (16, 40), (64, 3), (4096, 1))
CHUNKED = ("uneven-tokens", "some-choices", "fp8-scales-by-column", "worst-tokens-spare")
CHUNKED += ("special-values-f16", "one-rank-has-tokens", "no-choice-at-all")
MANY = Case("many-tokens-in-small-chunks", (700, 1, 300), 64, 8, 4, "zipf", F32)


class ChunkedBuffer(Buffer):
    """A Buffer whose calls all have one config."""

    chunk_config = Config()

    def dispatch(self, *args: Any, **options: Any) -> Any:
        return super().dispatch(*args, **options | {"config": self.chunk_config})

    def combine(self, *args: Any, **options: Any) -> Any:
        return super().combine(*args, **options | {"config": self.chunk_config})


def make(check: Checker, **options: Any) -> ChunkedBuffer:
    return ChunkedBuffer(check.group, engine="host", timeout_s=TIMEOUT_S, **options)


def config_of(chunk: int, depth: int) -> Config:
    return Config(num_max_rdma_chunked_send_tokens=depth, num_max_rdma_chunked_recv_tokens=chunk)


def check_case(check: Checker, buffer: Buffer, case: Case, round_: int) -> None:
    sent = calls.check_dispatch(check, buffer, case, round_)
    calls.check_combine(check, buffer, case, round_, sent)
    calls.check_repeated(check, buffer, case, round_, sent)
    calls.check_combine(check, buffer, case, round_, sent, has_weights=False)


def chunks_of_any_size(check: Checker) -> None:
    """The bits do not depend on how rows are cut, and handles go on with other depths."""
    buffer = make(check)
    for chunk, depth in CHUNKS:
        buffer.chunk_config = config_of(chunk, depth)
        for case in (case for case in CASES if case.id in CHUNKED):
            for round_ in range(2):
                check.case = f"case {case.id}, round {round_}, chunks of {chunk}, depth {depth}"
                check_case(check, buffer, case, round_)
    check.case = f"case {MANY.id}"
    buffer.chunk_config = config_of(32, 4)
    sent = calls.check_dispatch(check, buffer, MANY, 0)
    buffer.chunk_config = config_of(7, 1)  # the chunks are the handle's
    calls.check_repeated(check, buffer, MANY, 0, sent)
    calls.check_combine(check, buffer, MANY, 0, sent)
    buffer.destroy()


def staging_is_bounded(check: Checker) -> None:
    """The memory for rows between nodes is that of the hint, however many tokens there are."""
    buffer, config = make(check), config_of(16, 2)
    buffer.chunk_config = config
    hint = config.get_rdma_buffer_size_hint(MANY.hidden * 4, check.size, num_max_tokens=700)
    for round_ in range(2):
        check_case(check, buffer, MANY, round_)
        size = buffer.get_local_buffer_tensor(np.uint8, use_rdma_buffer=True).size
        check.holds(0 < size <= hint, "bytes of staging memory", (size, hint))
    buffer.destroy()


def users_messages_are_untouched(check: Checker) -> None:
    """Receives of any source and any tag that users have posted get users' messages alone."""
    from mpi4py import MPI

    comm, case = check.group, Case("beside-messages", (30, 7), 64, 4, 2, "uniform")
    got = np.full(1, -1)
    waiting = comm.Irecv(got, MPI.ANY_SOURCE, MPI.ANY_TAG)
    with check.buffer() as buffer:
        check_case(check, buffer, case, 0)
        check.holds(not waiting.Test(), "a user's receive", "got a message of epcomm")
        check.ranks.barrier(timeout_s=TIMEOUT_S)
        peer = (check.rank + 1) % check.size
        sending = comm.Isend(np.array([check.rank]), peer, 7)
        check_case(check, buffer, case, 1)
        MPI.Request.Waitall([waiting, sending])
    check.holds(int(got[0]) == (check.rank - 1) % check.size, "a user's message", got)


def error_of(check: Checker, call: Callable[[], Any], kind: type[EpcommError]) -> str:
    """Return the message of an error that every rank raises alike."""
    try:
        call()
    except kind as error:
        said = check.ranks.allgather(str(error), timeout_s=TIMEOUT_S)
        check.holds(len(set(said)) == 1, "messages", said)
        return str(error)
    check.fail(kind.__name__, "was not raised")
    raise AssertionError


def every_rank_raises_alike(check: Checker) -> None:
    """Where ranks of several nodes disagree, or more arrives than there is room for."""
    case = Case("refused", (9, 4), 64, 2, 2, "uniform", BF16)
    mine = calls.inputs_of(case, 0, check.rank, check.size)
    is_odd = check.rank == check.size - 1
    with check.buffer() as buffer:

        def dispatch(**changed: Any) -> Callable[[], Any]:
            choices = {"topk_idx": mine.topk_idx, "topk_weights": mine.topk_weights}
            options = {**choices, "num_experts": 2 * check.size} | changed
            return lambda: buffer.dispatch(mine.x, **options)

        config = config_of(8 if is_odd else 16, 2)
        message = error_of(check, dispatch(config=config), RankMismatch)
        check.holds("num_chunk_tokens" in message, "message", message)
        config = config_of(16, 1 if is_odd else 2)
        message = error_of(check, dispatch(config=config), RankMismatch)
        check.holds("num_in_flight" in message, "message", message)
        alignment = 2 if is_odd else 1
        message = error_of(check, dispatch(expert_alignment=alignment), RankMismatch)
        check.holds(f"rank {check.size - 1}: 2" in message, "message", message)
        message = error_of(check, dispatch(num_worst_tokens=1 if is_odd else 500), InvalidArgument)
        check.holds(f"1 on rank {check.size - 1}" in message, "message", message)
        handle = dispatch()()[4]
        if is_odd:
            rows = np.zeros((handle.num_recv_rows, 64), BF16)
            message = error_of(check, lambda: buffer.combine(rows, handle), RankMismatch)
        else:
            message = error_of(check, dispatch(), RankMismatch)
        check.holds("rank 0: dispatch" in message, "message", message)
        check_case(check, buffer, case, 1)


def ranks_of_nodes_in_turn(check: Checker) -> None:
    """Nodes whose ranks are not neighbours: the order is still that of the ranks."""
    usual, topology.host_identity = topology.host_identity, lambda: f"host {check.rank % 2}"
    nodes, check.nodes = check.nodes, [rank % 2 for rank in range(check.size)]
    check.num_nodes = 2
    try:
        with check.buffer() as buffer:
            for case in (case for case in CASES if case.id in CHUNKED):
                check_case(check, buffer, case, 0)
    finally:
        topology.host_identity, check.nodes, check.num_nodes = usual, nodes, 1


def run(group: Any, frame: NumpyFrame, engine: str) -> str:
    """Run all scenarios; return the digest of all outputs."""
    check = Checker(group, frame, engine)
    scenarios = (
        chunks_of_any_size,
        staging_is_bounded,
        users_messages_are_untouched,
        every_rank_raises_alike,
    )
    if "EPCOMM_RANKS_PER_NODE" not in os.environ:
        scenarios = (ranks_of_nodes_in_turn,)
    for scenario in scenarios:
        check.case = scenario.__name__
        scenario(check)
    return check.digest()


if __name__ == "__main__":
    main(run)
