"""The environment variables, each parsed once."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from launch import ROOT

from epcomm import InvalidArgument, env

DEFAULTS = env.Settings(engine="auto", timeout_s=100.0, ranks_per_node=None, shm_dir=None)


@pytest.fixture
def fresh() -> Iterator[None]:
    env.settings.cache_clear()
    yield
    env.settings.cache_clear()


def test_defaults() -> None:
    assert env.parse({}) == DEFAULTS
    assert env.Settings() == DEFAULTS


def test_empty_counts_as_unset() -> None:
    assert env.parse({name: "" for name, _, _ in env.VARIABLES}) == DEFAULTS


def test_other_variables_do_not_matter() -> None:
    assert env.parse({"PATH": "/bin", "EPCOMM_UNKNOWN": "7"}) == DEFAULTS


def test_all() -> None:
    found = env.parse(
        {
            "EPCOMM_ENGINE": "host",
            "EPCOMM_TIMEOUT_S": "2.5",
            "EPCOMM_RANKS_PER_NODE": "4",
            "EPCOMM_SHM_DIR": "/mnt/shm",
        }
    )
    assert found == env.Settings("host", 2.5, 4, "/mnt/shm")


@pytest.mark.parametrize("text", ["0.001", "1e3", "7", " 3 "])
def test_seconds(text: str) -> None:
    assert env.parse({"EPCOMM_TIMEOUT_S": text}).timeout_s == float(text)


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("EPCOMM_ENGINE", "gpu", "one of auto, host, cuda"),
        ("EPCOMM_ENGINE", "HOST", "one of auto, host, cuda"),
        *(
            ("EPCOMM_TIMEOUT_S", text, "a number of seconds above 0")
            for text in ("0", "-1", "soon", "inf", "nan", "1,5")
        ),
        *(
            ("EPCOMM_RANKS_PER_NODE", text, "a whole number of at least 1")
            for text in ("0", "-2", "2.0", "two", "²", " 2")
        ),
    ],
)
def test_wrong_values(name: str, text: str, rule: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        env.parse({name: text})
    assert str(caught.value) == f"{name} is {text!r}; it must be {rule}. Correct it or unset it."


def test_environment_is_read_once(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "3")
    assert env.settings().timeout_s == 3.0
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "4")
    assert env.settings().timeout_s == 3.0


def test_wrong_environment_is_not_kept(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "never")
    with pytest.raises(InvalidArgument):
        env.settings()
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "5")
    assert env.settings().timeout_s == 5.0


def test_every_variable_of_the_sources_is_listed_and_only_env_reads_them() -> None:
    listed = {name for name, _, _ in env.VARIABLES}
    named, readers = set(), set()
    for path in (ROOT / "epcomm").rglob("*.py"):
        text = path.read_text()
        named |= {name for name in re.findall(r"\bEPCOMM_[A-Z_]+\b", text) if name != "EPCOMM_"}
        if re.search(r"os\.(environ|getenv)\b(?!\s*`)", text) and "cli" not in path.parts:
            readers.add(path.name)
    assert named == listed
    assert readers <= {"env.py"}


def test_table_says_something_of_each() -> None:
    for name, default, meaning in env.VARIABLES:
        assert name.startswith("EPCOMM_")
        assert default
        assert meaning
    assert len({name for name, _, _ in env.VARIABLES}) == len(env.VARIABLES)


def test_device_pointers_of_mpi() -> None:
    def parsed(value: str) -> bool | None:
        return env.parse({"EPCOMM_MPI_DEVICE_POINTERS": value}).mpi_device_pointers

    assert [parsed(value) for value in ("", "0", "1")] == [None, False, True]
    with pytest.raises(InvalidArgument, match="must be 0 or 1"):
        parsed("yes")
