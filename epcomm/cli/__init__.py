"""``python -m epcomm info | demo | plan``: this machine, the main job on it, and jobs to come."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from epcomm import __version__, env
from epcomm.cli import demo, info, plan
from epcomm.cli.launch import is_mpi_rank, run_on_ranks
from epcomm.errors import InvalidArgument


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``python -m epcomm``; None takes the process's.

    Returns:
        The exit code: 0, or above where something failed.
    """
    parser = argparse.ArgumentParser(prog="python -m epcomm", description=__doc__)
    parser.add_argument("--version", action="version", version=f"epcomm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    add = _add_command(commands, "info", "print what was found, and how to get what is missing")
    info.add_arguments(add)
    add = _add_command(commands, "demo", "train a small mixture-of-experts language model")
    demo.add_arguments(add)
    add.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="run N ranks as threads of this process (default: the ranks mpiexec started, or 4)",
    )
    add = _add_command(commands, "plan", "foretell what a job on many GPUs sends and waits for")
    add.epilog = f"example: {add.prog} {plan.EXAMPLE}"
    plan.add_arguments(add)
    args = parser.parse_args(argv)
    try:
        env.settings()
    except InvalidArgument as error:
        parser.error(str(error))
    if args.command == "info":
        return info.run(args)
    if args.command == "plan":
        return plan.run(args)
    if args.threads is not None and is_mpi_rank():
        parser.error("--threads makes ranks of this process, and mpiexec started ranks; pass one.")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}; it must be 1 or more.")
    return max(run_on_ranks(lambda group: demo.run(args, group), args.threads))


def _add_command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    """Add a command that says what it does, in the list of commands and in its own help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser
