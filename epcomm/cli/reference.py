"""What `demo --check` compares with: the same model on one rank, without any call of epcomm."""

from __future__ import annotations

from typing import Any

from epcomm.cli.exchange import Array, LocalExchange, to_host
from epcomm.cli.moe_model import Adam, MoeModel, Params, Pass
from epcomm.group import Group

NUM_CHECKED_STEPS = 5
# Float32 sums in another order are off by about 1e-6; a wrong row, weight or expert is far above.
MAX_ERROR = 3e-5


class Reference:
    """An unsharded twin on rank 0 that trains beside the ranks for the first steps.

    It starts from the ranks' own initial parameters, takes all ranks' tokens as one batch, and
    steps by its own gradients, so that an error which only a later step shows is seen too.

    NOTE: where two experts' scores are equal to rounding, twin and ranks may choose differently
    and both be right. So the twin takes the ranks' choices, once their scores hold by its own.

    Collective, as are its calls.

    Args:
        xp: array namespace.
        model: this rank's model, before the first step.
        group: the ranks.
    """

    def __init__(self, xp: Any, model: MoeModel, group: Group) -> None:
        self._xp = xp
        self._group = group
        self._errors: dict[str, tuple[float, str]] = {}
        self._num_steps = 0
        self._twin: MoeModel | None = None
        experts = self._gather_experts(model.experts)
        if group.rank == 0:
            # NOTE: a copy, because ranks that are threads share what they gather.
            dense = {name: xp.array(param) for name, param in model.dense.items()}
            exchange = LocalExchange(xp, model.shape.num_experts)
            self._twin = MoeModel(xp, model.shape, dense, experts, exchange)
            self._optimizers = Adam(xp, dense), Adam(xp, experts)

    def step(
        self,
        batch: tuple[Array, Array],
        own: Pass,
        loss: float,
        dense_grads: Params,
        learning_rate: float,
    ) -> str | None:
        """Repeat one step of all ranks and compare.

        Args:
            batch: this rank's contexts and targets.
            own: this rank's pass over them.
            loss: the mean over all ranks' tokens.
            dense_grads: the sum over ranks.
            learning_rate: of this step.

        Returns:
            What is wrong, the same on every rank, or None.
        """
        arrays = [to_host(self._xp, array) for array in (*batch, *own.choices)]
        shards = self._group.allgather(arrays, phase="demo: tokens to check")
        expert_grads = self._gather_experts(own.expert_grads)
        problem = None
        if self._twin is not None:
            contexts, targets, *choices = (
                self._xp.concatenate([self._xp.asarray(array) for array in same])
                for same in zip(*shards, strict=True)
            )
            twin = self._twin.run(contexts, targets, len(targets), choices)
            self._record("routing score", "a chosen expert", twin.routing_slack)
            twin_loss = twin.loss_sum / len(targets)
            self._record("loss", "the mean", abs(loss - twin_loss) / twin_loss)
            self._compare_dense(dense_grads, twin.dense_grads)
            self._compare_experts(expert_grads, twin.expert_grads)
            self._advance(twin, learning_rate)
            problem = self._find_problem()
        self._num_steps += 1
        problems: list[str | None] = self._group.allgather(problem, phase="demo: verdict")
        return problems[0]

    def describe(self) -> str:
        """Return what was compared and the worst errors seen. Rank 0 only."""
        worst = ", ".join(f"{what} {error:.1e}" for what, (error, _) in self._errors.items())
        return (
            f"{self._num_steps} steps agree with the unsharded model; "
            f"worst relative error: {worst} (limit {MAX_ERROR:.0e})"
        )

    def _gather_experts(self, params: Params) -> Params:
        """Return all ranks' experts, in order; an empty dictionary but on rank 0."""
        own = {name: to_host(self._xp, param) for name, param in params.items()}
        parts = self._group.allgather(own, phase="demo: experts to check")
        if self._group.rank != 0:
            return {}
        return {
            name: self._xp.concatenate([self._xp.asarray(part[name]) for part in parts])
            for name in params
        }

    def _advance(self, twin: Pass, learning_rate: float) -> None:
        assert self._twin is not None
        self._optimizers[0].step(twin.dense_grads, learning_rate)
        self._optimizers[1].step(twin.expert_grads, learning_rate)
        self._twin.balance_load(twin.num_pairs_per_expert)

    def _compare_dense(self, got: Params, want: Params) -> None:
        for name, grad in want.items():
            self._record("dense gradient", name, self._error_of(got[name], grad))

    def _compare_experts(self, got: Params, want: Params) -> None:
        # One by one, so that a rarely chosen expert is not lost beside the busy ones.
        for name, grads in want.items():
            for expert, grad in enumerate(grads):
                error = self._error_of(got[name][expert], grad)
                self._record("expert gradient", f"{name}, expert {expert}", error)

    def _error_of(self, got: Array, want: Array) -> float:
        """Return |got - want| / |want|, and infinity for anything but zeros where want is zero."""
        norm = self._xp.linalg.norm
        error, size = float(norm(got - want)), float(norm(want))
        return error / size if size else (0.0 if error == 0.0 else float("inf"))

    def _record(self, what: str, where: str, error: float) -> None:
        worst = self._errors.get(what)
        # "not <=" instead of ">": a NaN must not pass.
        if worst is None or not error <= worst[0]:
            self._errors[what] = error, f"step {self._num_steps + 1}: {where}"

    def _find_problem(self) -> str | None:
        for what, (error, where) in self._errors.items():
            if not error <= MAX_ERROR:
                return (
                    f"{what}, {where}: relative error {error:.1e}, limit {MAX_ERROR:.0e}. At step "
                    "1 this is never rounding; later a high --learning-rate makes rounding grow."
                )
        return None
