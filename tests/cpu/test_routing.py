"""Layout and final positions, against loops that follow the definitions word by word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epcomm import routing

pytestmark = pytest.mark.timeout(60)


@dataclass
class Case:
    """Choices of every rank, and which ranks share a node."""

    topk_idx: list[np.ndarray]
    num_experts: int
    node_of_rank: list[int]

    @property
    def num_ranks(self) -> int:
        return len(self.node_of_rank)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw any group: 1 to 6 ranks, 0 to 12 tokens each, choices that may repeat or be -1."""
    num_ranks = draw(st.integers(1, 6))
    num_experts = num_ranks * draw(st.integers(1, 4))
    num_topk = draw(st.integers(0, 6))
    ranks_per_node = draw(st.integers(1, num_ranks))
    low = draw(st.sampled_from([-1, 0]))
    high = draw(st.sampled_from([low, num_experts - 1]))  # everything to one expert, or spread
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    topk_idx = []
    for _ in range(num_ranks):
        num_tokens = draw(st.integers(0, 12))
        flat = draw(
            st.lists(
                st.integers(low, high),
                min_size=num_tokens * num_topk,
                max_size=num_tokens * num_topk,
            )
        )
        topk_idx.append(np.array(flat, dtype).reshape(num_tokens, num_topk))
    nodes = [rank // ranks_per_node for rank in range(num_ranks)]
    return Case(topk_idx, num_experts, nodes)


def layouts(case: Case) -> list[routing.Layout]:
    return [routing.make_layout(idx, case.num_experts, case.node_of_rank) for idx in case.topk_idx]


def goes_to(case: Case, source: int, token: int) -> set[int]:
    """Return the ranks that hold an expert of a token."""
    local = case.num_experts // case.num_ranks
    return {int(expert) // local for expert in case.topk_idx[source][token] if expert >= 0}


@given(cases())
def test_layout_against_loops(case: Case) -> None:
    for source, layout in enumerate(layouts(case)):
        num_tokens = len(case.topk_idx[source])
        per_rank, per_node = [0] * case.num_ranks, [0] * (max(case.node_of_rank) + 1)
        per_expert = [0] * case.num_experts
        in_rank = [[False] * case.num_ranks for _ in range(num_tokens)]
        for token in range(num_tokens):
            for expert in case.topk_idx[source][token].tolist():
                if expert >= 0:
                    per_expert[expert] += 1
            for rank in goes_to(case, source, token):
                per_rank[rank] += 1
                in_rank[token][rank] = True
            for node in {case.node_of_rank[rank] for rank in goes_to(case, source, token)}:
                per_node[node] += 1
        assert layout.num_tokens_per_rank.tolist() == per_rank
        assert layout.num_tokens_per_node.tolist() == per_node
        assert layout.num_tokens_per_expert.tolist() == per_expert
        assert layout.is_token_in_rank.tolist() == in_rank


@given(cases())
def test_layout_dtypes_and_shapes(case: Case) -> None:
    for idx, layout in zip(case.topk_idx, layouts(case), strict=True):
        assert layout.num_tokens_per_rank.dtype == np.int32
        assert layout.num_tokens_per_node.dtype == np.int32
        assert layout.num_tokens_per_expert.dtype == np.int32
        assert layout.is_token_in_rank.dtype == np.bool_
        assert layout.is_token_in_rank.shape == (len(idx), case.num_ranks)
        assert layout.is_token_in_rank.flags.c_contiguous


@given(cases())
def test_layout_leaves_the_choices_alone(case: Case) -> None:
    before = [idx.copy() for idx in case.topk_idx]
    for idx in case.topk_idx:
        idx.flags.writeable = False
    layouts(case)
    for idx, copy in zip(case.topk_idx, before, strict=True):
        np.testing.assert_array_equal(idx, copy)


@given(cases())
def test_sums(case: Case) -> None:
    for idx, layout in zip(case.topk_idx, layouts(case), strict=True):
        assert layout.num_tokens_per_expert.sum() == (idx >= 0).sum()
        assert layout.num_tokens_per_rank.sum() == layout.is_token_in_rank.sum()
        assert layout.num_tokens_per_rank.sum() <= (idx >= 0).sum()
        assert (layout.num_tokens_per_rank <= len(idx)).all()
        # A node's tokens: at least those of its busiest rank, at most those of all its ranks.
        for node, count in enumerate(layout.num_tokens_per_node):
            of_node = layout.num_tokens_per_rank[np.array(case.node_of_rank) == node]
            assert of_node.max() <= count <= of_node.sum()


def positions(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    made = layouts(case)
    counts = np.array([layout.num_tokens_per_rank for layout in made]).astype(np.int64)
    first = routing.first_positions(counts)
    placed = [
        routing.final_positions(layout.is_token_in_rank, first[source])
        for source, layout in enumerate(made)
    ]
    return counts, placed


@given(cases())
def test_final_positions_against_loops(case: Case) -> None:
    counts, placed = positions(case)
    for receiver in range(case.num_ranks):
        row = 0
        for source in range(case.num_ranks):
            for token in range(len(case.topk_idx[source])):
                if receiver in goes_to(case, source, token):
                    assert placed[source][token, receiver] == row
                    row += 1
                else:
                    assert placed[source][token, receiver] == -1
        assert row == counts[:, receiver].sum()


@given(cases())
def test_final_positions_are_a_permutation_of_each_receivers_rows(case: Case) -> None:
    counts, placed = positions(case)
    for receiver in range(case.num_ranks):
        rows = np.concatenate([part[:, receiver] for part in placed])
        rows = rows[rows >= 0]
        assert sorted(rows.tolist()) == list(range(counts[:, receiver].sum()))
        assert rows.tolist() == sorted(rows.tolist())


@given(cases())
def test_order_of_ranks_does_not_depend_on_what_others_send(case: Case) -> None:
    """A source's rows lie in one block, in token order, wherever the block begins."""
    _, placed = positions(case)
    for part in placed:
        for receiver in range(case.num_ranks):
            rows = part[:, receiver][part[:, receiver] >= 0]
            np.testing.assert_array_equal(np.diff(rows), 1)


@given(
    st.integers(1, 8).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 1 << 40), min_size=n, max_size=n), min_size=n, max_size=n
        )
    )
)
def test_first_positions(rows: list[list[int]]) -> None:
    counts = np.array(rows, np.int64)
    first = routing.first_positions(counts)
    assert first.dtype == np.int64
    for source in range(len(rows)):
        for receiver in range(len(rows)):
            assert first[source, receiver] == sum(rows[s][receiver] for s in range(source))


