"""Whether MPI takes pointers to a GPU's memory: who is asked, and in which order."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from epcomm import env, mpi_memory


class FakeInfo:
    """Of MPI.COMM_WORLD."""

    def __init__(self, kinds: str | None) -> None:
        self._kinds, self.is_freed = kinds, False

    def Get(self, key: str) -> str | None:  # noqa: N802
        assert key == "mpi_memory_alloc_kinds"
        return self._kinds

    def Free(self) -> None:  # noqa: N802
        self.is_freed = True


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Return what asks an MPI library of given answers, with a given setting."""

    def ask(wanted: bool | None, kinds: str | None, **queries: int) -> bool:
        info = FakeInfo(kinds)
        world = SimpleNamespace(Get_info=lambda: info)
        fake = SimpleNamespace(COMM_WORLD=world, __file__="linked")
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=fake))

        def load(name: str | None) -> Any:
            answer = queries.get(name or "loaded")
            return SimpleNamespace(
                **({} if answer is None else {"MPIX_Query_cuda_support": lambda: answer})
            )

        monkeypatch.setattr(mpi_memory, "ctypes", SimpleNamespace(CDLL=load))
        monkeypatch.setattr(env, "settings", lambda: env.Settings(mpi_device_pointers=wanted))
        answer = mpi_memory.takes_device_pointers.__wrapped__()
        assert info.is_freed == (wanted is None)
        return answer

    return ask


@pytest.mark.parametrize("kinds", ["cuda", "system,mpi,cuda:device", "cuda:host:device,system"])
def test_memory_kinds_say_so(takes: Callable[..., bool], kinds: str) -> None:
    assert takes(None, kinds)
    assert takes(None, kinds, linked=0)


@pytest.mark.parametrize("kinds", [None, "", "system,mpi", "cudalike:device", "rocm:cuda"])
def test_no_memory_kind_says_so(takes: Callable[..., bool], kinds: str | None) -> None:
    assert not takes(None, kinds)


@pytest.mark.parametrize("library", ["linked", "loaded"])
def test_the_library_is_asked(takes: Callable[..., bool], library: str) -> None:
    assert takes(None, "system", **{library: 1})
    assert not takes(None, "system", **{library: 0})


def test_the_environment_comes_first(takes: Callable[..., bool]) -> None:
    assert not takes(False, "cuda", linked=1)
    assert takes(True, None, linked=0)
