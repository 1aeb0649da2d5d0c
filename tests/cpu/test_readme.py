"""README: its examples run as they stand, and its tables say what the code says."""

from __future__ import annotations

import ast
import configparser
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from launch import ROOT, run_command

import epcomm
from epcomm import arrays, env, errors
from epcomm.cli import plan

README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
DOCUMENTS += ["docs/performance.md", "docs/scaling.md"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


#: Python blocks open with a comment that names the file; a command further on runs that file.
PROGRAMS = {re.match(r"# (\w+\.py): ", block)[1]: block for block in blocks("python")}
COMMANDS = [line for block in blocks("sh") for line in block.splitlines()]
#: Examples say themselves what they need on a machine with GPUs.
AUTO = {"EPCOMM_ENGINE": "auto"}
FRAMEWORKS = {"moe_torch.py": "torch", "moe_jax.py": "jax"}


def command_of(name: str) -> str:
    (command,) = (line for line in COMMANDS if name in shlex.split(line))
    return command


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of all tables under a heading, their header rows left out."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("|- ")]
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


class TestExamples:
    @pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "moe_cupy.py"])
    def test_runs(self, name: str, tmp_path: Path) -> None:
        if name in FRAMEWORKS:
            extra = FRAMEWORKS[name]
            pytest.importorskip(extra, reason=f"pip install 'epcomm[{extra}]'")
        command = command_of(name)
        if not shutil.which(shlex.split(command)[0], path=_path()):
            pytest.skip(f"no {shlex.split(command)[0]} here")
        (tmp_path / name).write_text(PROGRAMS[name])
        result = run_command(command, cwd=tmp_path, variables=AUTO)
        if name.startswith("moe_"):
            for rank in range(4):
                assert f"rank {rank} received " in result.stdout
        else:
            assert result.stdout.startswith("ok: ")
        assert "Warning" not in result.stderr

    @pytest.mark.gpu(1)
    def test_cupy_runs(self, tmp_path: Path) -> None:
        try:
            epcomm.Buffer(epcomm.SingleGroup(), engine="cuda").destroy()
        except epcomm.UnsupportedConfig as error:
            pytest.skip(f"{error}")
        (tmp_path / "moe_cupy.py").write_text(PROGRAMS["moe_cupy.py"])
        run_command(command_of("moe_cupy.py"), cwd=tmp_path, variables=AUTO)

    def test_cupy_differs_from_numpy_in_the_arrays_only(self) -> None:
        # The code that runs above is the code that is promised for CuPy.
        as_numpy = (
            PROGRAMS["moe_cupy.py"].replace("cupy as cp", "numpy as np").replace("cp.", "np.")
        )
        lines = [line.partition("  #")[0] for line in as_numpy.splitlines()]
        own = [line for line in lines if not line.startswith("#") and "Device" not in line]
        as_auto = PROGRAMS["moe_numpy.py"].replace(', engine="host"', "")
        numpy_lines = [line.partition("  #")[0] for line in as_auto.splitlines()]
        assert own == [line for line in numpy_lines if not line.startswith("#")]

    def test_length_is_one_that_people_read(self) -> None:
        assert len(PROGRAMS) == 6
        for name, program in PROGRAMS.items():
            assert len(program.splitlines()) <= 36, name
            ast.parse(program)


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


class TestCommands:
    def test_two_come_first(self) -> None:
        assert COMMANDS[:2] == ["scripts/quickstart", "scripts/test"]

    @pytest.mark.parametrize("command", COMMANDS)
    def test_program_exists(self, command: str) -> None:
        words = shlex.split(command)
        if words[0].startswith("scripts/"):
            assert os.access(ROOT / words[0], os.X_OK)
            subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
        else:
            assert words[0] in ("pip", "python", "mpiexec", "torchrun")
        for word in words:
            assert not word.startswith("scripts/") or (ROOT / word).is_file()
            assert not word.endswith(".py") or word in PROGRAMS

    @pytest.mark.parametrize("command", [line for line in COMMANDS if "epcomm demo" in line])
    def test_demo_takes_the_arguments(self, command: str) -> None:
        words = shlex.split(command)
        arguments = words[words.index("demo") + 1 :]
        shown = run_command(f"{sys.executable} -m epcomm demo --help", cwd=ROOT).stdout
        for option in (word for word in arguments if word.startswith("--")):
            assert f"{option} " in shown or f"{option}\n" in shown

    def test_named_extras_exist(self) -> None:
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        extras = set(config["options.extras_require"])
        named = {
            name for row in rows_of("Use it") for name in re.findall(r"^`(\w+)`|, `(\w+)`", row[0])
        }
        assert {a or b for a, b in named} == extras
        for document in DOCUMENTS:
            for names in re.findall(r"(?:epcomm|\.)\[([\w,]+)\]", (ROOT / document).read_text()):
                assert set(names.split(",")) <= extras


class TestTables:
    def test_environment_variables(self) -> None:
        found = [(name.strip("`"), *rest) for name, *rest in rows_of("Environment variables")]
        assert found == list(env.VARIABLES)

    def test_errors(self) -> None:
        (tree,) = blocks("text")
        drawn = inspect.getdoc(errors).partition("::\n\n")[2].partition("\n\nA message")[0]
        assert tree.strip() == inspect.cleandoc(drawn)

    def test_dtypes(self) -> None:
        (text,) = (row[1] for row in rows_of("What is supported") if row[0] == "rows of `dispatch`")
        short = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
        for dtype in arrays.DTYPES:
            name = dtype.name.removeprefix("float8_")
            if np.issubdtype(dtype, np.integer):
                assert "8- to 64-bit integers" in text
            else:
                assert short.get(name, name) in text

    def test_glossary_has_the_words_of_the_house(self) -> None:
        words = [row[0] for row in rows_of("Glossary")]
        needed = "token row rank node rail peer expert slab cell slot top-k epoch handle dispatch"
        needed += " combine layout staging staged board header round chunk"
        assert {*needed.split(), "local expert"} == set(words)
        assert len(words) == len(set(words))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    text = path.read_text()
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_plan_runs_as_it_stands(tmp_path: Path) -> None:
    (command,) = (line for line in COMMANDS if " plan " in line)
    assert "network" in run_command(command, cwd=tmp_path).stdout
    assert command.endswith(plan.EXAMPLE)


def test_calls_are_described_where_they_are_defined(tmp_path: Path) -> None:
    (command,) = re.findall(r"`(python -m pydoc .*?)`", README)
    shown = run_command(command, cwd=tmp_path).stdout
    for call in ("get_dispatch_layout", "dispatch", "combine", "low_latency_dispatch"):
        for name in list(inspect.signature(getattr(epcomm.Buffer, call)).parameters)[1:]:
            assert re.search(rf"^ .* {name}: \S", shown, re.MULTILINE), (call, name)


@pytest.mark.parametrize("name", re.findall(r"`(?:epcomm\.|Buffer\.|Config\.)[\w.]+`", README))
def test_named_things_exist(name: str) -> None:
    pkgutil.resolve_name("epcomm." + name.strip("`").removeprefix("epcomm."))


def test_performance_tables_are_those_of_the_results() -> None:
    run_command(f"{sys.executable} scripts/render_results --check", cwd=ROOT)
