"""One Buffer a rank, made again only when it has to be: what training.py and decoding.py share."""

from __future__ import annotations

import threading
from typing import Any

from epcomm.buffer import Buffer, engine_and_gpu
from epcomm.errors import ClosedError
from epcomm.group import is_rank_thread

#: A Buffer, and the engine and the device that it was asked for with.
_Made = tuple[Buffer | None, tuple[str | None, int | None]]
_NONE: _Made = (None, (None, None))


class OneBuffer:
    """Keeps the Buffer of each rank: one a process; but where threads are ranks, one a thread.

    Args:
        module: Whose ``get_buffer`` it serves, for the error.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._of_thread = threading.local()
        self._of_process: _Made = _NONE

    def get(
        self,
        group: Any,
        num_nvl_bytes: int,
        num_rdma_bytes: int,
        low_latency_mode: bool,
        engine: str | None,
        device: int | None,
    ) -> Buffer:
        """Return the rank's Buffer; collective where one has to be made.

        A new one is made when there is none, it was destroyed, the group, or what was passed as
        engine or device, changed, or it is too small.

        Args:
            group: What `Buffer` takes as group.
            num_nvl_bytes: Bytes that it must have, as in `Buffer`.
            num_rdma_bytes: Bytes that it must have, as in `Buffer`.
            low_latency_mode: As in `Buffer`.
            engine: As in `Buffer`.
            device: As in `Buffer`.
        """
        buffer, place = self._find()
        if (
            buffer is not None
            and buffer.group is group
            and place == (engine, device)
            and not buffer.is_destroyed
            and buffer.num_nvl_bytes >= num_nvl_bytes
            and buffer.num_rdma_bytes >= num_rdma_bytes
        ):
            return buffer
        engine_and_gpu(engine, device)  # what is refused leaves the Buffer as it is
        if buffer is not None:
            buffer.destroy()
        buffer = Buffer(
            *(group, num_nvl_bytes, num_rdma_bytes, low_latency_mode), engine=engine, device=device
        )
        if is_rank_thread():
            self._of_thread.made = buffer, (engine, device)
        else:
            self._of_process = buffer, (engine, device)
        return buffer

    def current(self, name: str) -> Buffer:
        """Return the Buffer that `get` made.

        Args:
            name: The call that needs it, for the error.

        Raises:
            ClosedError: There is none yet.
        """
        buffer, _ = self._find()
        if buffer is None:
            raise ClosedError(f"{name}: no Buffer yet; call {self._module}.get_buffer first.")
        return buffer

    def _find(self) -> _Made:
        """Return the rank's Buffer and where it works, as `get` was asked for them."""
        if is_rank_thread():
            made: _Made = getattr(self._of_thread, "made", _NONE)
            return made
        return self._of_process
