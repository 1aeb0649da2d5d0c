"""`python -m epcomm demo`: train a small mixture-of-experts language model over the ranks.

Every rank holds all dense parameters and its own experts, draws tokens from its own shard of the
text, and adds its dense gradients to the other ranks'. Token rows reach their experts, and experts'
gradients their tokens, through `epcomm.training`: see `epcomm.cli.exchange`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from epcomm import env
from epcomm.cli import plot
from epcomm.cli.blas import share_processors
from epcomm.cli.device import array_namespace
from epcomm.cli.exchange import Array, EpExchange, to_host
from epcomm.cli.moe_model import Adam, ModelShape, MoeModel, Params, init_params, softmax
from epcomm.cli.reference import NUM_CHECKED_STEPS, Reference
from epcomm.cli.report import (
    NUM_PROGRESS_LINES,
    Progress,
    Report,
    describe_load,
    describe_sample,
    describe_traffic,
)
from epcomm.cli.text import Shard, get_min_bytes, read_text
from epcomm.engines import choose_engine
from epcomm.errors import InvalidArgument, UnsupportedConfig
from epcomm.group import Group

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_BAD_ARGUMENTS = 2

NUM_WARMUP_STEPS = 20
NUM_HELD_OUT_DRAWS = 8
NUM_SAMPLE_BYTES = 200
SAMPLE_TEMPERATURE = 0.6


@dataclass(frozen=True)
class Options:
    """The demo's arguments, as `add_arguments` describes them."""

    steps: int
    batch: int
    seed: int
    learning_rate: float
    hidden: int
    expert_hidden: int
    experts: int
    topk: int
    layers: int
    context: int
    embed: int
    text: Path | None
    plot: Path | None
    check: bool
    quiet: bool

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return ModelShape(
            context=self.context,
            embed=self.embed,
            hidden=self.hidden,
            expert_hidden=self.expert_hidden,
            num_experts=self.experts,
            topk=self.topk,
            num_layers=self.layers,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's arguments to a parser."""
    numbers = (
        ("steps", 800, "training steps"),
        ("batch", 256, "tokens a rank and step"),
        ("seed", 0, "of the parameters and the drawn tokens"),
        ("hidden", 128, "elements of a token row; a multiple of 4"),
        ("expert-hidden", 256, "hidden units of an expert"),
        ("experts", 16, "experts of a layer over all ranks; a multiple of the number of ranks"),
        ("topk", 2, "experts that a token goes to"),
        ("layers", 2, "mixture-of-experts layers"),
        ("context", 16, "bytes that the model sees"),
        ("embed", 24, "elements of a byte's embedding"),
    )
    for name, default, what in numbers:
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default {default})"
        )
    parser.add_argument(
        "--learning-rate", type=float, default=4e-3, metavar="X", help="of Adam (default 0.004)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what to learn (default: Python's own sources)"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a picture of loss, traffic and load"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"hold losses and gradients of the first {NUM_CHECKED_STEPS} steps to a model on one "
        "rank that does not use epcomm; the exit code is 1 where they differ",
    )
    parser.add_argument("--quiet", action="store_true", help="print the last lines only")


