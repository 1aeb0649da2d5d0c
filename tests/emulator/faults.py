"""Faults to plant in the CUDA sources: the tests' own test is that each is found."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from emulator import low_latency
from emulator.cases import WATCHED_CASES


@dataclass(frozen=True)
class Fault:
    """A small wrong change.

    Attributes:
        name: What is wrong.
        file: Where, below the sources.
        right: The text that stands there, once.
        wrong: What takes its place.
        case: The case that must fail, or of which ThreadSanitizer must complain.
    """

    name: str
    file: str
    right: str
    wrong: str
    case: str

    @property
    def is_watched(self) -> bool:
        """Whether ThreadSanitizer finds it."""
        return self.case in (
            *(WATCHED, WATCHED_LOADS_AND_STORES),
            *(WATCHED_DECODING, WATCHED_HOOKS, WATCHED_FEW, WATCHED_MASKS),
        )

    def plant(self, sources: Path, target: Path) -> None:
        """Copy the sources with the fault in them.

        Raises:
            ValueError: The sources no longer hold the text: the fault needs a new one.
        """
        shutil.copytree(sources, target, ignore=shutil.ignore_patterns("__pycache__"))
        path = target / self.file
        text = path.read_text()
        if text.count(self.right) != 1:
            raise ValueError(
                f"fault {self.name!r}: not once, but {text.count(self.right)} times in "
                f"{self.file}:\n{self.right}"
            )
        path.write_text(text.replace(self.right, self.wrong))


WATCHED, WATCHED_LOADS_AND_STORES = (case.name for case in WATCHED_CASES)
WATCHED_DECODING, WATCHED_HOOKS, WATCHED_FEW, WATCHED_MASKS = (
    case.name for case in low_latency.WATCHED_CASES
)
_ROUTE, _DISPATCH, _COMBINE = "kernels/route.cu", "kernels/dispatch.cu", "kernels/combine.cu"
_COMBINE_SUM = "kernels/combine_sum.cuh"
_RING, _CALL, _SLAB = "comm/bulk_ring.cuh", "comm/call.cuh", "slab/layout.cuh"
_LOW_LATENCY, _TABLES, _FP8 = "comm/low_latency.cuh", "comm/choice_tables.cuh", "comm/fp8.cuh"
_CHOICES, _PARTS = "comm/choices.cuh", "comm/row_parts.cuh"
_FEW, _CELLS, _GRANULES = "comm/few_choices.cuh", "comm/cell_rows.cuh", "comm/granules.cuh"
_LL_DISPATCH = "kernels/low_latency_dispatch.cu"
_LL_SEND = "kernels/low_latency_dispatch_send.cuh"
_LL_RECEIVE = "kernels/low_latency_dispatch_receive.cuh"
_LL_COUNT = "kernels/low_latency_dispatch_count.cuh"
_LL_SUM = "kernels/low_latency_combine_receive.cuh"
_LL_RETURN = "kernels/low_latency_combine_send.cuh"
_LL_FEW = "kernels/low_latency_combine_few.cuh"

FAULTS = (
    Fault(
        "route: no barrier between a list and its release",
        _ROUTE,
        "comm::put_header(call, epoch, receiver);\n  __syncthreads();\n",
        "comm::put_header(call, epoch, receiver);\n",
        "four ranks",
    ),
    Fault(
        "route: no wait for counts and lists",
        _ROUTE,
        "is_good = comm::wait_cell(call, comm::kCounts, source, epoch, cell);",
        "is_good = true;",
        "four ranks",
    ),
    Fault(
        "route: a list lies where the one before is read",
        _SLAB,
        "u64((epoch % 2) * kNumRanks + source) * slabs.list_tokens",
        "u64(source) * slabs.list_tokens",
        WATCHED,
    ),
    Fault(
        "route: counts of groups are cleared while others count",
        _ROUTE,
        "    starts[threadIdx.x] = 0;\n    __syncthreads();\n",
        "    starts[threadIdx.x] = 0;\n",
        "four ranks",
    ),
    Fault(
        "route: a span begins while others read the one before",
        _ROUTE,
        "    __syncthreads();  // others may still read the starts of the span before\n",
        "",
        "more tokens than a span has",
    ),
    Fault(
        "route: spans do not follow one another",
        _ROUTE,
        "      position += span.total();\n",
        "",
        "more tokens than a span has",
    ),
    Fault(
        "route: a token goes by its first choices alone",
        _CHOICES,
        "batch < number; batch +=",
        "batch < min_of(number, kChoiceBatch * kWarpSize); batch +=",
        "many choices and scales",
    ),
    Fault(
        "route: a token goes by its neighbour's choices",
        _CHOICES,
        "const u32 own_begin = lane_index() * num_topk, own_end = own_begin + num_topk;",
        "const u32 own_begin = lane_index() * num_topk, own_end = own_begin + num_topk + 1;",
        "two ranks",
    ),
    Fault(
        "route: first positions count one source too many",
        _ROUTE,
        "for (u32 source = 0; source < me; ++source) position +=",
        "for (u32 source = 0; source <= me; ++source) position +=",
        "two ranks",
    ),
    Fault(
        "route: rows arrive in the wrong source's order",
        _ROUTE,
        "for (u32 source = 0; source < other; ++source) base +=",
        "for (u32 source = other + 1; source < kNumRanks; ++source) base +=",
        "three ranks",
    ),
    Fault(
        "route: a scan without its barrier",
        _ROUTE,
        "warp_sums[warp_index()] = inclusive;\n  __syncthreads();\n",
        "warp_sums[warp_index()] = inclusive;\n",
        "four ranks",
    ),
    Fault(
        "call: a kernel forgets to count its epoch",
        _CALL,
        "call.state->epoch = epoch;",
        "call.state->epoch = epoch - 1;",
        "two ranks",
    ),
    Fault(
        "call: claims are not taken back",
        _CALL,
        "for (u32 i = 0; i < kNumClaims; ++i) call.state->claimed[i] = 0;",
        "",
        "two ranks",
    ),
    Fault(
        "call: the last block does not wait for its threads",
        _CALL,
        "  bool is_last = false;\n  __syncthreads();\n",
        "  bool is_last = false;\n",
        WATCHED,
    ),
    Fault(
        "slab: the stage has one half",
        _SLAB,
        "slabs.stage_offset + (epoch % 2) * slabs.stage_bytes",
        "slabs.stage_offset + (epoch % 1) * slabs.stage_bytes",
        WATCHED,
    ),
    Fault(
        "dispatch: a unit's flag is raised before all warps staged",
        _DISPATCH,
        "    ptx::barrier_sync(comm::kStageBarrier, kNumStageWarps * kWarpSize);\n",
        "",
        "two ranks",
    ),
    Fault(
        "dispatch: a flag without release",
        _DISPATCH,
        "ptx::st_release_sys_u32("
        "slab::stage_flags(call.slabs, lane_index(), call.rank) + unit, epoch);",
        "slab::stage_flags(call.slabs, lane_index(), call.rank)[unit] = epoch;",
        WATCHED,
    ),
    Fault(
        "dispatch: no wait for staged rows",
        _DISPATCH,
        "if (!wait_batch()) return false;",
        "",
        "two ranks",
    ),
    Fault(
        "dispatch: fetches wait for the unit before theirs",
        _DISPATCH,
        "batch_.token() / kNumStageWarps;",
        "batch_.token() / kNumStageWarps - (batch_.token() >= kNumStageWarps);",
        "four ranks",
    ),
    Fault(
        "dispatch: no fence between the acquire and the copy engine",
        _DISPATCH,
        "#if kUseBulk\n    ptx::fence_proxy_async();\n#endif\n",
        "",
        WATCHED,
    ),
    Fault(
        "dispatch: what one lane acquired is not the warp's",
        _DISPATCH,
        "    __syncwarp();  // a vote orders no memory",
        "    // a vote orders no memory",
        WATCHED_LOADS_AND_STORES,
    ),
    Fault(
        "dispatch: choices of other ranks stay",
        _DISPATCH,
        "const bool is_here = expert >= 0 && expert < p_.num_local_experts;",
        "const bool is_here = expert >= 0;",
        "two ranks",
    ),
    Fault(
        "dispatch: own rows are written though outputs are too small",
        _DISPATCH,
        "steps.receives && to.own_position >= 0",
        "to.own_position >= 0",
        "two ranks",
    ),
    Fault(
        "dispatch: a call whose rows have not arrived counts as done",
        _DISPATCH,
        "comm::finish(call, steps.receives ? epoch : epoch - 1);",
        "comm::finish(call, epoch);",
        "two ranks",
    ),
    Fault(
        "ring: pieces are used before they are there",
        _RING,
        "      ptx::mbarrier_wait(barriers_ + stage, k / kNumStages % 2);\n",
        "",
        "two ranks",
    ),
    Fault(
        "ring: a barrier's parity never changes",
        _RING,
        "k / kNumStages % 2);",
        "0);",
        "two ranks",
    ),
    Fault(
        "ring: slots are loaded again while they are read",
        _RING,
        "        ptx::bulk_wait_read<1>();",
        "        ",
        "two ranks",
    ),
    Fault(
        "ring: lanes still read a slot that is loaded again",
        _RING,
        "      __syncwarp();\n      if (has_more)",
        "      if (has_more)",
        WATCHED,
    ),
    Fault(
        "ring: pieces are sent before they are written",
        _RING,
        "        if (is_issuer) ptx::bulk_wait<kLag>();\n",
        "",
        "four ranks, one block",
    ),
    Fault(
        "ring: a warp ends before its copies",
        _RING,
        "    if (is_issuer) ptx::bulk_wait<0>();\n",
        "",
        "two ranks",
    ),
    Fault(
        "combine: slots are written before peers arrive",
        _COMBINE,
        "if (comm::wait_arrival(call, comm::kArrival, epoch, blockDim.x)) {",
        "if (true) {",
        WATCHED,
    ),
    Fault(
        "combine: rows wait for an earlier unit's flag",
        _COMBINE_SUM,
        "- streams.first_there[rank]) / params.unit_rows;",
        "- streams.first_there[rank]) / params.unit_rows / 8;",
        "four ranks, one block",
    ),
    Fault(
        "combine: no wait for rows",
        _COMBINE_SUM,
        "if (rank != call.rank && position >= 0) {",
        "if (false && rank != call.rank && position >= 0) {",
        "two ranks",
    ),
    Fault(
        "combine: what one lane acquired is not the warp's",
        _COMBINE_SUM,
        "  __syncwarp();  // a vote orders no memory",
        "  // a vote orders no memory",
        WATCHED,
    ),
    Fault(
        "combine: a bias is added twice",
        _COMBINE_SUM,
        "add(ptx::ld_no_allocate_vec16(params.bias[1] + out_row + at), sums);",
        "add(ptx::ld_no_allocate_vec16(params.bias[0] + out_row + at), sums);",
        "two ranks",
    ),
    Fault(
        "combine: the last further row is left out",
        _COMBINE_SUM,
        "i < params.num_further; ++i",
        "i + 1 < params.num_further; ++i",
        "two ranks and four other nodes",
    ),
    Fault(
        "low latency: slots are written before peers have received",
        _LOW_LATENCY,
        "const bool must_wait = waits && !is_there(kReceived, seen, last);",
        "const bool must_wait = false;",
        "four ranks, hooks",
    ),
    Fault(
        "low latency: a block that is behind waits for an epoch that has passed",
        _LOW_LATENCY,
        "return phase == kReceived ? is_reached(seen, epoch) : seen == epoch;",
        "return seen == epoch;",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: tables of earlier calls are taken",
        _LOW_LATENCY,
        "return phase == kReceived ? is_reached(seen, epoch) : seen == epoch;",
        "return phase == kLowLatencyTables || is_reached(seen, epoch);",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: a kernel forgets to count its epoch",
        _LOW_LATENCY,
        "        own.epoch = epoch;",
        "        own.epoch = epoch - 1;",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: a kernel that only receives takes the latest epoch",
        _LOW_LATENCY,
        "*static_cast<const volatile u32*>(call.ticket);",
        "state.epoch;",
        "four ranks, hooks",
    ),
    Fault(
        "low latency: what one lane acquired is not the warp's",
        _LOW_LATENCY,
        "  __syncwarp();  // a shuffle orders no memory",
        "  // a shuffle orders no memory",
        WATCHED_DECODING,
    ),
    Fault(
        "low latency: all tokens are told as the first",
        _TABLES,
        "weights, piece.place - 1);",
        "weights, 0);",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: tokens before a batch are counted again",
        _PARTS,
        "source, counted, token, next,",
        "source, 0, token, next,",
        "most choices",
    ),
    Fault(
        "low latency: a token's choices are taken backwards",
        _PARTS,
        "choices[__popc(here & ((1u << lane) - 1))] = own;",
        "choices[__popc(here >> lane) - 1] = own;",
        "most choices",
    ),
    Fault(
        "low latency: choices are placed while others are still read",
        _PARTS,
        "  const u32 here = __ballot_sync(kFullWarp, is_here);\n  __syncwarp();\n",
        "  const u32 here = __ballot_sync(kFullWarp, is_here);\n",
        WATCHED_DECODING,
    ),
    Fault(
        "fp8: a block's largest value is that of half of it",
        _FP8,
        "step < kCastLanes; step",
        "step < kCastLanes / 2; step",
        "two ranks, fp8",
    ),
    Fault(
        "fp8: blocks of zeros divide by zero",
        _FP8,
        "u32 largest = 0x38d1b717;",
        "u32 largest = 0;",
        "two ranks, fp8",
    ),
    Fault(
        "fp8: powers of two are rounded down",
        _FP8,
        "(scale >> 23) + ((scale & 0x7fffff) != 0 ? 1 : 0)",
        "(scale >> 23)",
        "three ranks, packed",
    ),
    Fault(
        "low-latency dispatch: a flag is raised before all lanes have written",
        _LL_SEND,
        "    comm::group_barrier();\n",
        "",
        "three ranks, odd rows",
    ),
    Fault(
        "low-latency dispatch: a flag without release",
        _LL_SEND,
        "ptx::st_release_sys_u32("
        "slab::flags(call.slabs, lane_index(), round.slot, call.rank) + item,\n"
        "                              round.epoch);",
        "slab::flags(call.slabs, lane_index(), round.slot, call.rank)[item] = round.epoch;",
        WATCHED_DECODING,
    ),
    Fault(
        "low-latency dispatch: rows are not waited for",
        _LL_RECEIVE,
        "comm::await_part(call, round, part.source, part.item());",
        "comm::Outcome::kArrived;",
        "two ranks, fp8",
    ),
    Fault(
        "low-latency dispatch: parts wait for the first part's flag",
        _LL_RECEIVE,
        "part.source, part.item());",
        "part.source, part.token * part.num_parts);",
        "three ranks, packed",
    ),
    Fault(
        "low-latency dispatch: sources begin where the one before them does",
        _LL_DISPATCH,
        "s < source; ++s) begin",
        "s + 1 < source; ++s) begin",
        "three ranks, packed",
    ),
    Fault(
        "low-latency dispatch: one place behind the rows is not marked",
        _LL_COUNT,
        "row = end + Receivers::thread();",
        "row = end + 1 + Receivers::thread();",
        "two ranks, bf16",
    ),
    Fault(
        "low-latency combine: a flag is raised before all lanes have written",
        _LL_RETURN,
        "  comm::group_barrier();\n",
        "",
        "three ranks, odd rows",
    ),
    Fault(
        "low-latency combine: what one lane acquired is not the warp's",
        _LL_SUM,
        "  __syncwarp();  // a vote orders no memory",
        "  // a vote orders no memory",
        WATCHED_DECODING,
    ),
    Fault(
        "low-latency combine: weights are off",
        _LL_RETURN,
        "ptx::as_float(choice.weight)",
        "ptx::as_float(choice.weight + 1)",
        "two ranks, bf16",
    ),
    Fault(
        "low-latency combine: vectors are summed before they are there",
        _LL_RETURN,
        "ptx::copy_async_wait<kNumSumStages - 1>();",
        "ptx::copy_async_wait<kNumSumStages>();",
        "two ranks, bf16",
    ),
    Fault(
        "low-latency combine: copies are waited for as if none were left out",
        _LL_RETURN,
        "    ptx::copy_async_commit();  // also where nothing is left: the wait counts\n",
        "    if (at_ < end_) ptx::copy_async_commit();\n",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: a source's places are made while others are at the one before",
        _PARTS,
        "    if (!is_first) AnyCrew::meet();  // others may be at the source before\n",
        "",
        WATCHED_DECODING,
    ),
    Fault(
        "low latency: a batch is placed while others are at the one before",
        _PARTS,
        "      if (counted != 0) AnyCrew::meet();  // others may be at the batch before\n",
        "",
        WATCHED_DECODING,
    ),
    Fault(
        "low-latency combine, few tokens: each token has the first one's ranks",
        _LL_SUM,
        "few.first_entry[call.rank] + token * num_topk + lane;",
        "few.first_entry[call.rank] + lane;",
        "few tokens",
    ),
    Fault(
        "low-latency combine: rows are not waited for",
        _LL_SUM,
        "      outcome = "
        "comm::await(call, comm::kLowLatencyRows, line.holder, round.epoch, flag).outcome;",
        "      outcome = flag != nullptr ? comm::Outcome::kArrived : outcome;",
        "two ranks, bf16",
    ),
    Fault(
        "low latency: cells of earlier calls are taken",
        _CELLS,
        "value[i % 2] >> 32) != epoch;",
        "value[i % 2] >> 32) == 0;",
        "eight ranks",
    ),
    Fault(
        "low latency: one half of a vector's cells is not waited for",
        _CELLS,
        "for (u32 i = 4; i-- > 0;) {",
        "for (u32 i = 2; i-- > 0;) {",
        "eight ranks",
    ),
    Fault(
        "low latency: a part's last granule is in none of its slices",
        _GRANULES,
        "min_of(part.begin + (slice.index + 1) * size, part.end)};",
        "min_of(part.begin + (slice.index + 1) * size, part.end - 1)};",
        "three ranks, packed",
    ),
    Fault(
        "low latency: receivers do not meet between counting and placing",
        _LL_COUNT,
        "  Receivers::meet();\n  return arrivals->has_failed == 0;",
        "  return arrivals->has_failed == 0;",
        WATCHED_DECODING,
    ),
    Fault(
        "low latency: a source's kept choices are those of the first",
        _PARTS,
        "kept + range.first_entry",
        "kept",
        "two ranks, bf16",
    ),
    Fault(
        "low-latency combine: cells are not waited for",
        _LL_SUM,
        "if (late == nullptr) break;",
        "break;",
        "eight ranks",
    ),
    Fault(
        "low-latency dispatch: a row's scales are not waited for",
        _LL_RECEIVE,
        "comm::await(call, comm::kLowLatencyCells, part.source, round.epoch, cell);",
        "comm::Awaited{comm::Outcome::kArrived, static_cast<u32>(*cell)};",
        "few tokens",
    ),
    Fault(
        "low latency: what was not received yet is posted",
        _LOW_LATENCY,
        "{received[0], received[1]}",
        "{epoch, epoch}",
        "four ranks, hooks",
    ),
    Fault(
        "low latency, few tokens: a choice counts before itself",
        _FEW,
        "const u32 rest = (1u << i % 32) - 1;",
        "const u32 rest = (2u << i % 32) - 1;",
        "few tokens",
    ),
    Fault(
        "low latency, few tokens: all ranks are thought to have as many",
        _FEW,
        "is_guess = is_guess && headers[source].num_tokens == call.shape.num_tokens;",
        "is_guess = is_guess && headers[source].num_tokens > 0;",
        "few tokens",
    ),
    Fault(
        "low latency, few tokens: choices give way while others still read them",
        _FEW,
        "  __syncwarp();  // all lanes are done with the choices before\n",
        "",
        WATCHED_FEW,
    ),
    Fault(
        "low-latency combine, few tokens: rows begin where the first source's do",
        _LL_FEW,
        "ranges[local * kNumRanks + source];",
        "ranges[local * kNumRanks];",
        "few tokens",
    ),
)
