"""What the stream and graph programs need of CuPy and of torch: streams, graphs, small kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


class CupyGpu:
    """CuPy's streams and graphs."""

    frame_name = "cupy"

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy

    def new_stream(self) -> Any:
        return self._cupy.cuda.Stream(non_blocking=True)

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        """Make a stream the current one."""
        with stream:
            yield

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def copy(self, to: Any, source: Any) -> None:
        """Overwrite an array in place, on the current stream."""
        raw = np.dtype(f"u{to.dtype.itemsize}")  # CuPy need not know the dtype
        self._cupy.copyto(to.view(raw), source.view(raw))

    def zeros(self, num: int) -> Any:
        """Return ``[num] int64``."""
        return self._cupy.zeros(num, np.int64)

    def add_differing(self, counter: Any, got: Any, want: Any) -> None:
        """Add the number of f32 or i64 elements whose bits differ, on the current stream."""
        raw = np.dtype(f"i{got.dtype.itemsize}")
        counter += (got.view(raw) != want.view(raw)).sum()

    def scratch(self, like: Any) -> Any:
        """Return new memory, filled on the current stream: what was freed too early shows."""
        return self._cupy.full(like.shape, np.nan, np.float32)

    def capture(self, stream: Any, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return the replay of a body, on a stream that is current, and what the body returned."""
        stream.begin_capture()
        try:
            results = body()
        finally:
            graph = stream.end_capture()
        return lambda: graph.launch(stream), results


class TorchGpu:
    """torch's streams and graphs."""

    frame_name = "torch-cuda"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def new_stream(self) -> Any:
        return self._torch.cuda.Stream()

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        with self._torch.cuda.stream(stream):
            yield

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()

    def copy(self, to: Any, source: Any) -> None:
        to.copy_(source)

    def zeros(self, num: int) -> Any:
        return self._torch.zeros(num, dtype=self._torch.int64, device="cuda")

    def add_differing(self, counter: Any, got: Any, want: Any) -> None:
        raw = self._torch.int32 if got.element_size() == 4 else self._torch.int64
        counter += (got.view(raw) != want.view(raw)).sum()

    def scratch(self, like: Any) -> Any:
        return self._torch.full(like.shape, float("nan"), device="cuda")

    def capture(self, stream: Any, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=stream):
            results = body()
        return graph.replay, results


GPUS: dict[str, Callable[[], Any]] = {gpu.frame_name: gpu for gpu in (CupyGpu, TorchGpu)}
