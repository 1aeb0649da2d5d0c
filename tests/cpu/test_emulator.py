"""The CUDA kernels on the CPU: see tests/emulator. The same .cu files, compiled by g++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from emulator.__main__ import FOUND
from emulator.build import EmulatorError, Toolchain, pointer
from emulator.cases import (
    CASES,
    WATCHED_CASES,
    Case,
    Inputs,
    check_untouched,
    make_inputs,
    run_case,
    run_round,
)
from emulator.faults import FAULTS, Fault
from emulator.low_latency import WATCHED_CASES as WATCHED_LOW_LATENCY_CASES
from emulator.world import Handle, Rank, World
from ranks import oracle

from epcomm.cuda_layout import AGREED
from epcomm.engines.cuda_dispatch import Launch
from epcomm.jit.kernels import KernelSpec
from epcomm.jit.sources import source_dir

TESTS = Path(__file__).resolve().parents[1]
#: The end of a process in which ThreadSanitizer found something.
RACE = 66
#: ThreadSanitizer wants memory where it expects it.
FIXED_ADDRESSES = ("setarch", "--addr-no-randomize")

# --- right results -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_calls_are_right_bit_by_bit(case: Case, toolchain: Toolchain) -> None:
    run_case(case, toolchain)


# --- failures that kernels report --------------------------------------------------------------

_CASE = Case("failures", (7, 12, 5), num_rounds=1)


def route(rank: Rank, topk_idx: oracle.Array, num_worst_tokens: int = 0) -> Handle:
    """Make the calls that lead to a handle."""
    _, per_expert, in_rank = rank.layout(topk_idx, _CASE.num_experts)
    return rank.route(in_rank, per_expert, num_worst_tokens)


@pytest.fixture
def world(toolchain: Toolchain) -> World:
    """Return three ranks."""
    return _CASE.world(toolchain)


@pytest.fixture
def inputs() -> list[Inputs]:
    """Return what each rank passes."""
    return [make_inputs(_CASE, 0, rank, 1) for rank in range(_CASE.num_ranks)]


@pytest.mark.parametrize(
    ("call", "phase"), [("route", "counts"), ("dispatch", "arrival"), ("combine", "arrival")]
)
def test_a_rank_that_never_comes_is_named(
    call: str, phase: str, world: World, inputs: list[Inputs]
) -> None:
    """Rank 0 gives up first and says for whom it waited; rank 1 says that rank 0 gave up."""
    handles: dict[int, Handle] = {}

    def prepare(rank: Rank) -> None:
        handles[rank.rank] = route(rank, inputs[rank.rank].topk_idx)

    world.run(prepare)
    world.ranks[0].timeout_s = 1.0  # rank 1 comes well before, on a busy machine too

    def one_call(rank: Rank) -> None:
        own, handle = inputs[rank.rank], handles[rank.rank]
        if call == "route":
            route(rank, own.topk_idx)
        elif call == "dispatch":
            rank.dispatch(handle, own.rows)
        else:
            rank.combine(handle, np.zeros((handle.num_recv, 8), np.float32))

    def all_but_last(rank: Rank) -> None:
        if rank.rank != 2:
            one_call(rank)

    first, second, _ = world.failures(all_but_last)
    assert first is not None
    assert second is not None
    assert (first.failure, first.phase, int(first.record["peer"])) == ("timeout", phase, 2)
    assert int(first.record["seen"]) < int(first.record["expected"]) == 2
    assert (second.failure, second.phase, int(second.record["peer"])) == ("peer gave up", phase, 0)


def test_a_late_rank_ends_too(world: World, inputs: list[Inputs]) -> None:
    """Whoever comes after the others gave up does not wait for them for ever."""
    world.ranks[0].timeout_s = 0.2

    def late(rank: Rank, latest: int) -> None:
        if (rank.rank == 2) == (latest == 2):
            handle = route(rank, inputs[rank.rank].topk_idx)
            # The others' counts were there: they gave up on this rank's.
            rank.dispatch(handle, inputs[rank.rank].rows)

    early = world.failures(partial(late, latest=0))
    assert [error is None for error in early] == [False, False, True]
    last = world.failures(partial(late, latest=2))[2]
    assert last is not None
    assert (last.failure, int(last.record["peer"])) == ("peer gave up", 0)


@pytest.mark.parametrize("call", ["route", "dispatch", "combine"])
def test_disagreeing_ranks_learn_it_and_work_on(
    call: str, world: World, inputs: list[Inputs]
) -> None:
    def disagreeing(rank: Rank) -> None:
        own = inputs[rank.rank]
        header = {"dtype": 7 if rank.rank == 1 else 4}
        _, per_expert, in_rank = rank.layout(own.topk_idx, _CASE.num_experts)
        handle = rank.route(in_rank, per_expert, header=header if call == "route" else None)
        if call == "dispatch":
            rank.dispatch(handle, own.rows, header=header)
        else:
            rank.combine(handle, np.zeros((handle.num_recv, 8), np.float32), header=header)

    for failed in world.failures(disagreeing):
        assert failed is not None
        assert failed.failure == "mismatch"
        assert AGREED[int(failed.record["field"])] == "dtype"
        assert failed.record["values"][:3].tolist() == [4, 7, 4]
    world.run(partial(run_round, _CASE, inputs))


def test_a_rank_whose_slab_must_grow_meets_those_that_have_room(
    world: World, inputs: list[Inputs]
) -> None:
    """Longer rows need a larger slab, so that rank asks first; the others make the call."""

    def disagreeing(rank: Rank) -> None:
        handle = route(rank, inputs[rank.rank].topk_idx)
        if rank.rank == 1:
            rank.agree({"call": 2, "hidden": 4096})
        else:
            rank.dispatch(handle, inputs[rank.rank].rows)

    for failed in world.failures(disagreeing):
        assert failed is not None
        assert failed.failure == "mismatch"
        assert AGREED[int(failed.record["field"])] == "hidden"
    world.run(lambda rank: rank.agree({"call": 2, "hidden": 4096}))
    world.run(partial(run_round, _CASE, inputs))


def test_too_many_rows_are_refused_everywhere_and_nothing_moves(
    world: World, inputs: list[Inputs]
) -> None:
    topk = [own.topk_idx for own in inputs]
    num_recv = len(oracle.arrivals(topk, _CASE.num_experts, 1))

    def too_many(rank: Rank) -> None:
        route(rank, topk[rank.rank], num_recv - 1 if rank.rank == 1 else 100)

    for failed in world.failures(too_many):
        assert failed is not None
        assert failed.failure == "too many rows"
        record = failed.record
        assert [int(record[name]) for name in ("peer", "expected", "seen")] == [
            1,
            num_recv - 1,
            num_recv,
        ]
    world.run(partial(run_round, _CASE, inputs))


def test_a_layout_leaves_out_a_bad_expert_and_reports_it(
    world: World, inputs: list[Inputs]
) -> None:
    topk_idx = inputs[0].topk_idx.copy()
    topk_idx[2] = [_CASE.num_experts, -2, 0]

    def layout(rank: Rank) -> None:
        choices = topk_idx if rank.rank == 0 else inputs[rank.rank].topk_idx
        rank.layout(choices, _CASE.num_experts)

    first, *others = world.failures(layout)
    assert first is not None
    assert first.failure == "bad expert"
    assert others == [None, None]


@pytest.mark.parametrize("bad_ranks", [[0], [1, 2]])
def test_a_dispatch_of_bad_choices_is_given_up_everywhere(
    world: World, inputs: list[Inputs], bad_ranks: list[int]
) -> None:
    choices = [own.topk_idx.copy() for own in inputs]
    for rank, bad in zip(bad_ranks, (_CASE.num_experts, -2), strict=False):
        choices[rank][-1, 0] = bad

    def route(rank: Rank) -> None:
        idx = choices[rank.rank]
        mask = np.zeros((len(idx), _CASE.num_ranks), bool)
        rank.route(mask, np.zeros(_CASE.num_experts, np.int32), topk_idx=idx)

    for failed in world.failures(route):
        assert failed is not None
        assert (failed.failure, int(failed.record["peer"])) == ("bad choices", bad_ranks[0])
    world.run(partial(run_round, _CASE, inputs))


def test_a_mismatch_comes_before_the_choices_that_it_makes_bad(
    world: World, inputs: list[Inputs]
) -> None:
    def route(rank: Rank) -> None:
        idx = inputs[rank.rank].topk_idx
        num_experts = _CASE.num_experts if rank.rank != 1 else _CASE.num_ranks
        mask = np.zeros((len(idx), _CASE.num_ranks), bool)
        rank.route(mask, np.zeros(num_experts, np.int32), topk_idx=idx)

    for failed in world.failures(route):
        assert failed is not None
        assert failed.failure == "mismatch"
        assert AGREED[int(failed.record["field"])] == "num_experts"


def test_a_stage_that_is_too_small_stops_a_dispatch_before_it_begins(
    world: World, inputs: list[Inputs]
) -> None:
    """On all ranks, whose host then grows all slabs: nothing is counted, so the next call fits."""
    rows = world.areas.stage_bytes // max(_CASE.num_tokens) // 16 * 16 + 16

    def too_long(rank: Rank) -> None:
        handle = route(rank, inputs[rank.rank].topk_idx)
        long_rows = np.zeros((len(handle.positions), rows), np.uint8)
        got = rank.dispatch(handle, long_rows, launch=Launch.AHEAD)
        check_untouched(rank, got)

    world.run(too_long)
    for rank in world.ranks:
        rank.check_memory()
    world.run(partial(run_round, _CASE, inputs))


def test_no_peer_waits_for_a_rank_whose_outputs_are_too_small(
    world: World, inputs: list[Inputs]
) -> None:
    """Its host may take its time: what peers fetch has been staged."""
    others_are_done = threading.Barrier(_CASE.num_ranks)

    def dispatch(rank: Rank) -> None:
        rows = inputs[rank.rank].rows
        handle = route(rank, inputs[rank.rank].topk_idx)
        if rank.rank == 0:
            rank.dispatch(handle, rows, num_out=0, launch=Launch.AHEAD)
        else:
            rank.dispatch(handle, rows)
        others_are_done.wait(60)
        if rank.rank == 0:
            got = rank.dispatch(handle, rows, launch=Launch.RESUMES)
            origins = oracle.arrivals([one.topk_idx for one in inputs], _CASE.num_experts, 0)
            want = oracle.pick([one.rows for one in inputs], origins)
            np.testing.assert_array_equal(got.rows, want)

    world.run(dispatch)
    world.run(partial(run_round, _CASE, inputs))


# --- processes of their own --------------------------------------------------------------------


def run_program(
    case: str, cache: Path, *, sources: Path | None = None, is_watched: bool = False, seeds: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run a case as a program, so that nothing that it does harms this process."""
    command = [sys.executable, "-m", "emulator", "--cache", str(cache), "--case", case]
    command += ["--seeds", str(seeds), *(["--watched"] if is_watched else [])]
    if sources is not None:
        # A rank that waits for what no longer comes need not do so for long.
        command += ["--sources", str(sources), "--timeout", "5"]
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
    if is_watched:
        env |= {
            "LD_PRELOAD": thread_sanitizer(),
            "TSAN_OPTIONS": f"exitcode={RACE} halt_on_error=1 history_size=0",
        }
        command = [*FIXED_ADDRESSES, *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def thread_sanitizer() -> str:
    """Return the path of ThreadSanitizer's library."""
    command = ["g++", "-print-file-name=libtsan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@lru_cache
def why_no_thread_sanitizer() -> str:
    """Return why ThreadSanitizer cannot run here; empty where it can."""
    library = thread_sanitizer()
    if not Path(library).is_absolute():
        return "g++ has no ThreadSanitizer"
    program = [*FIXED_ADDRESSES, sys.executable, "-c", ""]
    env = os.environ | {"LD_PRELOAD": library}
    done = subprocess.run(program, env=env, capture_output=True, text=True)
    return f"ThreadSanitizer does not run: {done.stderr[-200:]}" if done.returncode else ""


def skip_without_thread_sanitizer() -> None:
    """Skip a test that needs it."""
    if why_no_thread_sanitizer():
        pytest.skip(why_no_thread_sanitizer())


@pytest.mark.parametrize(
    "name", [case.name for case in (*WATCHED_CASES, *WATCHED_LOW_LATENCY_CASES)]
)
def test_thread_sanitizer_finds_no_race(name: str, cache: Path) -> None:
    skip_without_thread_sanitizer()
    done = run_program(name, cache, is_watched=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the test of the tests ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def found(
    request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Fault, Future[subprocess.CompletedProcess[str]]]]:
    """Plant the faults that this session asks for, each in sources of its own, side by side."""
    folder = tmp_path_factory.mktemp("faults")

    def run(fault: Fault) -> subprocess.CompletedProcess[str]:
        sources = folder / str(FAULTS.index(fault))
        fault.plant(source_dir(), sources)
        is_watched = fault.is_watched
        return run_program(fault.case, cache, sources=sources, is_watched=is_watched, seeds=24)

    calls = [getattr(item, "callspec", None) for item in request.session.items]
    faults = [call.params["fault"] for call in calls if call and "fault" in call.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {fault: pool.submit(run, fault) for fault in faults}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_faults_are_found(
    fault: Fault, found: dict[Fault, Future[subprocess.CompletedProcess[str]]]
) -> None:
    if fault.is_watched:
        skip_without_thread_sanitizer()
    done = found[fault].result()
    wanted = (FOUND, RACE) if fault.is_watched else (FOUND,)
    assert done.returncode in wanted, done.stdout + done.stderr


# --- the emulator itself -----------------------------------------------------------------------

_RULES = """
extern "C" __global__ void epcomm_probe(const unsigned params) {{
  extern __shared__ __align__(128) unsigned char shared_memory[];
  shared_memory[0] = static_cast<unsigned char>(params);
  {body}
}}
"""

_CONVERSIONS = """
#include "ptx/convert.cuh"
#include "ptx/e4m3.cuh"

struct Params {
  const float* in;
  unsigned short* out[3];
  float* wide;
  unsigned number;
};

extern "C" __global__ void epcomm_probe(const Params params) {
  for (unsigned i = 0; i < params.number; ++i) {
    params.out[0][i] = epcomm::ptx::cvt_rn_bf16x2_f32(0.0f, params.in[i]) >> 16;
    params.out[1][i] = epcomm::ptx::cvt_rn_f16x2_f32(params.in[i], 0.0f);
    params.out[2][i] = epcomm::ptx::cvt_rn_satfinite_e4m3x2_f32(0.0f, params.in[i]) >> 8;
    params.wide[i] = epcomm::ptx::cvt_f32_f16(params.out[1][i]);
  }
}
"""


def launch_probe(text: str, params: oracle.Array, cache: Path, sources: Path) -> None:
    """Run one block of 64 threads of a kernel, its text given; it has 64 bytes of shared memory."""
    for folder in ("common", "ptx"):
        shutil.copytree(source_dir() / folder, sources / folder)
    (sources / "kernels").mkdir()
    (sources / "kernels" / "probe.cu").write_text(text)
    own = Toolchain(cache, sources)
    try:
        own.launch(
            KernelSpec("probe", ()),
            num_blocks=1,
            num_threads=64,
            params=params,
            shared_bytes=64,
            seed=1,
            rank=0,
        )
    finally:
        own.reset()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if (threadIdx.x < 40) __syncthreads();", "wait for ever"),
        ("if (threadIdx.x % 2) __syncwarp();\nelse __syncwarp();", "different places"),
        ("shared_memory[params] = 1;", "shared memory was written"),
        ("__shfl_sync(1u, 0u, 0);", "whole warps only"),
    ],
)
def test_kernels_that_break_the_rules_are_stopped(
    body: str, message: str, cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(EmulatorError, match=message):
        launch_probe(_RULES.format(body=body), np.array(64, np.uint32), cache, tmp_path)


def test_conversions_round_to_nearest_even(cache: Path, tmp_path: Path) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)].astype(np.float32)
    random = np.random.default_rng(3).integers(0, 1 << 32, 50_000, np.uint32).view(np.float32)
    # All values, all ties between neighbours, and any others.
    values = np.concatenate([finite, (finite[1:] + finite[:-1]) / 2, random[~np.isnan(random)]])
    out = np.zeros((3, len(values)), np.uint16)
    wide = np.zeros(len(values), np.float32)
    layout = [("in", "u8"), ("out", "u8", (3,)), ("wide", "u8"), ("number", "u4")]
    params = np.zeros((), np.dtype(layout, align=True))
    params["in"], params["wide"] = pointer(values), pointer(wide)
    params["out"], params["number"] = [pointer(part) for part in out], len(values)
    launch_probe(_CONVERSIONS, params, cache, tmp_path)
    with np.errstate(over="ignore"):
        want = [values.astype(dtype).view(np.uint16) for dtype in (oracle.BFLOAT16, np.float16)]
    np.testing.assert_array_equal(out[:2], want)
    fp8 = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(out[2], fp8)
    np.testing.assert_array_equal(wide, out[1].view(np.float16).astype(np.float32))
