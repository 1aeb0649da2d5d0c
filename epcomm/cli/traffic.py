"""Which rows cross which links: the routing of a mixture-of-experts job, simulated with NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ROUTINGS = ("uniform", "zipf")

#: Choices that are drawn at most; where a job has more, fewer tokens a rank are drawn.
MAX_CHOICES = 1 << 24
#: Choices that are in memory at a time.
_BLOCK_CHOICES = 1 << 20
#: A token that takes one expert in so many, or more, is drawn from keys of all experts.
_MANY_CHOICES_PART = 4
_SEED = 0


@dataclass(frozen=True)
class Job:
    """A mixture-of-experts layer and the ranks it runs on; rank r is on node r // gpus_per_node.

    Attributes:
        num_nodes: Nodes.
        gpus_per_node: Ranks of a node.
        num_tokens: Tokens a rank.
        hidden: Elements of a row.
        num_topk: Experts that a token goes to, all different.
        num_experts: Experts over all ranks, a multiple of the number of ranks.
        dtype: Of dispatched rows, ``"bf16"`` or ``"fp8"``.
        routing: One of ``ROUTINGS``: all experts alike, or expert e of a fixed random order with
            probability proportional to 1 / (e + 1).
    """

    num_nodes: int
    gpus_per_node: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    dtype: str = "bf16"
    routing: str = "uniform"

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def sampled_tokens(self) -> int:
        """Tokens a rank that are drawn: all, unless they make more than ``MAX_CHOICES``."""
        most = MAX_CHOICES // (self.num_ranks * self.num_topk)
        return min(self.num_tokens, max(1, most))


@dataclass(frozen=True)
class Traffic:
    """Where the rows of one dispatch go; counts of a sample are scaled to the job's tokens.

    Attributes:
        rank_rows: ``[num_nodes, gpus_per_node, num_nodes, gpus_per_node]`` rows from source to
            receiver, each as node and rail; a token counts once a receiving rank.
        node_rows: ``[num_nodes, gpus_per_node, num_nodes]`` tokens from source to receiving node;
            a token counts once a node.
    """

    rank_rows: Floats
    node_rows: Floats


@dataclass(frozen=True)
class Loads:
    """Rows that each rank sends and receives, by kind of link.

    Rows that stay on their rank cross no link.

    Attributes:
        nvlink_sent, nvlink_received, network_sent, network_received: ``[num_ranks]``.
        message_rows: ``[lanes, senders, receivers]`` rows over the network; with rails a lane is a
            rail and a sender a node, otherwise all ranks are in one.
    """

    nvlink_sent: Floats
    nvlink_received: Floats
    network_sent: Floats
    network_received: Floats
    message_rows: Floats

    def backwards(self) -> Loads:
        """Return the loads of combine, which takes every row of a dispatch back."""
        return Loads(
            nvlink_sent=self.nvlink_received,
            nvlink_received=self.nvlink_sent,
            network_sent=self.network_received,
            network_received=self.network_sent,
            message_rows=self.message_rows.swapaxes(1, 2),
        )


@dataclass(frozen=True)
class Rounds:
    """Rows of the rank of a node that has the most to move, in each round of a call with rails.

    Round k of a dispatch takes the rows of the node k before: they cross, then spread. Combine goes
    through the same rounds backwards. Of sent and received rows the more count.

    Attributes:
        nvlink: ``[num_nodes, num_nodes]`` by round and node; in round 0 of the node's own rows.
        network: The same over the network; none in round 0.
    """

    nvlink: Floats
    network: Floats


def simulate(job: Job) -> Traffic:
    """Draw the experts of every rank's tokens and count where their rows go."""
    num_tokens, num_ranks = job.sampled_tokens, job.num_ranks
    rng = np.random.default_rng(_SEED)
    odds = _odds_of(job, rng)
    rank_rows = np.empty((num_ranks, num_ranks))
    node_rows = np.empty((num_ranks, job.num_nodes))
    step = max(1, _BLOCK_CHOICES // (num_tokens * job.num_topk))
    for begin in range(0, num_ranks, step):
        sources = slice(begin, min(begin + step, num_ranks))
        num_sources = sources.stop - begin
        experts = draw_experts(rng, odds, num_sources * num_tokens, job.num_topk)
        ranks = experts // (job.num_experts // num_ranks)
        nodes = ranks // job.gpus_per_node
        rank_rows[sources] = _count_once_a_token(ranks, num_sources, num_ranks)
        node_rows[sources] = _count_once_a_token(nodes, num_sources, job.num_nodes)
    scale = job.num_tokens / num_tokens
    shape = (job.num_nodes, job.gpus_per_node)
    return Traffic(
        scale * rank_rows.reshape(*shape, *shape), scale * node_rows.reshape(*shape, job.num_nodes)
    )


def load_by_rail(traffic: Traffic) -> Loads:
    """Count a dispatch's rows where they cross the network once a node, then spread over NVLink.

    A row for another node goes to that node's rank on the source's rail, which passes it on to
    every rank of the node that it is for.
    """
    spread = traffic.rank_rows.sum(axis=0).transpose(1, 0, 2)  # [node, rail, receiver]
    spread = spread * ~np.eye(spread.shape[1], dtype=bool)
    is_remote = ~np.eye(len(traffic.node_rows), dtype=bool)
    crossing = traffic.node_rows * is_remote[:, None, :]
    return Loads(
        nvlink_sent=spread.sum(axis=2).ravel(),
        nvlink_received=spread.sum(axis=1).ravel(),
        network_sent=crossing.sum(axis=2).ravel(),
        network_received=crossing.sum(axis=0).T.ravel(),
        message_rows=crossing.transpose(1, 0, 2),
    )


def find_rounds(traffic: Traffic) -> Rounds:
    """Count the rows of each round."""
    num_nodes, size = traffic.rank_rows.shape[:2]
    nodes = np.arange(num_nodes)
    before = (nodes - nodes[:, None]) % num_nodes  # [round, node]
    after = (nodes + nodes[:, None]) % num_nodes
    spread = traffic.rank_rows[before, :, nodes] * ~np.eye(size, dtype=bool)
    received, sent = traffic.node_rows[before, :, nodes], traffic.node_rows[nodes, :, after]
    network = np.maximum(sent, received).max(axis=2)
    network[0] = 0
    return Rounds(
        nvlink=np.maximum(spread.sum(axis=3), spread.sum(axis=2)).max(axis=2), network=network
    )


def load_direct(traffic: Traffic) -> Loads:
    """Count a dispatch's rows where they go straight to every rank that they are for."""
    num_nodes, gpus_per_node = traffic.rank_rows.shape[:2]
    is_remote = ~np.eye(num_nodes, dtype=bool)
    crossing = traffic.rank_rows * is_remote[:, None, :, None]
    within = np.einsum("nsnd->nsd", traffic.rank_rows) * ~np.eye(gpus_per_node, dtype=bool)
    return Loads(
        nvlink_sent=within.sum(axis=2).ravel(),
        nvlink_received=within.sum(axis=1).ravel(),
        network_sent=crossing.sum(axis=(2, 3)).ravel(),
        network_received=crossing.sum(axis=(0, 1)).ravel(),
        message_rows=crossing.reshape(1, num_nodes * gpus_per_node, -1),
    )


def draw_experts(rng: np.random.Generator, odds: Floats, num_tokens: int, num_topk: int) -> Ints:
    """Draw different experts for every token, one after the other without putting back.

    Args:
        rng: Source of randomness.
        odds: ``[num_experts]`` probability of each, the sum being 1.
        num_tokens: Tokens.
        num_topk: Experts a token.

    Returns:
        ``[num_tokens, num_topk]`` global expert ids, ascending in each row.
    """
    if num_topk * _MANY_CHOICES_PART > len(odds):
        # The expert whose exponential clock rings first is drawn first.
        keys = rng.exponential(size=(num_tokens, len(odds))) / odds
        experts = np.argpartition(keys, num_topk - 1, axis=1)[:, :num_topk]
        return np.sort(experts, axis=1)
    experts = np.sort(rng.choice(len(odds), (num_tokens, num_topk), p=odds), axis=1)
    # NOTE: what was drawn twice is drawn again until all differ. That is the same distribution as
    # putting no expert back: the first different ones of a sequence are kept.
    repeating = np.arange(num_tokens)
    while len(repeating):
        part = experts[repeating]
        is_repeat = part[:, 1:] == part[:, :-1]
        part[:, 1:][is_repeat] = rng.choice(len(odds), np.count_nonzero(is_repeat), p=odds)
        part.sort(axis=1)
        experts[repeating] = part
        repeating = repeating[is_repeat.any(axis=1)]
    return experts


def _odds_of(job: Job, rng: np.random.Generator) -> Floats:
    weights = np.ones(job.num_experts)
    if job.routing == "zipf":
        # Popular experts lie on scattered ranks, the same ones for every source.
        weights /= 1.0 + rng.permutation(job.num_experts)
    weights /= weights.sum()
    return weights


def _count_once_a_token(places: Ints, num_sources: int, num_places: int) -> Ints:
    """Count the tokens from each source to each place.

    Args:
        places: ``[num_sources * tokens, num_topk]`` where each choice goes, ascending in each row.
        num_sources: Sources, each with as many tokens.
        num_places: Ranks or nodes.

    Returns:
        ``[num_sources, num_places]``; a token counts once a place.
    """
    is_first = np.ones(places.shape, bool)
    is_first[:, 1:] = places[:, 1:] != places[:, :-1]
    source = np.repeat(np.arange(num_sources), len(places) // num_sources)
    flat = (source[:, None] * num_places + places)[is_first]
    counts = np.bincount(flat, minlength=num_sources * num_places)
    return counts.reshape(num_sources, num_places)