@given(st.integers(0, 10**6), st.integers(1, 1000))
def test_round_up(count: int, multiple: int) -> None:
    rounded = routing.round_up(count, multiple)
    assert rounded % multiple == 0
    assert count <= rounded < count + multiple


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8])
def test_one_expert_takes_all(num_ranks: int) -> None:
    idx = np.full((7, 2), num_ranks - 1, np.int64)
    layout = routing.make_layout(idx, num_ranks, [0] * num_ranks)
    assert layout.num_tokens_per_rank.tolist() == [0] * (num_ranks - 1) + [7]
    assert layout.num_tokens_per_expert.tolist() == [0] * (num_ranks - 1) + [14]
    assert layout.num_tokens_per_node.tolist() == [7]


def test_no_choice_at_all() -> None:
    layout = routing.make_layout(np.full((4, 3), -1), 6, [0, 0, 1])
    assert layout.num_tokens_per_rank.tolist() == [0, 0, 0]
    assert layout.num_tokens_per_node.tolist() == [0, 0]
    assert not layout.is_token_in_rank.any()


def test_no_tokens() -> None:
    layout = routing.make_layout(np.empty((0, 3), np.int64), 4, [0, 0])
    assert layout.num_tokens_per_expert.tolist() == [0, 0, 0, 0]
    assert layout.is_token_in_rank.shape == (0, 2)
    assert routing.final_positions(layout.is_token_in_rank, np.zeros(2, np.int64)).shape == (0, 2)
