"""``python -m epcomm info``: what it shows, and the command for whatever is missing."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import ROOT, Result

import epcomm
from epcomm import engines, env
from epcomm.cli import info
from epcomm.topology import Topology

SECTIONS = ["epcomm", "ranks", "MPI", "GPUs", "engine", "frameworks", "memory"]
SECTIONS += ["environment"]


def run_epcomm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("EPCOMM_")}
    return subprocess.run(
        [sys.executable, "-m", "epcomm", *arguments],
        env=clean | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def parse(report: str) -> dict[str, dict[str, str]]:
    """Return each section's lines by name; fail on any line of another form."""
    sections: dict[str, dict[str, str]] = {}
    for line in report.splitlines():
        if not line.startswith(" "):
            lines = sections.setdefault(line, {})
            continue
        name, text = re.fullmatch(r"  (\S.*?)  ?\s*(\S.*)", line).groups()
        assert name not in lines
        lines[name] = text
    return sections


def extras() -> set[str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options.extras_require"])


def lines_of(describe: Callable[[], Iterator[tuple[str, str]]]) -> dict[str, str]:
    return dict(describe())


def test_alone_it_shows_every_section() -> None:
    done = run_epcomm("info", EPCOMM_TIMEOUT_S="12.5")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = parse(done.stdout)
    assert list(found) == SECTIONS
    assert found["epcomm"]["version"] == epcomm.__version__
    assert "mpiexec -n 4 python -m mpi4py -m epcomm info" in found["ranks"]["ranks"]
    assert list(found["environment"]) == [name for name, _, _ in env.VARIABLES]
    for name, default, meaning in env.VARIABLES:
        value = "12.5" if name == "EPCOMM_TIMEOUT_S" else f"not set ({default})"
        assert found["environment"][name] == f"{value}: {meaning}"


def test_under_mpi_one_rank_shows_all_ranks(mpiexec: Callable[..., Result]) -> None:
    result = mpiexec("show_info", 2, env={"EPCOMM_RANKS_PER_NODE": "1"})
    found = parse(result.stdout.partition("EPCOMM-OK")[0])
    assert list(found) == SECTIONS
    assert found["ranks"] == {"ranks": "2", "nodes": "2 (node of each rank: [0, 1])"}
    engine = "host, by EPCOMM_ENGINE, and MPI between 2 nodes"
    assert found["engine"] == {"engine": engine, "arrays": "in CPU memory"}
    assert found["environment"]["EPCOMM_RANKS_PER_NODE"].startswith("1: ")
    assert result.stdout.count("\nMPI\n") == 1
    assert found["MPI"]["mpi4py"] == metadata.version("mpi4py")
    assert "missing" not in "".join(found["MPI"].values())


@pytest.mark.parametrize("command", ["info", "demo"])
def test_a_wrong_variable_is_told_without_a_traceback(command: str) -> None:
    done = run_epcomm(command, EPCOMM_ENGINE="gpu")
    assert done.returncode == 2
    assert "EPCOMM_ENGINE is 'gpu'; it must be one of auto, host, cuda." in done.stderr
    assert "Traceback" not in done.stderr


def test_whatever_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(info.metadata, "version", not_found)
    monkeypatch.setattr(info, "_has_driver", lambda: False)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    monkeypatch.setattr(info.sys, "executable", "/nowhere/python")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    found = lines_of(info._describe_frameworks) | lines_of(info._describe_mpi)
    assert found["mpi4py"] == "missing: pip install mpi4py"
    assert found["mpiexec"] == "missing: pip install 'epcomm[mpich]'"
    assert "pip install 'epcomm[mpich]'" in found["library"]
    commands = [re.findall(r"pip install 'epcomm\[(\w+)\]'", text) for text in found.values()]
    named = {extra for command in commands for extra in command}
    assert named == {"torch", "jax", "demo", "mpich"}
    assert named <= extras()
    assert found["cupy"] == "not installed: of use with a GPU only, and there is none here"
    monkeypatch.setattr(info, "_has_driver", lambda: True)
    assert lines_of(info._describe_frameworks)["cupy"].endswith("pip install 'epcomm[cuda12]'")


def test_ml_dtypes_is_listed() -> None:
    version = metadata.version("ml_dtypes")
    assert lines_of(info._describe_frameworks)["ml_dtypes"].startswith(f"{version} (")


@pytest.mark.parametrize("command", ["info", "demo", "plan"])
def test_help_says_what_a_command_does(command: str) -> None:
    shown = run_epcomm(command, "--help", COLUMNS="80").stdout
    (what,) = re.search(rf"^ +{command} +(\w.*)$", run_epcomm("--help").stdout, re.M).groups()
    assert f"\n{what[0].upper()}{what[1:]}.\n" in shown


def test_help_of_plan_has_a_line_that_runs() -> None:
    shown = run_epcomm("plan", "--help", COLUMNS="60").stdout
    (line,) = re.findall(r"^example: python -m epcomm (.*)$", shown, re.M)
    assert run_epcomm(*line.split()).returncode == 0


@pytest.mark.parametrize("script", ["test", "quickstart"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_a_script_installs_nothing(script: str, option: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in (script, "_env.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    done = subprocess.run(
        [tmp_path / "scripts" / script, option], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"scripts/{script} --help" in done.stdout
    assert "==>" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["scripts"]


@pytest.mark.parametrize("script", ["bench_latency", "bench_throughput", "bench_rails"])
def test_help_of_a_benchmark_needs_no_cupy(script: str, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('not here')\n")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, "--help"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


class TestGpus:
    """On a machine with an NVIDIA driver, which tests cannot count on."""

    @pytest.fixture(autouse=True)
    def driver(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(info.shutil, "which", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: name)
        monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))

    def install_cupy(self, monkeypatch: pytest.MonkeyPatch, **runtime: object) -> None:
        runtime |= {"CUDARuntimeError": RuntimeError}
        cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(**runtime)))
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    def test_peers_of_every_gpu(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        properties = {"name": b"H200", "major": 9, "minor": 0, "totalGlobalMem": 141 << 30}
        self.install_cupy(
            monkeypatch,
            getDeviceCount=lambda: 3,
            driverGetVersion=lambda: 12080,
            getDeviceProperties=lambda index: properties,
            deviceCanAccessPeer=lambda index, peer: 2 not in (index, peer),
        )
        (tmp_path / "one.cubin").touch()
        found = lines_of(info._describe_gpus)
        assert found["driver"] == "CUDA 12.8"
        assert found["GPU 0"] == "H200, sm_90, 141 GiB, peer access to [1]"
        assert found["GPU 2"].endswith("peer access to none")
        assert found["kernel cache"] == f"{tmp_path} (CuPy's; 1 files)"

    def test_driver_that_does_not_work(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail() -> int:
            raise RuntimeError("cudaErrorNoDevice")

        self.install_cupy(monkeypatch, getDeviceCount=fail)
        assert "cudaErrorNoDevice" in lines_of(info._describe_gpus)["driver"]

    def test_no_cupy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(info.importlib.util, "find_spec", lambda name: None)
        text = lines_of(info._describe_gpus)["CuPy"]
        assert set(re.findall(r"epcomm\[(\w+)\]", text)) == {"cuda12", "cuda13"} <= extras()


@pytest.mark.parametrize(
    ("wanted", "num_gpus", "num_nodes", "engine", "arrays"),
    [
        ("auto", 0, 1, "auto: host", "in CPU memory"),
        ("auto", 0, 2, "auto: host", "in CPU memory"),
        (
            "auto",
            2,
            1,
            "auto: cuda; CPU arrays need engine='host'",
            "on GPUs, which must have peer access",
        ),
        ("auto", 2, 2, "auto: cuda, and MPI between 2 nodes; CPU arrays need", "on GPUs, which"),
        ("host", 2, 1, "host, by EPCOMM_ENGINE", "in CPU memory; on GPU i, staged through"),
        (
            "cuda",
            2,
            1,
            "cuda, by EPCOMM_ENGINE; CPU arrays need",
            "on GPUs, which must have peer access",
        ),
        ("cuda", 0, 1, "engine='cuda' found no GPU", None),
    ],
)
def test_engine_of_a_buffer_that_names_none(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    num_gpus: int,
    num_nodes: int,
    engine: str,
    arrays: str | None,
) -> None:
    monkeypatch.setattr(env, "settings", lambda: env.Settings(engine=wanted))
    monkeypatch.setattr(engines, "find_num_gpus", lambda: num_gpus)
    monkeypatch.setattr(info, "find_num_gpus", lambda: num_gpus)
    monkeypatch.setattr(info, "takes_device_pointers", lambda: False)
    nodes = Topology(0, tuple(range(num_nodes)))
    found = lines_of(lambda: info._describe_engine(nodes))
    assert found["engine"].startswith(engine)
    assert found.get("arrays") == arrays or found["arrays"].startswith(arrays)
    has_gpus = arrays is not None and arrays.startswith("on GPUs")
    assert ("decoding" in found) == (has_gpus and num_nodes == 1)
    assert ("between nodes" in found) == (has_gpus and num_nodes == 2)


@pytest.mark.parametrize(
    ("takes", "wanted", "said"),
    [
        (True, None, "rows go from GPU to MPI .* EPCOMM_MPI_DEVICE_POINTERS=0"),
        (False, None, "rows cross .* as this MPI takes no .*EPCOMM_MPI_DEVICE_POINTERS=1"),
        (False, False, "rows cross .* by EPCOMM_MPI_DEVICE_POINTERS .*=1"),
    ],
)
def test_way_of_rows_between_nodes(
    monkeypatch: pytest.MonkeyPatch, takes: bool, wanted: bool | None, said: str
) -> None:
    monkeypatch.setattr(info, "takes_device_pointers", lambda: takes)
    monkeypatch.setattr(env, "settings", lambda: env.Settings(mpi_device_pointers=wanted))
    assert re.match(said, info._describe_rails())


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    if list(Path("/proc/driver/nvidia").glob("version")):
        pytest.skip("this machine has an NVIDIA driver")
    assert "host engine" in lines_of(info._describe_gpus)["driver"]
