"""scripts/gpu_check --merge: what counts of results that were made in parts."""

from __future__ import annotations

import importlib.util
import json
import sys
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
