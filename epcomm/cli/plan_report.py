"""How a plan is told to people."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from epcomm.cli.cost import Cost, Plan, Spread, num_calls
from epcomm.engines.base import DEFAULT_CHUNKS

Line = tuple[str, str]

#: Bytes on links, by the attribute of `Cost` that has them.
_LINKS = {
    "NVLink sent": "nvlink_sent_bytes",
    "NVLink received": "nvlink_received_bytes",
    "network sent": "network_sent_bytes",
    "network received": "network_received_bytes",
}
_COLUMN = 28


def describe_plan(plan: Plan) -> str:
    """Return the report."""
    sections = [
        ("job", _describe_job(plan)),
        ("MB a rank: min / mean / max over ranks", _describe_traffic(plan)),
        ("us of the slowest rank", _describe_times(plan)),
        ("memory a rank", _describe_memory(plan)),
    ]
    if plan.job.num_nodes > 1:
        sections.insert(3, ("messages of a rank over the network", _describe_messages(plan)))
    lines = []
    for title, found in sections:
        lines.append(title)
        lines += [f"  {name:<26} {text}" for name, text in found]
    return "\n".join(lines)


def _describe_job(plan: Plan) -> Iterator[Line]:
    job, rates, sampled = plan.job, plan.rates, plan.sampled_tokens
    num_local = job.num_experts // job.num_ranks
    yield (
        "ranks",
        f"{job.num_ranks:,}: nodes {job.num_nodes:,}, GPUs a node {job.gpus_per_node}; "
        f"experts {job.num_experts:,}, {num_local} a rank",
    )
    simulated = "all simulated"
    if sampled < job.num_tokens:
        simulated = f"{sampled:,} of them simulated, counts × {job.num_tokens / sampled:g}"
    yield "tokens a rank", f"{job.num_tokens:,}, {simulated}; top-{job.num_topk}, {job.routing}"
    of_row = plan.row_bytes
    yield (
        "bytes of a row",
        f"dispatch {of_row['dispatch']:,} ({job.dtype}), combine {of_row['combine']:,} (bf16)",
    )
    yield (
        "links",
        f"NVLink {rates.nvlink_gb_s:g} GB/s, network {rates.network_gb_s:g} GB/s, each way; "
        f"{rates.latency_us:g} us a step",
    )
    if job.num_nodes > 1:
        yield (
            "rails",
            "rows cross once a node, through pinned host memory, then spread over NVLink",
        )
        yield "direct", "rows cross the network once a rank"


def _describe_traffic(plan: Plan) -> Iterator[Line]:
    yield from _header(plan)
    for operation in plan.row_bytes:
        for link, attribute in _LINKS.items():
            spreads = [getattr(cost, attribute) for cost in _costs(plan, operation)]
            if plan.job.num_nodes > 1 or link.startswith("NVLink"):
                yield f"{operation}, {link}", _columns(_shown(spread, 1e6) for spread in spreads)


def _describe_times(plan: Plan) -> Iterator[Line]:
    yield from _header(plan)
    for operation in plan.row_bytes:
        yield operation, _columns(f"{cost.us:,.0f}" for cost in _costs(plan, operation))


def _describe_messages(plan: Plan) -> Iterator[Line]:
    yield from _header(plan)
    for operation in plan.row_bytes:
        counts = [cost.num_messages for cost in _costs(plan, operation)]
        yield f"{operation}, at most", _columns(f"{count:,}" for count in counts)
        spreads = [cost.message_bytes for cost in _costs(plan, operation)]
        yield f"{operation}, KB of each", _columns(_shown(spread, 1e3) for spread in spreads)
    yield (
        "rows of a message",
        f"at most {DEFAULT_CHUNKS.num_tokens}; rails: {DEFAULT_CHUNKS.num_in_flight} messages "
        "under way each way",
    )
    yield "calls inside a node", f"{num_calls(plan.job):,}, rails: one for each source node"


def _describe_memory(plan: Plan) -> Iterator[Line]:
    memory = plan.memory
    yield "slab", f"{memory.slab_bytes / 1e6:,.0f} MB of GPU memory"
    yield "num_nvl_bytes to pass", f"{memory.hint_bytes}, with which the slab never grows"
    if plan.job.num_nodes > 1:
        yield (
            "staging between nodes",
            f"{memory.gpu_staging_bytes / 1e6:,.0f} MB of GPU memory, rails: rows and sums",
        )
        yield (
            "",
            f"{memory.pinned_staging_bytes / 1e6:,.0f} MB of pinned host memory, rails: messages "
            "under way",
        )


def _costs(plan: Plan, operation: str) -> list[Cost]:
    """Return an operation's costs, a column each; in one node both ways are the same."""
    ways = list(plan.costs) if plan.job.num_nodes > 1 else ["direct"]
    return [plan.costs[way][operation] for way in ways]


def _header(plan: Plan) -> Iterator[Line]:
    if plan.job.num_nodes > 1:
        yield "", _columns(plan.costs)


def _columns(cells: Iterable[str]) -> str:
    return "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def _shown(spread: Spread, unit: float) -> str:
    values = (spread.min, spread.mean, spread.max)
    return " / ".join(f"{value / unit:,.1f}" for value in values)
