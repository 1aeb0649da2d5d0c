"""``python -m epcomm plan``: counts against loops and formulas, times against measured runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch import ROOT

from epcomm import routing
from epcomm.cli import cost, main, plan, traffic
from epcomm.cli.cost import Rates, Spread
from epcomm.cli.traffic import Job, Loads, Rounds
from epcomm.config import Config
from epcomm.cuda_layout import areas_for
from epcomm.engines.base import DEFAULT_CHUNKS

pytestmark = pytest.mark.timeout(120)

MEASURED = json.loads((ROOT / "docs" / "results" / "row_moves.json").read_text())["cases"]
#: What scripts/bench_rails recorded between nodes, where it has.
RAILS = ROOT / "docs" / "results" / "rails.json"
SCALING = (ROOT / "docs" / "scaling.md").read_text()
SIZES = "--nodes 2 --gpus-per-node 2 --tokens 64 --hidden 256 --topk 2 --experts 8"
SMALL = Job(2, 2, num_tokens=64, hidden=256, num_topk=2, num_experts=8)
LARGE = Job(256, 8, num_tokens=4096, hidden=7168, num_topk=8, num_experts=2048)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    num_nodes, gpus_per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_experts = num_nodes * gpus_per_node * draw(st.integers(1, 3))
    return Job(
        num_nodes,
        gpus_per_node,
        num_tokens=draw(st.integers(1, 9)),
        hidden=8,
        num_topk=draw(st.integers(1, num_experts)),
        num_experts=num_experts,
        routing=draw(st.sampled_from(traffic.ROUTINGS)),
    )


def loads_of(job: Job) -> tuple[Loads, Loads]:
    found = traffic.simulate(job)
    return traffic.load_by_rail(found), traffic.load_direct(found)


class TestDraws:
    @pytest.mark.parametrize(("num_experts", "num_topk"), [(1, 1), (64, 3), (64, 16), (64, 17)])
    @pytest.mark.parametrize("name", traffic.ROUTINGS)
    def test_a_token_s_experts_differ(self, num_experts: int, num_topk: int, name: str) -> None:
        rng = np.random.default_rng(1)
        odds = traffic._odds_of(Job(1, 1, 1, 8, num_topk, num_experts, routing=name), rng)
        drawn = traffic.draw_experts(rng, odds, 500, num_topk)
        assert drawn.shape == (500, num_topk)
        assert drawn.min() >= 0
        assert drawn.max() < num_experts
        assert (np.diff(drawn, axis=1) > 0).all()

    @pytest.mark.parametrize("num_experts", [7, 9])  # from keys of all; drawn again
    def test_odds_are_those_of_not_putting_back(self, num_experts: int) -> None:
        odds = np.arange(1.0, num_experts + 1)
        odds /= odds.sum()
        drawn = traffic.draw_experts(np.random.default_rng(2), odds, 200_000, 2)
        second = [
            sum(odds[e] * odds[f] / (1 - odds[f]) for f in range(num_experts) if f != e)
            for e in range(num_experts)
        ]
        share = np.bincount(drawn.ravel(), minlength=num_experts) / len(drawn)
        np.testing.assert_allclose(share, odds + second, atol=0.006)

    def test_draws_are_the_same_every_time(self) -> None:
        first, second = traffic.simulate(SMALL), traffic.simulate(SMALL)
        np.testing.assert_array_equal(first.rank_rows, second.rank_rows)


class DrawnTokens:
    """What `traffic.simulate` drew, kept while it goes through its blocks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, job: Job) -> None:
        drawn: list[np.ndarray] = []
        draw = traffic.draw_experts

        def keep(*args: Any) -> np.ndarray:
            drawn.append(draw(*args))
            return drawn[-1]

        monkeypatch.setattr(traffic, "draw_experts", keep)
        self.traffic = traffic.simulate(job)
        monkeypatch.setattr(traffic, "draw_experts", draw)
        #: ``[source, token, choice]``
        self.topk_idx = np.concatenate(drawn).reshape(job.num_ranks, -1, job.num_topk)


def by_rank_of_rails(rows: np.ndarray, job: Job) -> np.ndarray:
    """Turn ``[rails, nodes]`` into one number a rank."""
    assert rows.shape == (job.gpus_per_node, job.num_nodes)
    return rows.T.ravel()


