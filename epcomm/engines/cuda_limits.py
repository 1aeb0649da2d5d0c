"""What the cuda engine takes, as far as one rank sees alone: before any peer is touched."""

from __future__ import annotations

from collections.abc import Callable

from epcomm import cuda_layout
from epcomm.arrays import ArrayView
from epcomm.engines.base import CombineRequest, DispatchRequest
from epcomm.errors import InvalidArgument


class Limits:
    """The limits of one rank's calls.

    Args:
        device: This rank's GPU.
        num_multiprocessors: Of that GPU.
        num_sharing: Ranks that use that GPU as threads of one process, this one among them.
        num_ranks: Ranks of the group.
        num_sms: Gives the multiprocessors of a call without a config.
    """

    def __init__(
        self,
        device: int,
        num_multiprocessors: int,
        num_sharing: int,
        num_ranks: int,
        num_sms: Callable[[], int],
    ) -> None:
        self._device, self._num_multiprocessors = device, num_multiprocessors
        self._num_sharing, self._num_ranks = num_sharing, num_ranks
        self._num_sms = num_sms
        # Threads that share the GPU run on it at the same time, and wait for one another; processes
        # take turns on it.
        self._most_blocks = num_multiprocessors // num_sharing

    def check_dispatch(self, request: DispatchRequest) -> int:
        """Raise InvalidArgument unless a dispatch is taken; return its blocks."""
        check_aligned(request.data, "x")
        return self._num_blocks(request.num_sms)

    def check_combine(self, request: CombineRequest) -> int:
        """As `check_dispatch`."""
        check_aligned(request.data, "x")
        for i, bias in enumerate(request.biases):
            check_aligned(bias, f"bias[{i}]")
        return self._num_blocks(request.num_sms)

    def check_experts(self, num_experts: int) -> None:
        """Raise InvalidArgument where there are too many experts over all ranks."""
        most = cuda_layout.MAX_LOCAL_EXPERTS * self._num_ranks
        if num_experts > most:
            raise InvalidArgument(
                f"num_experts is {num_experts}; the cuda engine takes at most "
                f"{cuda_layout.MAX_LOCAL_EXPERTS} a rank, {most} here."
            )

    def _num_blocks(self, num_sms: int | None) -> int:
        most, num_sharing = self._most_blocks, self._num_sharing
        if num_sms is None:
            # The default is no promise where threads share a GPU: their blocks run side by side.
            num_sms = min(self._num_sms(), most) if num_sharing > 1 else self._num_sms()
        if num_sms > most:
            shared = f", which {num_sharing} ranks share" if num_sharing > 1 else ""
            raise InvalidArgument(
                f"num_sms is {num_sms}; GPU {self._device} has {self._num_multiprocessors} "
                f"multiprocessors{shared}, and all blocks of a call must run at once. Pass at most "
                f"{most}."
            )
        return num_sms

    def num_low_latency_blocks(self) -> int:
        """Return the blocks of every low-latency kernel."""
        # As many for each source: a block that has rows of two finds their places one by one.
        num_ranks = self._num_ranks
        blocks = max(1, self._most_blocks // num_ranks * num_ranks)
        return min(blocks, cuda_layout.MAX_LOW_LATENCY_BLOCKS)


def check_aligned(view: ArrayView, name: str) -> None:
    """Raise InvalidArgument unless an array begins where 16-byte accesses may."""
    if view.ptr % 16:
        raise InvalidArgument(
            f"{name} begins at an address that is not a multiple of 16 bytes; pass a copy of it: "
            f"{name}.clone() or {name}.copy()."
        )
