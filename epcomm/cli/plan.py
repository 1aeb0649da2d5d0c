"""``python -m epcomm plan``: what a mixture-of-experts job will send, wait for and keep."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from epcomm import __version__
from epcomm.cli import cost
from epcomm.cli.plan_report import describe_plan
from epcomm.cli.traffic import ROUTINGS, Job
from epcomm.cuda_layout import MAX_LOCAL_EXPERTS, MAX_RANKS
from epcomm.engines.base import DEFAULT_CHUNKS
from epcomm.errors import InvalidArgument

EXIT_OK = 0
EXIT_BAD_ARGUMENTS = 2

#: Arguments that a reader can start from.
EXAMPLE = "--nodes 2 --gpus-per-node 8 --tokens 4096 --hidden 7168 --topk 8 --experts 256"

#: Ranks of all nodes: what is simulated grows with their square.
MAX_PLANNED_RANKS = 2048
#: Bytes that every row is a multiple of.
_ROW_MULTIPLE = 16


@dataclass(frozen=True)
class Options:
    """The command's arguments, as `add_arguments` describes them."""

    nodes: int
    gpus_per_node: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: str = "bf16"
    routing: str = "uniform"
    nvlink: float = cost.DEFAULT_NVLINK_GB_S
    network: float = cost.DEFAULT_NETWORK_GB_S
    latency: float = cost.DEFAULT_LATENCY_US
    json: Path | None = None

    @property
    def job(self) -> Job:
        """The job to plan."""
        return Job(
            num_nodes=self.nodes,
            gpus_per_node=self.gpus_per_node,
            num_tokens=self.tokens,
            hidden=self.hidden,
            num_topk=self.topk,
            num_experts=self.experts,
            dtype=self.dtype,
            routing=self.routing,
        )

    @property
    def rates(self) -> cost.Rates:
        """What its links do."""
        return cost.Rates(self.nvlink, self.network, self.latency)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    numbers = (
        ("nodes", "nodes of the job"),
        ("gpus-per-node", "GPUs of a node, a rank each"),
        ("tokens", "tokens a rank"),
        ("hidden", "elements of a token row"),
        ("topk", "experts that a token goes to"),
        ("experts", "experts over all ranks; a multiple of the number of ranks"),
    )
    for name, what in numbers:
        parser.add_argument(f"--{name}", type=int, required=True, metavar="N", help=what)
    choices = (
        ("dtype", tuple(cost.DTYPES), "of dispatched rows; combined ones are bf16"),
        ("routing", ROUTINGS, "how tokens choose their experts"),
    )
    for name, values, what in choices:
        default = getattr(Options, name)
        parser.add_argument(
            f"--{name}", choices=values, default=default, help=f"{what} (default {default})"
        )
    rates = (
        ("nvlink", "GB/s", "of a GPU, each way"),
        ("network", "GB/s", "of a GPU to other nodes, each way"),
        ("latency", "us", "fixed time of a step over the network, or a call in a node"),
    )
    for name, unit, what in rates:
        default = getattr(Options, name)
        parser.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar=unit,
            help=f"{what} (default {default:g})",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there too")


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Args:
        args: What a parser with `add_arguments` returned.

    Returns:
        The exit code: 0, or 2 for bad arguments.
    """
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    try:
        check_options(options)
        plan = cost.make_plan(options.job, options.rates)
        if options.json is not None:
            _write(options.json, plan)
    except InvalidArgument as error:
        print(f"epcomm plan: {error}", file=sys.stderr)
        return EXIT_BAD_ARGUMENTS
    print(describe_plan(plan))
    return EXIT_OK


def check_options(options: Options) -> None:
    """Refuse what cannot be planned.

    Raises:
        InvalidArgument: An option, or two together.
    """
    for field in fields(Options):
        value = getattr(options, field.name)
        if isinstance(value, int) and value < 1:
            name = field.name.replace("_", "-")
            raise InvalidArgument(f"--{name} is {value}; it must be 1 or more.")
    for name in ("nvlink", "network"):
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise InvalidArgument(f"--{name} is {value:g}; it must be a number of GB/s above 0.")
    if not 0 <= options.latency < math.inf:
        raise InvalidArgument(
            f"--latency is {options.latency:g}; it must be a number of microseconds, 0 or more."
        )
    _check_ranks(options)
    _check_experts(options)
    _check_row(options)


def _check_ranks(options: Options) -> None:
    num_ranks = options.job.num_ranks
    if options.gpus_per_node > MAX_RANKS:
        raise InvalidArgument(
            f"--gpus-per-node is {options.gpus_per_node}; the cuda engine takes at most "
            f"{MAX_RANKS} ranks a node. Pass more --nodes of fewer GPUs."
        )
    if num_ranks > MAX_PLANNED_RANKS:
        raise InvalidArgument(
            f"--nodes is {options.nodes} and --gpus-per-node {options.gpus_per_node}, together "
            f"{num_ranks} ranks; plan simulates at most {MAX_PLANNED_RANKS}. Pass fewer --nodes."
        )


def _check_experts(options: Options) -> None:
    num_ranks = options.job.num_ranks
    if options.experts % num_ranks:
        raise InvalidArgument(
            f"--experts is {options.experts} on {num_ranks} ranks; every rank must hold the same "
            f"number of experts. Try --experts {-(-options.experts // num_ranks) * num_ranks}."
        )
    if options.experts > MAX_LOCAL_EXPERTS * num_ranks:
        raise InvalidArgument(
            f"--experts is {options.experts} on {num_ranks} ranks; the cuda engine takes at most "
            f"{MAX_LOCAL_EXPERTS} a rank. Pass at most {MAX_LOCAL_EXPERTS * num_ranks}."
        )
    if options.topk > options.experts:
        raise InvalidArgument(
            f"--topk is {options.topk} and --experts {options.experts}; a token cannot go to more "
            "experts than there are. Pass a smaller --topk or more --experts."
        )


def _check_row(options: Options) -> None:
    multiple = _ROW_MULTIPLE // cost.itemsize(options.dtype)
    if options.hidden % multiple:
        raise InvalidArgument(
            f"--hidden is {options.hidden}; it must be a multiple of {multiple}, because a row of "
            f"{options.dtype} must be a multiple of {_ROW_MULTIPLE} bytes. "
            f"Try --hidden {-(-options.hidden // multiple) * multiple}."
        )


def _write(path: Path, plan: cost.Plan) -> None:
    """Write everything that the report tells, and what it rests on, for machines."""
    facts = {
        "epcomm": __version__,
        "chunks": asdict(DEFAULT_CHUNKS),
        **asdict(plan),
    }
    try:
        path.write_text(json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise InvalidArgument(
            f"--json {path}: {error.strerror}. Name a file in a folder that can be written."
        ) from error