def by_rank_of(rows: np.ndarray, job: Job) -> np.ndarray:
    """Turn ``[1, ranks]`` into one number a rank."""
    assert rows.shape == (1, job.num_ranks)
    return rows[0]


@given(job=jobs(), block=st.integers(1, 60))
def test_counts_against_loops(job: Job, block: int) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(traffic, "_BLOCK_CHOICES", block)
        drawn = DrawnTokens(monkeypatch, job)
    size, local = job.gpus_per_node, job.num_experts // job.num_ranks
    rails, direct = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for source, tokens in enumerate(drawn.topk_idx.tolist()):
        for experts in tokens:
            for receiver in {expert // local for expert in experts} - {source}:
                link = "nvlink" if source // size == receiver // size else "network"
                direct[link + "_sent", source] += 1
                direct[link + "_received", receiver] += 1
                rail = receiver // size * size + source % size
                if rail != receiver:
                    rails["nvlink_sent", rail] += 1
                    rails["nvlink_received", receiver] += 1
            for node in {expert // local // size for expert in experts} - {source // size}:
                rails["network_sent", source] += 1
                rails["network_received", node * size + source % size] += 1
    loads = traffic.load_by_rail(drawn.traffic), traffic.load_direct(drawn.traffic)
    for found, counted in zip(loads, (rails, direct), strict=True):
        for name in ("nvlink_sent", "nvlink_received", "network_sent", "network_received"):
            assert getattr(found, name).tolist() == [counted[name, r] for r in range(job.num_ranks)]
    for found, way in zip(loads, (by_rank_of_rails, by_rank_of), strict=True):
        sent = found.message_rows.sum(axis=2)
        np.testing.assert_array_equal(way(sent, job), found.network_sent)
        received = found.backwards().message_rows.sum(axis=2)
        np.testing.assert_array_equal(way(received, job), found.network_received)


def test_counts_against_the_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(3, 2, num_tokens=50, hidden=8, num_topk=3, num_experts=24, routing="zipf")
    drawn = DrawnTokens(monkeypatch, job)
    nodes = np.repeat(np.arange(3), 2).tolist()
    for source, topk_idx in enumerate(drawn.topk_idx):
        layout = routing.make_layout(topk_idx, job.num_experts, nodes)
        rows = drawn.traffic.rank_rows.reshape(6, 6)[source]
        np.testing.assert_array_equal(rows, layout.num_tokens_per_rank)
        tokens = drawn.traffic.node_rows.reshape(6, 3)[source]
        np.testing.assert_array_equal(tokens, layout.num_tokens_per_node)


@given(jobs())
def test_rounds_against_loops(job: Job) -> None:
    found = traffic.simulate(job)
    rounds, ranks = traffic.find_rounds(found), range(job.gpus_per_node)
    for k in range(job.num_nodes):
        for node in range(job.num_nodes):
            before, after = (node - k) % job.num_nodes, (node + k) % job.num_nodes
            nvlink, network = [], []
            for rank in ranks:
                others = [peer for peer in ranks if peer != rank]
                part = found.rank_rows[before, :, node]
                nvlink += [part[rank, others].sum(), part[others, rank].sum()]
                network += [found.node_rows[node, rank, after], found.node_rows[before, rank, node]]
            assert rounds.nvlink[k, node] == max(nvlink)
            assert rounds.network[k, node] == (max(network) if k else 0)


@given(jobs())
def test_rails_never_send_more_over_the_network(job: Job) -> None:
    rails, direct = loads_of(job)
    assert (rails.network_sent <= direct.network_sent).all()
    assert rails.network_received.sum() == rails.network_sent.sum()
    assert direct.network_received.sum() == direct.network_sent.sum()
    if job.num_nodes == 1:
        assert not rails.network_sent.any()
        assert not direct.network_sent.any()
        assert not rails.message_rows.any()
        assert not direct.message_rows.any()
        np.testing.assert_array_equal(rails.nvlink_sent, direct.nvlink_sent)
    if job.gpus_per_node == 1:
        np.testing.assert_array_equal(rails.network_received, direct.network_received)
        assert not rails.nvlink_sent.any()


@given(jobs())
def test_combine_takes_the_rows_back(job: Job) -> None:
    for loads in loads_of(job):
        back = loads.backwards()
        assert back.nvlink_sent is loads.nvlink_received
        assert back.network_sent is loads.network_received
        for name, array in vars(back.backwards()).items():
            np.testing.assert_array_equal(array, getattr(loads, name))


def test_combine_sends_what_dispatch_received() -> None:
    job = Job(2, 4, num_tokens=300, hidden=1024, num_topk=3, num_experts=16, dtype="fp8")
    for costs in cost.make_plan(replace(job, routing="zipf"), Rates()).costs.values():
        for link in ("nvlink", "network"):
            received = getattr(costs["dispatch"], f"{link}_received_bytes")
            sent = getattr(costs["combine"], f"{link}_sent_bytes")
            # 2 bytes an element, where fp8 has 1 and 4 for a block of 128.
            for name, number in asdict(received).items():
                assert getattr(sent, name) == pytest.approx(number * 2048 / (1024 + 4 * 8))


def odds_to_hit(job: Job, num_experts: int) -> float:
    """Probability that a token goes to any of so many experts, with uniform routing."""
    missed = comb(job.num_experts - num_experts, job.num_topk)
    return 1 - missed / comb(job.num_experts, job.num_topk)


@pytest.mark.parametrize(
    "job",
    [
        Job(1, 4, 4096, 7168, 8, 256),
        Job(8, 8, 1000, 4096, 8, 256),
        Job(5, 3, 2000, 2880, 4, 60),
        Job(4, 2, 3000, 64, 8, 16),
        LARGE,
    ],
    ids=str,
)
def test_uniform_means_are_those_of_the_formulas(job: Job) -> None:
    num_nodes, size, num_tokens = job.num_nodes, job.gpus_per_node, job.num_tokens
    local = job.num_experts // job.num_ranks
    hit_rank, hit_node = odds_to_hit(job, local), odds_to_hit(job, size * local)
    rails, direct = loads_of(job)
    for loads, nvlink, network in (
        (rails, num_nodes * (size - 1) * hit_rank, (num_nodes - 1) * hit_node),
        (direct, (size - 1) * hit_rank, (num_nodes - 1) * size * hit_rank),
    ):
        for rows, expected in (
            (loads.nvlink_sent, nvlink),
            (loads.nvlink_received, nvlink),
            (loads.network_sent, network),
            (loads.network_received, network),
        ):
            np.testing.assert_allclose(rows.mean(), num_tokens * expected, rtol=0.01)


def test_zipf_is_uneven() -> None:
    job = Job(4, 4, num_tokens=1024, hidden=64, num_topk=4, num_experts=64)
    uniform = traffic.load_direct(traffic.simulate(job))
    zipf = traffic.load_direct(traffic.simulate(replace(job, routing="zipf")))
    even, uneven = Spread.of(uniform.network_received), Spread.of(zipf.network_received)
    assert even.max < 1.1 * even.mean
    assert uneven.max > 2 * uneven.mean
    assert uneven.min < 0.8 * uneven.mean


class TestSampling:
    @pytest.mark.parametrize("num_nodes", [1, 16, 64, 256])
    def test_choices_are_bounded(self, num_nodes: int) -> None:
        job = replace(LARGE, num_nodes=num_nodes)
        assert job.num_ranks * job.sampled_tokens * job.num_topk <= traffic.MAX_CHOICES
        assert (job.sampled_tokens < job.num_tokens) == (num_nodes == 256)

    def test_a_token_is_drawn_at_least(self) -> None:
        assert replace(LARGE, num_topk=traffic.MAX_CHOICES).sampled_tokens == 1

    def test_counts_are_scaled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        job = Job(2, 2, num_tokens=1000, hidden=8, num_topk=2, num_experts=8)
        whole = traffic.simulate(job)
        monkeypatch.setattr(traffic, "MAX_CHOICES", 4 * 2 * 100)
        assert job.sampled_tokens == 100
        sampled = traffic.simulate(job)
        for name in ("rank_rows", "node_rows"):
            found = getattr(sampled, name)
            np.testing.assert_allclose(found, getattr(whole, name), rtol=0.5)
            np.testing.assert_allclose(found % 10, 0)

    @pytest.mark.parametrize("name", traffic.ROUTINGS)
    def test_the_largest_job_ends(self, name: str) -> None:
        words = "--nodes 256 --gpus-per-node 8 --tokens 4096 --hidden 7168 --topk 8 --experts 2048"
        done = run_plan(*words.split(), "--routing", name)
        assert done.returncode == 0, done.stderr
        assert "1,024 of them simulated, counts × 4" in done.stdout


def loads_for(**rows: float) -> Loads:
    """Loads of four ranks, rank 2 having the rows and the others none."""
    names = ("nvlink_sent", "nvlink_received", "network_sent", "network_received")
    arrays = {name: np.array([0.0, 0.0, rows.get(name, 0.0), 0.0]) for name in names}
    return Loads(**arrays, message_rows=np.zeros((2, 2, 2)))


def rounds_for(nvlink: list[float], network: list[float]) -> Rounds:
    """Rounds of one node, and of another that has nothing to do."""
    return Rounds(*(np.array([rows, [0.0] * len(rows)]).T for rows in (nvlink, network)))


class TestTimes:
    rates = Rates(nvlink_gb_s=100.0, network_gb_s=10.0, latency_us=7.0)
    #: A row of 1,000 bytes takes 0.01 us over NVLink and 0.1 us over the network.
    loads = loads_for(nvlink_sent=300, nvlink_received=500, network_sent=200, network_received=40)

    @pytest.mark.parametrize(
        ("nvlink", "network", "dispatch_us", "combine_us"),
        [
            ([300], [0], 3 + 7, 3 + 7),
            # The own rows spread behind what crosses; then those that came, alone.
            ([300, 500], [0, 200], (20 + 7) + (5 + 7), (3 + 5 + 20) + 3 * 7),
            # What crosses is hidden, where it takes less.
            ([900, 500], [0, 40], (9 + 7) + (5 + 7), (9 + 5 + 4) + 3 * 7),
            # By round the longer of both, and not of all rounds together.
            ([100, 900, 300], [0, 50, 20], (5 + 9 + 3) + 3 * 7, (13 + 7) + 5 * 7),
            ([0, 0, 0, 0], [0, 0, 0, 0], 4 * 7, 7 * 7),
        ],
    )
    def test_rounds(
        self, nvlink: list[float], network: list[float], dispatch_us: float, combine_us: float
    ) -> None:
        rounds = rounds_for(nvlink, network)
        assert cost.dispatch_us(rounds, 1000, self.rates) == pytest.approx(dispatch_us)
        assert cost.combine_us(rounds, 1000, self.rates) == pytest.approx(combine_us)

    def test_the_slowest_node_counts(self) -> None:
        # 1 us on NVLink and 1.1 us on the network: different nodes' times do not add up.
        rounds = Rounds(np.array([[0.0, 0.0], [100.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 11.0]]))
        assert cost.dispatch_us(rounds, 1000, self.rates) == pytest.approx(1.1 + 2 * 7)
        assert cost.combine_us(rounds, 1000, self.rates) == pytest.approx(1.1 + 3 * 7)

    def test_calls_take_their_fixed_time(self) -> None:
        job = replace(SMALL, num_nodes=5, num_experts=10)
        assert cost.num_calls(job) == 5
        loose, tight = (cost.make_plan(job, Rates(latency_us=us)).costs for us in (1000.0, 0.0))
        for operation, num_steps in (("dispatch", 5), ("combine", 5 + 4)):
            fixed_us = loose["rails"][operation].us - tight["rails"][operation].us
            assert fixed_us == pytest.approx(1000 * num_steps)

    def test_direct_overlaps_wholly(self) -> None:
        assert cost.direct_us(self.loads, 1000, self.rates) == pytest.approx(20 + 7)

    @pytest.mark.parametrize("gpus_per_node", [1, 4])
    def test_one_node_is_one_step(self, gpus_per_node: int) -> None:
        job = replace(SMALL, num_nodes=1, gpus_per_node=gpus_per_node)
        costs = cost.make_plan(job, self.rates).costs
        assert costs["rails"] == costs["direct"]
        rounds = rounds_for([100], [0])
        assert cost.dispatch_us(rounds, 1000, self.rates) == pytest.approx(1 + 7)

    def test_bytes_are_rows_times_their_size(self) -> None:
        found = cost.cost_of(self.loads, 1000, 3.0)
        assert found.nvlink_received_bytes == Spread(0, 125_000, 500_000)
        assert found.network_sent_bytes == Spread(0, 50_000, 200_000)
        assert found.us == 3.0
        assert Spread.of(np.empty(0)) == Spread(0, 0, 0)


class TestMessages:
    def test_all_are_full_but_the_last(self) -> None:
        rows = np.array([[[0.0, 257.0, 0.0], [256.0, 0.0, 3.0], [600.0, 1.0, 0.0]]])
        loads = replace(loads_for(), message_rows=rows)
        found = cost.cost_of(loads, 1000, 0.0)
        # The third rank sends 256, 256, 88 and 1 rows; in combine the first 256, and 256, 256, 88.
        assert found.num_messages == cost.cost_of(loads.backwards(), 1000, 0.0).num_messages == 4
        assert found.message_bytes == Spread(1000, rows.sum() * 1000 / 8, 256_000)

    def test_none_is_sent_where_nothing_crosses(self) -> None:
        found = cost.cost_of(loads_for(), 1000, 0.0)
        assert found.num_messages == 0
        assert found.message_bytes == Spread(0, 0, 0)

    def test_a_message_of_less_than_a_chunk(self) -> None:
        rows = np.array([[[0.0, 5.0], [9.0, 0.0]]])
        found = cost.cost_of(replace(loads_for(), message_rows=rows), 1000, 0.0)
        assert found.message_bytes == Spread(5000, 7000, 9000)


@pytest.mark.parametrize(
    ("dtype", "hidden", "expected"),
    [("bf16", 7168, 14336), ("fp8", 7168, 7168 + 4 * 56), ("fp8", 2880, 2880 + 4 * 23)],
)
def test_row_bytes(dtype: str, hidden: int, expected: int) -> None:
    assert cost.row_bytes(dtype, hidden) == expected


class TestMemory:
    def test_one_node(self) -> None:
        job = Job(1, 4, 4096, 7168, 8, 256, dtype="fp8")
        memory = cost.make_plan(job, Rates()).memory
        # 56 scales, 8 choices and 8 weights travel with a row; 8 weights with one of combine.
        staged = -(-(7168 + 4 * (56 + 8 + 8)) // 128) * 128  # whole lines
        areas = areas_for(4, 4096, staged, 14336 + 4 * 8)
        assert memory.slab_bytes == areas.num_bytes
        assert memory.hint_bytes == Config().get_nvl_buffer_size_hint(14336, 4, num_max_tokens=4096)
        assert memory.hint_bytes >= memory.slab_bytes
        assert memory.gpu_staging_bytes == memory.pinned_staging_bytes == 0

    @pytest.mark.parametrize("num_nodes", [2, 9])
    def test_pinned_staging_is_messages_under_way(self, num_nodes: int) -> None:
        job = replace(LARGE, num_nodes=num_nodes, num_experts=144)
        memory = cost.make_plan(job, Rates()).memory
        # Six messages out and six in, of 8 indices and weights a row beside the rows.
        assert memory.pinned_staging_bytes == 12 * 256 * (14336 + 8 * 12)

    def test_routes_may_be_more_than_messages(self) -> None:
        job = replace(LARGE, num_nodes=9, num_tokens=10_000, hidden=8, num_experts=144)
        memory = cost.make_plan(job, Rates()).memory
        # A byte a token and rank of a node, and 2 experts of each rank there.
        num_bytes = -(-80_000 // 64) * 64 + 8 * 2 * 4
        assert memory.pinned_staging_bytes == 2 * 8 * num_bytes

    def test_gpu_staging_is_parts_and_sums(self) -> None:
        job = Job(3, 1, num_tokens=4096, hidden=64, num_topk=2, num_experts=3)
        # To the next node 1024 rows cross and to the one after it 2048, but for the last node.
        node_rows = np.array([[[0, 1024, 2048]], [[2048, 0, 1024]], [[0, 0, 0]]], float)
        choices = 4096 * 2 * 8
        row, weighted_sum = 128 + 2 * 12, 128 + 2 * 4
        by_rank = [
            # Two halves that receive, a message, what is sent back, and the sums of all that went.
            (2 * 2048 + 256) * row + (2048 + 3072) * weighted_sum,
            (2 * 1024 + 256) * row + (1024 + 3072) * weighted_sum,
            (2 * 2048 + 256) * row + (2048 + 0) * weighted_sum,
        ]
        found = cost.memory_by_rail(job, node_rows)
        assert found.gpu_staging_bytes == max(by_rank) + choices
        idle_first = node_rows * np.array([0, 1, 1])[:, None, None]
        assert cost.memory_by_rail(job, idle_first).gpu_staging_bytes == choices + max(
            (2 * 2048 + 256) * row + 2048 * weighted_sum,
            (0 + 256) * row + 3072 * weighted_sum,
            (2 * 1024 + 256) * row + 1024 * weighted_sum,
        )

    @pytest.mark.parametrize("name", traffic.ROUTINGS)
    @pytest.mark.parametrize("num_nodes", [2, 9])
    def test_gpu_staging_has_a_bound(self, num_nodes: int, name: str) -> None:
        job = replace(LARGE, num_nodes=num_nodes, num_experts=144, routing=name)
        found = cost.make_plan(job, Rates()).memory.gpu_staging_bytes
        num_sums = min(job.num_topk, num_nodes - 1) * job.num_tokens
        assert found < (3 * job.num_tokens + 256 + num_sums) * (14336 + 8 * 12)

    @pytest.mark.parametrize("dtype", cost.DTYPES)
    @pytest.mark.parametrize("num_nodes", [2, 9, 256])
    def test_pinned_staging_is_within_the_hint(
        self, num_nodes: int, dtype: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("EPCOMM_RANKS_PER_NODE", raising=False)
        # All tokens go to all nodes.
        node_rows = np.full((num_nodes, 8, num_nodes), 4096.0)
        memory = cost.memory_by_rail(replace(LARGE, num_nodes=num_nodes, dtype=dtype), node_rows)
        hint = Config().get_rdma_buffer_size_hint(14336, 8 * num_nodes)
        assert memory.pinned_staging_bytes <= hint

    @pytest.mark.parametrize("num_tokens", [100, 4096])
    def test_several_nodes_need_the_slab_of_one(self, num_tokens: int) -> None:
        one_node = replace(LARGE, num_nodes=1, num_tokens=num_tokens)
        found = cost.make_plan(replace(one_node, num_nodes=2), Rates()).memory
        same = cost.make_plan(one_node, Rates()).memory
        assert found.slab_bytes == same.slab_bytes
        assert found.hint_bytes == same.hint_bytes


class TestMeasured:
    @pytest.mark.parametrize("case", MEASURED, ids=lambda case: case["name"])
    def test_bytes_and_times(self, case: dict[str, Any]) -> None:
        options = plan.Options(**case["job"])
        found = cost.make_plan(options.job, options.rates).costs["rails"][case["operation"]]
        for key, spread in (
            ("nvlink_mb", found.nvlink_received_bytes),
            ("network_mb", found.network_received_bytes),
        ):
            assert spread.mean / 1e6 == pytest.approx(case.get(key, 0), rel=0.02)
        for us in case["us"]:
            assert found.us == pytest.approx(us, rel=0.25)

    @pytest.mark.parametrize("case", MEASURED, ids=lambda case: case["name"])
    def test_measured_bytes_are_those_of_the_formula(self, case: dict[str, Any]) -> None:
        job = plan.Options(**case["job"]).job
        if job.num_nodes > 1 or job.routing != "uniform":
            pytest.skip("the formula is of one node and uniform routing")
        hit_rank = odds_to_hit(job, job.num_experts // job.num_ranks)
        rows = job.num_tokens * (job.num_ranks - 1) * hit_rank
        remote_mb = rows * cost.row_bytes(job.dtype, job.hidden) / 1e6
        assert case["nvlink_mb"] == pytest.approx(remote_mb, rel=0.02)


@pytest.mark.skipif(
    not RAILS.exists(), reason="docs/results/rails.json is not there: scripts/bench_rails writes it"
)
def test_recorded_bytes_between_nodes() -> None:
    """Bytes alone: both nodes are on one host, whose times are not what the model is about."""
    runs = json.loads(RAILS.read_text())["runs"]
    assert runs
    for run in runs:
        case = run["case"]
        job = Job(
            num_nodes=case["num_nodes"],
            gpus_per_node=case["num_ranks"] // case["num_nodes"],
            num_tokens=case["tokens"],
            hidden=case["hidden"],
            num_topk=case["topk"],
            num_experts=case["experts"],
        )
        costs = cost.make_plan(job, Rates()).costs
        for way, key in (("rails", "deduplicated_bytes"), ("direct", "one_a_rank_bytes")):
            for found in costs[way].values():
                num_bytes = found.network_sent_bytes.mean * job.num_ranks
                assert num_bytes == pytest.approx(run[key], rel=0.02), (run["network"], way)


def run_plan(*words: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EPCOMM_")}
    return subprocess.run(
        [sys.executable, "-m", "epcomm", "plan", *words],
        env=clean | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


class TestCommand:
    def test_report_and_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "plan.json"
        assert (
            main(["plan", *SIZES.split(), "--dtype", "fp8", "--network", "25", "--json", str(file)])
            == 0
        )
        shown, facts = capsys.readouterr().out, json.loads(file.read_text())
        job, rates = Job(**facts["job"]), Rates(**facts["rates"])
        assert job == replace(SMALL, dtype="fp8")
        assert rates == Rates(network_gb_s=25.0)
        again = asdict(cost.make_plan(job, rates))
        assert {key: facts[key] for key in again} == again
        assert facts["chunks"] == {"num_tokens": 256, "num_in_flight": 6}
        for way in ("rails", "direct"):
            for operation in ("dispatch", "combine"):
                found = facts["costs"][way][operation]
                assert f"{found['us']:,.0f}" in shown
                for key, spread in found.items():
                    if key.endswith("_bytes"):
                        unit = 1e3 if key == "message_bytes" else 1e6
                        numbers = (spread[name] / unit for name in ("min", "mean", "max"))
                        assert " / ".join(f"{number:,.1f}" for number in numbers) in shown
        assert "all simulated" in shown

    def test_nothing_of_a_network_in_one_node(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *SIZES.split(), "--nodes", "1"]) == 0
        lines = capsys.readouterr().out.splitlines()
        about = [line for line in lines if "network" in line]
        assert len(about) == 1
        assert about[0].startswith("  links ")
        assert not any("rails" in line or line.isspace() for line in lines)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("--experts 6", "--experts is 6 on 4 ranks; every rank must hold the same number of "),
            ("--experts 6", "Try --experts 8."),
            ("--experts 8196", "at most 2048 a rank. Pass at most 8192."),
            ("--topk 9", "--topk is 9 and --experts 8; a token cannot go to more experts than "),
            ("--tokens 0", "--tokens is 0; it must be 1 or more."),
            ("--gpus-per-node -1", "--gpus-per-node is -1; it must be 1 or more."),
            ("--gpus-per-node 9", "--gpus-per-node is 9; the cuda engine takes at most 8 ranks "),
            ("--nodes 1025", "together 2050 ranks; plan simulates at most 2048."),
            ("--hidden 100", "Try --hidden 104."),
            ("--hidden 104 --dtype fp8", "--hidden is 104; it must be a multiple of 16, because "),
            ("--nvlink 0", "--nvlink is 0; it must be a number of GB/s above 0."),
            ("--network inf", "--network is inf; it must be a number of GB/s above 0."),
            ("--latency nan", "--latency is nan; it must be a number of microseconds, 0 or more."),
            ("--json /nowhere/plan.json", "--json /nowhere/plan.json: No such file or directory."),
        ],
    )
    def test_refuses(self, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *SIZES.split(), *words.split()]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith("epcomm plan: ")
        assert message in shown.err

    @pytest.mark.parametrize("words", [["--routing", "even"], ["--tokens", "many"], ["--dtype=f8"]])
    def test_refuses_words(self, words: list[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["plan", *SIZES.split(), *words])
        assert ended.value.code == 2

    def test_sizes_must_be_given(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["plan"])
        assert ended.value.code == 2
        assert "--nodes" in capsys.readouterr().err


def test_the_command_of_the_document_runs() -> None:
    (line,) = re.findall(r"^python -m epcomm (plan .*)$", SCALING, re.MULTILINE)
    assert main(line.split()) == 0


def test_the_messages_of_the_document_are_the_engine_s() -> None:
    assert f"| rows of a message | {DEFAULT_CHUNKS.num_tokens} |" in SCALING
    assert f"| messages under way | {DEFAULT_CHUNKS.num_in_flight} |" in SCALING
    assert f"⌈rows / {DEFAULT_CHUNKS.num_tokens}⌉" in SCALING


def test_the_table_of_the_document_is_the_tool_s() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/render_scaling", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
