"""scripts/gpu_check: how tests are spread over GPUs, and what counts of results made in parts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from launch import ROOT

A, B = "tests/gpu/test_x.py::a", "tests/gpu/test_x.py::b"
SOAK = {"rounds": 9, "num_ranks": 2, "seconds": 1.0, "is_green": True, "last_lines": []}
CUT_OFF, CRASHED = "pytest was cut off", "pytest exited with 3"

Json = dict[str, Any]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; this checkout has the tests A and B."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu_check"))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "collected", lambda: [A, B])
    monkeypatch.setattr(module, "source_hash", lambda: "this one")
    return module


@pytest.fixture
def merge(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[int, Json]]:
    """Return what merges parts: gives the exit status and the result."""

    def run(*parts: Json) -> tuple[int, Json]:
        paths = []
        for i, part in enumerate(parts):
            paths.append(tmp_path / f"part {i}")
            paths[-1].write_text(json.dumps(part))
        out = tmp_path / "merged"
        argv = ["gpu_check", "--out", str(out), "--merge", *map(str, paths)]
        monkeypatch.setattr(sys, "argv", argv)
        return script.main(), json.loads(out.read_text())

    return run


def part(outcomes: dict[str, str], *failures: str, soak: Json | None = None) -> Json:
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    return {
        "source_hash": "this one",
        "hardware": {"gpus": []},
        "tests": {name: {"outcome": end, "seconds": 1.0} for name, end in outcomes.items()},
        "failures": [{"name": name, "last_lines": []} for name in (*failed, *failures)],
        "soak": soak,
    }


def test_parts_make_a_whole(merge: Any) -> None:
    status, merged = merge(part({A: "passed"}), part({B: "passed"}, soak=SOAK))
    assert (status, merged["is_green"], merged["missing"]) == (0, True, [])
    assert sorted(merged["tests"]) == [A, B]


def test_a_part_that_was_cut_off_counts_for_what_it_ran(merge: Any) -> None:
    cut = part({A: "passed"}, CUT_OFF)
    status, merged = merge(cut, part({B: "passed"}, soak=SOAK))
    assert (status, merged["failures"]) == (0, [])
    status, merged = merge(cut, part({}, soak=SOAK))
    assert (status, merged["missing"]) == (1, [B])


@pytest.mark.parametrize(("outcomes", "soak", "missing"), [({A}, SOAK, B), ({A, B}, None, "soak")])
def test_nothing_is_green_with_a_part_missing(
    merge: Any, outcomes: set[str], soak: Json | None, missing: str
) -> None:
    status, merged = merge(part(dict.fromkeys(outcomes, "passed"), soak=soak))
    assert (status, merged["is_green"], merged["missing"]) == (1, False, [missing])


def test_later_parts_count(merge: Any) -> None:
    failed, passed = part({A: "failed", B: "passed"}, soak=SOAK), part({A: "passed"})
    assert merge(failed, passed)[0] == 0
    status, merged = merge(passed, failed)
    assert (status, [each["name"] for each in merged["failures"]]) == (1, [A])


def test_what_ended_pytest_is_kept_and_tests_that_are_gone_are_not(merge: Any) -> None:
    gone = "tests/gpu/test_x.py::gone"
    whole = part({A: "passed", B: "passed"}, soak=SOAK)
    status, merged = merge(part({gone: "failed"}), whole)
    assert (status, sorted(merged["tests"])) == (0, [A, B])
    status, merged = merge(part({}, CRASHED), whole)
    assert (status, [each["name"] for each in merged["failures"]]) == (1, [CRASHED])


def test_parts_of_other_sources_are_refused(merge: Any) -> None:
    with pytest.raises(SystemExit, match="is of sources another, this checkout of this one"):
        merge(part({A: "passed"}), part({B: "passed"}) | {"source_hash": "another"})


def test_tests_that_need_few_gpus_run_side_by_side_and_the_longest_first(script: Any) -> None:
    needed = {"a": 1, "b": 1, "c": 1, "d": 2, "e": 2, "f": 4, "names": 0}
    plan = script.plan(needed, {"a": 9.0, "b": 2.0, "c": 5.0}, ["0", "1", "2", "3"])
    ones, twos, fours = plan
    assert ones == [(["0"], ["a"]), (["1"], ["c"]), (["2"], ["b"]), (["3"], ["names"])]
    assert twos == [(["0", "1"], ["d"]), (["2", "3"], ["e"])]
    assert fours == [(["0", "1", "2", "3"], ["f"])]


@pytest.mark.parametrize("gpus", [[], ["7"]])
def test_tests_that_need_more_gpus_than_there_are_run_and_skip(
    script: Any, gpus: list[str]
) -> None:
    assert script.plan({"a": 4, "b": 1}, {}, gpus) == [[(gpus, ["a", "b"])]]


def test_a_process_is_cut_off_at_the_deadline(
    script: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "import time; print('it began', flush=True); time.sleep(60)"
    process = script.ShownProcess([sys.executable, "-c", code], dict(os.environ))
    ending = process.wait(time.monotonic() + 2.0)
    assert ending["name"] == CUT_OFF
    assert "it began" in ending["last_lines"]
    assert "it began" in capfd.readouterr().out


def test_how_a_process_ended(script: Any) -> None:
    endings = [
        script.ShownProcess([sys.executable, "-c", f"exit({code})"], dict(os.environ)).wait(
            time.monotonic() + 30.0
        )
        for code in (0, 1, 3)
    ]
    assert [ending and ending["name"] for ending in endings] == [None, None, CRASHED]