def run(args: argparse.Namespace, group: Group) -> int:
    """Run the demo on this rank. Collective.

    Args:
        args: what a parser with `add_arguments` returned, the same on every rank.
        group: the ranks. Rank 0 prints.

    Returns:
        The exit code, the same on every rank: 0, 1 for a failed check, 2 for bad arguments.
    """
    options = Options(**{field.name: getattr(args, field.name) for field in fields(Options)})
    try:
        check_options(options, group.size)
        settings = env.settings()
        engine = choose_engine(settings.engine)
        text = _load(options, group)
    except (InvalidArgument, UnsupportedConfig) as error:
        if group.rank == 0:
            print(f"epcomm demo: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_ARGUMENTS
    advice = share_processors(group)
    if advice and group.rank == 0 and not options.quiet:
        print(advice, flush=True)
    with array_namespace(engine, group) as xp:
        return Demo(xp, options, group, text, engine).run()


def check_options(options: Options, num_ranks: int) -> None:
    """Refuse what cannot work, whatever the machine.

    Raises:
        InvalidArgument: An option, or two together, or one with this number of ranks.
    """
    for field in fields(Options):
        value = getattr(options, field.name)
        lowest = 0 if field.name == "seed" else 1
        is_count = isinstance(value, int) and not isinstance(value, bool)
        if is_count and value < lowest:
            name = field.name.replace("_", "-")
            raise InvalidArgument(f"--{name} is {value}; it must be {lowest} or more.")
    if not 0 < options.learning_rate < math.inf:
        raise InvalidArgument(
            f"--learning-rate is {options.learning_rate}; it must be above 0. Try 0.004."
        )
    if options.hidden % 4:
        raise InvalidArgument(
            f"--hidden is {options.hidden}; it must be a multiple of 4, because a row of float32 "
            f"must be a multiple of 16 bytes. Try --hidden {-(-options.hidden // 4) * 4}."
        )
    if options.topk > options.experts:
        raise InvalidArgument(
            f"--topk is {options.topk} and --experts {options.experts}; a token cannot go to more "
            "experts than there are. Pass a smaller --topk or more --experts."
        )
    if options.experts % num_ranks:
        raise InvalidArgument(
            f"--experts is {options.experts} on {num_ranks} ranks; every rank must hold the same "
            "number of experts. "
            f"Try --experts {-(-options.experts // num_ranks) * num_ranks}."
        )


def _load(options: Options, group: Group) -> Array:
    """Return the text [num_bytes] uint8 as rank 0 reads it, and check rank 0's files.

    One rank reads for all, because other machines may hold another Python or no such file.
    """
    text, problem = b"", ""
    if group.rank == 0:
        try:
            if options.plot is not None:
                plot.check_plot(options.plot)
            text = read_text(options.text, get_min_bytes(group.size, options.context))
        except InvalidArgument as error:
            problem = str(error)
    text, problem = group.allgather((text, problem), phase="demo: text")[0]
    if problem:
        raise InvalidArgument(problem)
    return np.frombuffer(text, np.uint8)


class Demo:
    """One rank of the training. Collective, as are its calls.

    Args:
        xp: array namespace.
        options: checked options, the same on every rank.
        group: the ranks.
        text: [num_bytes] uint8, NumPy, the same on every rank.
        engine: what `Buffer` takes as engine.
    """

    def __init__(
        self, xp: Any, options: Options, group: Group, text: Array, engine: str | None = None
    ) -> None:
        self._xp = xp
        self._options = options
        self._group = group
        self._text = text
        shape = options.shape
        self._shard = Shard(
            xp,
            text,
            options.context,
            rank=group.rank,
            num_ranks=group.size,
            seed=options.seed,
        )
        self._num_local = options.experts // group.size
        dense, experts = init_params(xp, shape, options.seed, np.float32)
        mine = slice(group.rank * self._num_local, (group.rank + 1) * self._num_local)
        # A copy, so that the other ranks' experts can be freed.
        experts = {name: xp.array(param[mine]) for name, param in experts.items()}
        self._exchange = EpExchange(xp, group, options.experts, options.hidden, engine)
        self._model = MoeModel(xp, shape, dense, experts, self._exchange)
        self._optimizers = Adam(xp, dense), Adam(xp, experts)
        self._losses: list[float] = []
        self._load = np.zeros((options.layers, options.experts), np.int64)

    def run(self) -> int:
        """Train, report, and return the exit code."""
        self._say(self._describe_start)
        begin = time.perf_counter()
        problem = self._train()
        if problem is not None:
            if self._group.rank == 0:
                print(f"check failed: {problem}", file=sys.stderr, flush=True)
            return EXIT_CHECK_FAILED
        train_s = time.perf_counter() - begin
        report = self._make_report()
        self._say(lambda: "\n" + describe_traffic(report) + "\n\n" + describe_load(report))
        prompt, continuation = self._generate()
        self._say(lambda: "\n" + describe_sample(prompt, continuation) + "\n")
        held_out = self._measure_held_out()
        if self._group.rank == 0:
            if self._options.plot is not None:
                plot.write_plot(self._options.plot, report)
                print(f"picture written to {self._options.plot}")
            last = self._losses[-max(1, len(self._losses) // NUM_PROGRESS_LINES) :]
            print(
                f"trained {len(self._losses)} steps in {train_s:.1f} s: loss "
                f"{self._losses[0]:.3f} -> {sum(last) / len(last):.3f} nats a byte, "
                f"held-out text {held_out:.3f}",
                flush=True,
            )
        return EXIT_OK

    def _train(self) -> str | None:
        """Train; return what a check found wrong, or None."""
        options, num_steps = self._options, self._options.steps
        reference = Reference(self._xp, self._model, self._group) if options.check else None
        progress = Progress(self._exchange, options.batch * self._group.size, num_steps)
        for step in range(num_steps):
            problem = self._step(step, reference)
            if problem is not None:
                return problem
            if reference is not None and step + 1 == min(NUM_CHECKED_STEPS, num_steps):
                if self._group.rank == 0:
                    print(f"check passed: {reference.describe()}", flush=True)
                reference = None
                progress.restart(step + 1)
            if progress.is_due(step + 1):
                self._say(lambda: progress.describe(self._losses))
        return None

    def _step(self, step: int, reference: Reference | None) -> str | None:
        options, group, model = self._options, self._group, self._model
        num_tokens = options.batch * group.size
        batch = self._shard.draw(options.batch)
        own = model.run(*batch, num_tokens)
        flat = np.concatenate([to_host(self._xp, g).reshape(-1) for g in own.dense_grads.values()])
        found = group.allgather(
            (own.loss_sum, own.num_pairs_per_expert, flat), phase="demo: gradients"
        )
        losses, num_pairs, flats = zip(*found, strict=True)
        loss = sum(losses) / num_tokens
        dense_grads = self._unflatten(sum(flats[1:], start=flats[0]), own.dense_grads)
        load = np.concatenate([np.asarray(counts) for counts in num_pairs], axis=1)
        self._losses.append(loss)
        self._load += load
        rate = get_learning_rate(options.learning_rate, step, options.steps)
        problem = None
        if reference is not None:
            problem = reference.step(batch, own, loss, dense_grads, rate)
        self._optimizers[0].step(dense_grads, rate)
        self._optimizers[1].step(own.expert_grads, rate)
        model.balance_load(load)
        return problem

    def _unflatten(self, flat: Array, like: Params) -> Params:
        params, begin = {}, 0
        for name, param in like.items():
            part = flat[begin : begin + param.size]
            params[name] = self._xp.asarray(part).reshape(param.shape)
            begin += param.size
        return params

    def _make_report(self) -> Report:
        own = to_host(self._xp, self._exchange.num_rows_to_rank)
        num_rows = np.stack(self._group.allgather(own, phase="demo: traffic"))
        return Report(self._losses, num_rows, self._exchange.row_bytes, self._load)

    def _measure_held_out(self) -> float:
        """Return the mean loss of text that no rank trained on, in nats a byte."""
        batch = self._options.batch
        own = sum(
            self._model.loss_sum(*self._shard.draw_held_out(batch))
            for _ in range(NUM_HELD_OUT_DRAWS)
        )
        sums = self._group.allgather(own, phase="demo: held-out loss")
        return float(sum(sums)) / (batch * NUM_HELD_OUT_DRAWS * self._group.size)

    def _generate(self) -> tuple[bytes, bytes]:
        """Continue the held-out text on rank 0; other ranks only lend their experts.

        Returns:
            The bytes continued from, and the model's own; on other ranks without meaning.
        """
        xp, rng = self._xp, np.random.default_rng(self._options.seed)
        num_tokens = 1 if self._group.rank == 0 else 0
        window = self._shard.prompt.astype(np.int64)
        made: list[int] = []
        for _ in range(NUM_SAMPLE_BYTES):
            # NOTE: a rank without tokens still takes part: dispatch and combine are collective.
            contexts = xp.asarray(np.repeat(window[None], num_tokens, axis=0))
            logits = self._model.logits(contexts)
            for scores in to_host(xp, logits):
                odds = softmax(np, scores.astype(np.float64) / SAMPLE_TEMPERATURE)
                made.append(int(rng.choice(len(odds), p=odds)))
                window = np.append(window[1:], made[-1])
        return bytes(self._shard.prompt), bytes(made)

    def _describe_start(self) -> str:
        options, size = self._options, self._group.size
        num_dense = sum(param.size for param in self._model.dense.values())
        num_expert = sum(param.size for param in self._model.experts.values())
        return (
            f"ranks: {size}; layers: {options.layers}, each of {options.experts} experts "
            f"({self._num_local} a rank); top-{options.topk}; hidden {options.hidden}; "
            f"{num_dense:,} dense and {num_expert * size:,} expert parameters\n"
            f"text of {len(self._text):,} bytes, {options.batch} tokens a rank and step; "
            "shares of time include the wait for slower ranks"
        )

    def _say(self, describe: Callable[[], str]) -> None:
        if self._group.rank == 0 and not self._options.quiet:
            print(describe(), flush=True)


def get_learning_rate(peak: float, step: int, num_steps: int) -> float:
    """Return a step's learning rate: a short linear rise, then a cosine down to a tenth."""
    rise = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
    return peak * rise * (0.55 + 0.45 * math.cos(math.pi * step / num_steps))
