"""Tells scripts/gpu_check what each test needs, and how it ended: a cut run is not lost."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from launch import ROOT

#: Lines of Open MPI that begin with a host's name.
_OF_A_HOST = re.compile(r"\[\S+:\d+\]")
#: Names of the files to add lines to, where scripts/gpu_check started pytest.
RESULTS, NEEDS = "GPU_CHECK_RESULTS", "GPU_CHECK_NEEDS"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tell how many GPUs each test needs."""
    if NEEDS not in os.environ:
        return
    with Path(os.environ[NEEDS]).open("a") as file:
        for item in items:
            mark = item.get_closest_marker("gpu")
            entry = {"name": item.nodeid, "num_gpus": mark.args[0] if mark else 0}
            file.write(json.dumps(entry) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add a test's outcome: that of its call, or of a setup or teardown that did not pass."""
    if RESULTS not in os.environ or (report.when != "call" and report.passed):
        return
    if report.skipped:
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        lines = [str(reason)]
    else:
        # Of no machine: the lines are kept with the project.
        text = report.longreprtext.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")
        lines = [line for line in text.splitlines() if not _OF_A_HOST.search(line)]
    entry = {
        "name": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 1),
        "lines": lines[-30:],
    }
    with Path(os.environ[RESULTS]).open("a") as file:
        file.write(json.dumps(entry) + "\n")
