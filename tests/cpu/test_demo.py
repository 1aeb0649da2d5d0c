"""The demo: its model's gradients, its arguments, its report, and a short run that is checked."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, Result

from epcomm import cli, env
from epcomm.cli import blas, demo, exchange, plot, report, text
from epcomm.cli.moe_model import (
    Adam,
    ModelShape,
    MoeModel,
    experts_backward,
    experts_forward,
    init_params,
)
from epcomm.group import Group, SingleGroup, run_threads

TINY = ModelShape(
    context=3, embed=4, hidden=8, expert_hidden=6, num_experts=5, topk=2, num_layers=2
)
NEEDS_DEMO_EXTRA = "pip install 'epcomm[demo]'"
SMALL = "--steps=3 --batch=20 --hidden=16 --expert-hidden=8 --experts=12 --context=4"


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([*map(str, arguments)])


def make_model(dtype: type = np.float64) -> MoeModel:
    dense, experts = init_params(np, TINY, 1, dtype)
    return MoeModel(np, TINY, dense, experts, exchange.LocalExchange(np, TINY.num_experts))


def make_batch(num_tokens: int = 11) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    # Few different bytes, so that most embeddings are used several times.
    contexts = rng.integers(60, 66, (num_tokens, TINY.context))
    return contexts, rng.integers(60, 66, num_tokens)


class TestModel:
    @pytest.mark.parametrize("name", [*make_model().dense, *make_model().experts])
    def test_gradient_is_the_loss_s_slope(self, name: str) -> None:
        model, batch = make_model(), make_batch()
        model.balance += np.random.default_rng(3).normal(size=model.balance.shape) / 4
        num_tokens = len(batch[1])
        result = model.run(*batch, num_tokens)
        grad = (result.dense_grads | result.expert_grads)[name]
        param = (model.dense | model.experts)[name]
        assert grad.shape == param.shape
        assert grad.dtype == param.dtype

        rng, step = np.random.default_rng(4), 1e-5
        # The elements with the steepest slopes and some others.
        places = np.argsort(-np.abs(grad), axis=None)[:8].tolist()
        places += rng.integers(param.size, size=8).tolist()
        for place in places:
            at = np.unravel_index(place, param.shape)
            kept, losses = param[at], []
            for value in (kept + step, kept - step):
                param[at] = value
                losses.append(model.loss_sum(*batch) / num_tokens)
            param[at] = kept
            slope = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose(grad[at], slope, rtol=1e-5, atol=1e-9)

    def test_loss_of_both_passes_is_the_same(self) -> None:
        model, batch = make_model(), make_batch()
        assert model.run(*batch, 11).loss_sum == model.loss_sum(*batch)

    def test_imposed_choices_are_taken_and_their_slack_told(self) -> None:
        model, batch = make_model(), make_batch()
        own = model.run(*batch, 11)
        assert own.routing_slack == 0.0
        again = model.run(*batch, 11, own.choices)
        assert again.routing_slack == 0.0
        assert again.loss_sum == own.loss_sum
        worse = model.run(*batch, 11, [(idx + 1) % TINY.num_experts for idx in own.choices])
        assert worse.routing_slack > 0.1
        assert worse.loss_sum != own.loss_sum

    @pytest.mark.parametrize("num_rows", [0, 1, 9])
    def test_experts_match_a_loop_over_rows(self, num_rows: int) -> None:
        rng = np.random.default_rng(5)
        up, down = rng.normal(size=(3, 8, 6)), rng.normal(size=(3, 6, 8))
        rows, weights = rng.normal(size=(num_rows, 8)), rng.normal(size=(num_rows, 4))
        expert_idx = rng.integers(-1, 3, (num_rows, 4))
        counts = [int((expert_idx == expert).sum()) for expert in range(3)]
        routed = exchange.Routed(rows, expert_idx, weights, counts)
        got, tape = experts_forward(np, routed, up, down)
        want = np.zeros((num_rows, 8))
        for row, choice in np.argwhere(expert_idx >= 0):
            expert = expert_idx[row, choice]
            active = np.maximum(rows[row] @ up[expert], 0)
            want[row] += weights[row, choice] * (active**2 @ down[expert])
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
        grad_rows, grad_weights, grad_up, _ = experts_backward(np, got, tape, 4, up, down)
        assert grad_rows.shape == rows.shape
        assert (grad_weights[expert_idx < 0] == 0).all()
        assert np.isfinite(grad_up).all()

    def test_no_tokens_give_no_logits(self) -> None:
        assert make_model().logits(np.zeros((0, TINY.context), np.int64)).shape == (0, 256)

    def test_float32_stays_float32(self) -> None:
        model = make_model(np.float32)
        result = model.run(*make_batch(), 11)
        for grad in (result.dense_grads | result.expert_grads).values():
            assert grad.dtype == np.float32

    def test_training_learns_and_balances(self) -> None:
        model, batch = make_model(np.float32), make_batch(64)
        optimizers = Adam(np, model.dense), Adam(np, model.experts)
        losses = []
        for _ in range(60):
            result = model.run(*batch, 64)
            optimizers[0].step(result.dense_grads, 0.01)
            optimizers[1].step(result.expert_grads, 0.01)
            model.balance_load(result.num_pairs_per_expert)
            losses.append(result.loss_sum / 64)
        assert losses[0] > 5
        assert losses[-1] < 2
        busiest = np.argmax(result.num_pairs_per_expert[0])
        before = model.balance[0, busiest]
        model.balance_load(result.num_pairs_per_expert)
        assert model.balance[0, busiest] < before


class TestText:
    def test_default_is_python_and_the_same_twice(self) -> None:
        found = text.read_text(None, 1 << 20)
        assert b"import" in found
        assert len(found) <= text.MAX_DEFAULT_BYTES
        assert found == text.read_text(None, 1)

    def test_shards_do_not_overlap(self) -> None:
        # Every byte of this text tells its place.
        places = np.arange(16 * 3 * 20)
        seen = []
        for rank in range(3):
            shard = text.Shard(np, places, 4, rank=rank, num_ranks=3, seed=0)
            for contexts, targets in (shard.draw(5000), shard.draw_held_out(1000)):
                assert contexts.shape == (len(targets), 4)
                assert contexts.dtype == targets.dtype == np.int64
                assert (contexts == targets[:, None] - [4, 3, 2, 1]).all()
                seen.append(set(contexts.flat) | set(targets.flat))
        assert sum(map(len, seen)) == len(set.union(*seen)) == len(places)

    def test_draws_repeat_with_the_seed_only(self) -> None:
        def draw(rank: int, seed: int) -> list[int]:
            shard = text.Shard(np, np.arange(9999), 4, rank=rank, num_ranks=2, seed=seed)
            targets = shard.draw(50)[1]
            return (targets - targets.min()).tolist()

        assert draw(0, 1) == draw(0, 1)
        assert draw(0, 1) != draw(1, 1)
        assert draw(0, 1) != draw(0, 2)

    def test_shortest_text_leaves_every_rank_a_held_out_token(self) -> None:
        found = np.zeros(text.get_min_bytes(3, 4), np.uint8)
        for rank in range(3):
            shard = text.Shard(np, found, 4, rank=rank, num_ranks=3, seed=0)
            assert len(shard.prompt) == 4
            assert len(shard.draw_held_out(2)[1]) == 2


def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)


class TestArguments:
    def test_no_threads_at_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            cli.main(["demo", "--threads", "0"])
        assert "--threads is 0; it must be 1 or more" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ("--steps 0", "--steps is 0; it must be 1 or more"),
            ("--batch -5", "--batch is -5; it must be 1 or more"),
            ("--expert-hidden 0", "--expert-hidden is 0; it must be 1 or more"),
            ("--seed -1", "--seed is -1; it must be 0 or more"),
            ("--learning-rate 0", "--learning-rate is 0.0; it must be above 0"),
            ("--learning-rate nan", "--learning-rate is nan; it must be above 0"),
            ("--hidden 30", "Try --hidden 32."),
            ("--topk 17", "--topk is 17 and --experts 16; a token cannot go to more"),
            ("--text no/such/file", "--text no/such/file: No such file or directory"),
            ("--text .", "--text .: Is a directory"),
        ],
    )
    def test_error_says_what_and_why(
        self, arguments: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert demo.run(parse(*arguments.split()), SingleGroup()) == demo.EXIT_BAD_ARGUMENTS
        shown = capsys.readouterr()
        assert said in shown.err
        assert shown.err.startswith("epcomm demo: ")
        assert shown.out == ""

    def test_every_rank_fails_and_one_prints(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = parse("--experts", 16)
        assert run_threads(lambda group: demo.run(args, group), 3) == [2, 2, 2]
        shown = capsys.readouterr().err
        assert shown.count("--experts is 16 on 3 ranks") == 1
        assert "Try --experts 18." in shown

    def test_short_text(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "short.txt"
        path.write_bytes(b"x" * 100)
        args = parse("--text", path)
        assert run_threads(lambda group: demo.run(args, group), 2) == [2, 2]
        assert f"got 100 bytes of text, but these ranks and this --context need {16 * 2 * 18}" in (
            capsys.readouterr().err
        )

    def test_engine_without_its_gpu(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("epcomm.buffer.find_num_gpus", lambda: 0)
        monkeypatch.setattr(env, "settings", lambda: env.Settings(engine="cuda"))
        assert demo.run(parse(), SingleGroup()) == demo.EXIT_BAD_ARGUMENTS
        assert "epcomm demo: engine='cuda' found no GPU" in capsys.readouterr().err

    def test_plot_without_matplotlib(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        no_matplotlib(monkeypatch)
        assert demo.run(parse("--plot", "x.png"), SingleGroup()) == demo.EXIT_BAD_ARGUMENTS
        assert "pip install 'epcomm[demo]'" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("path", "said"),
        [("x.what", "got the ending '.what'"), ("no/folder/x.png", "no/folder does not exist")],
    )
    def test_plot_that_cannot_be_written(
        self, path: str, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib", reason=NEEDS_DEMO_EXTRA)
        assert demo.run(parse("--plot", path), SingleGroup()) == demo.EXIT_BAD_ARGUMENTS
        assert said in capsys.readouterr().err

    def test_learning_rate_rises_then_falls(self) -> None:
        rates = [demo.get_learning_rate(1.0, step, 100) for step in range(100)]
        assert rates[0] == pytest.approx(0.05)
        assert max(rates) == pytest.approx(rates[demo.NUM_WARMUP_STEPS - 1])
        assert rates[-1] == pytest.approx(0.1, abs=0.01)


def make_report() -> report.Report:
    return report.Report(
        losses=[5.0, 4.0, 3.0],
        num_rows=np.array([[1000, 2000], [3000, 4000]]),
        row_bytes=500,
        expert_load=np.array([[1, 1, 2, 0], [4, 0, 0, 0]]),
    )


class TestReport:
    def test_traffic(self) -> None:
        shown = report.describe_traffic(make_report())
        # Combine doubles the 2.5 MB that leave their rank.
        assert "5.0 MB crossed" in shown
        assert "2,000 = 1.0 MB" in shown
        assert len(shown.splitlines()) == 4

    def test_load(self) -> None:
        lines = report.describe_load(make_report()).splitlines()
        assert lines[-1].split() == ["3", "1", "0.0", "0.0"]
        assert lines[2].split()[:4] == ["0", "0", "25.0", "100.0"]

    def test_sample_hides_control_bytes(self) -> None:
        shown = report.describe_sample(b"a\x1b[2J", b"\r\xffb\nc")
        assert shown.splitlines()[1:] == ["  | a·[2J··b", "  | c"]

    @pytest.mark.parametrize("name", ["picture.png", "picture.svg"])
    def test_picture(self, tmp_path: Path, name: str) -> None:
        pytest.importorskip("matplotlib", reason=NEEDS_DEMO_EXTRA)
        plot.check_plot(tmp_path / name)
        plot.write_plot(tmp_path / name, make_report())
        start = (tmp_path / name).read_bytes()[:100]
        assert b"PNG" in start or b"<?xml" in start


def run_demo(*arguments: object, num_ranks: int) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("EPCOMM_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "epcomm", "demo", "--threads", str(num_ranks)]
    return subprocess.run(
        [*command, *SMALL.split(), *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )


class TestRun:
    @pytest.mark.parametrize(
        ("num_ranks", "arguments"),
        [(1, ()), (3, ("--topk", 12, "--layers", 1)), (4, ()), (4, ("--batch", 1, "--topk", 1))],
    )
    def test_check_passes(self, num_ranks: int, arguments: tuple[object, ...]) -> None:
        done = run_demo("--check", *arguments, num_ranks=num_ranks)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("check passed: 3 steps") == 1
        assert done.stdout.count("trained 3 steps") == 1
        assert f"rank {num_ranks - 1}" in done.stdout
        assert f"rank {num_ranks} " not in done.stdout
        assert done.stderr == ""

    def test_quiet_run_with_a_file_and_a_picture(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason=NEEDS_DEMO_EXTRA)
        path = tmp_path / "text.txt"
        path.write_bytes(b"one two three four five six seven eight. " * 50)
        arguments = ("--quiet", "--text", path, "--steps", 80, "--plot", tmp_path / "picture.png")
        done = run_demo(*arguments, num_ranks=2)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "picture.png").stat().st_size > 1000
        lines = done.stdout.splitlines()
        assert len(lines) == 2
        first, last = lines[1].partition("loss ")[2].split(" nats")[0].split(" -> ")
        assert float(first) > 5
        assert float(last) < 3

    @pytest.mark.parametrize("move", ["combine", "dispatch_backward", "combine_backward"])
    def test_check_finds_a_wrong_row(
        self, move: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        args = parse("--check", *SMALL.split())

        def make_exchange(xp: object, group: Group, *sizes: int) -> exchange.EpExchange:
            made = exchange.EpExchange(xp, group, *sizes)
            real = getattr(made, move)

            def damaged(rows: np.ndarray, *others: object) -> object:
                return real(rows[np.maximum(np.arange(len(rows)) - 1, 0)], *others)

            if group.rank == 1:
                setattr(made, move, damaged)
            return made

        monkeypatch.setattr(demo, "EpExchange", make_exchange)
        assert run_threads(lambda group: demo.run(args, group), 3) == [demo.EXIT_CHECK_FAILED] * 3
        shown = capsys.readouterr()
        assert shown.err.count("check failed: ") == 1
        assert "step 1" in shown.err
        assert "check passed" not in shown.out


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_rank_passes_the_check_under_mpi(
    mpiexec: Callable[..., Result], num_ranks: int
) -> None:
    result = mpiexec("demo_check", num_ranks, *SMALL.split())
    assert result.stdout.count("check passed: 3 steps") == 1
    assert result.stderr == ""


class TestProcessors:
    """Ranks of a host share its processors."""

    def test_matrix_products_take_the_rank_s_part(self) -> None:
        pytest.importorskip("threadpoolctl", reason=NEEDS_DEMO_EXTRA)
        program = (
            "import os, numpy, threadpoolctl\n"
            "from epcomm.cli import blas\n"
            "from epcomm.group import run_threads\n"
            "num_ranks = len(os.sched_getaffinity(0))\n"
            "assert not any(run_threads(blas.share_processors, num_ranks))\n"
            "for library in threadpoolctl.threadpool_info():\n"
            "    assert library['user_api'] != 'blas' or library['num_threads'] == 1, library\n"
        )
        env = {name: value for name, value in os.environ.items() if "_NUM_THREADS" not in name}
        env["PYTHONPATH"] = str(ROOT)
        subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=60)

    def test_without_threadpoolctl_the_first_rank_says_what_to_install(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: None)
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        args = parse(*SMALL.split())
        assert run_threads(lambda group: demo.run(args, group), 2) == [demo.EXIT_OK] * 2
        assert capsys.readouterr().out.count("pip install 'epcomm[demo]'") == 1
        assert blas.share_processors(SingleGroup()) == ""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert run_threads(blas.share_processors, 2) == ["", ""]
