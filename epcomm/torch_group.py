"""A torch.distributed ProcessGroup as a group, for bootstrap only: no row ever goes through it.

Objects travel through the key-value store that the process group was made with, not through the
process group: a missing rank can be named, and the caller's own collectives find nothing of
epcomm's before them, whatever was given up.
"""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Sequence
from typing import Any

from epcomm import env
from epcomm.errors import CommTimeout, TransportError, out_of_step
from epcomm.waiting import Deadline, wait_until

#: Rounds whose objects are kept: a rank posts round n + 2 only when all have posted n + 1, and so
#: are done with n; or when it gave up.
_NUM_SLOTS = 2


class TorchGroup:
    """See `epcomm.group.Group`.

    Args:
        process_group: Any backend; its rank 0 keeps the store (usually a TCP server).
    """

    def __init__(self, process_group: Any) -> None:
        store = _shared_store(process_group)
        self._init(store, range(process_group.size()), process_group.rank(), "all")

    def _init(self, store: _SharedStore, ranks: Sequence[int], me: int, name: str) -> None:
        self._store = store
        self._ranks = tuple(ranks)
        self._name = name
        self.rank = self._ranks.index(me)
        self.size = len(self._ranks)

    def allgather(
        self, obj: Any, *, timeout_s: float | None = None, phase: str = "allgather"
    ) -> list[Any]:
        """See `Group.allgather`."""
        deadline = Deadline(env.settings().timeout_s if timeout_s is None else timeout_s)
        this_round = self._store.rounds[self._name] = self._store.rounds.get(self._name, 0) + 1
        received = {self.rank: obj}

        def is_done() -> bool:
            for rank in range(self.size):
                if rank not in received:
                    self._receive(rank, this_round, phase, received)
            return len(received) == self.size

        try:
            self._post(this_round, phase, obj)
            is_in_time = wait_until(is_done, deadline)
            if not is_in_time:
                # Who comes later must not go on alone.
                self._post(this_round, None, None)
        except RuntimeError as error:  # torch's errors of a store whose keeper is gone
            raise TransportError(f"{phase}: torch.distributed failed: {error}") from error
        if not is_in_time:
            missing = [rank for rank in range(self.size) if rank not in received]
            raise CommTimeout(phase, self.rank, missing, deadline.timeout_s)
        return [received[rank] for rank in range(self.size)]

    def _post(self, this_round: int, phase: str | None, obj: Any) -> None:
        message = pickle.dumps((this_round, phase, obj))
        self._store.keys.set(self._key(self.rank, this_round), message)

    def _receive(self, rank: int, this_round: int, phase: str, received: dict[int, Any]) -> None:
        key = self._key(rank, this_round)
        if not self._store.keys.check([key]):
            return
        sent_round, sent_phase, sent = pickle.loads(self._store.keys.get(key))
        if sent_round < this_round or (sent_round, sent_phase) == (this_round, None):
            return  # of the round before the last, or withdrawn
        if (sent_round, sent_phase) != (this_round, phase):
            rounds = self._store.rounds
            rounds[self._name] = max(rounds[self._name], sent_round)
            raise out_of_step(phase, rank, sent_phase or "an exchange that it gave up")
        received[rank] = sent

    def _key(self, rank: int, this_round: int) -> str:
        return f"{self._name}/{self._ranks[rank]}/{this_round % _NUM_SLOTS}"

    def barrier(self, *, timeout_s: float | None = None, phase: str = "barrier") -> None:
        """See `Group.barrier`."""
        self.allgather(None, timeout_s=timeout_s, phase=phase)

    def split(self, color: int) -> TorchGroup:
        """See `Group.split`."""
        colors = self.allgather(color, phase="split")
        name = f"{self._name}.{self._store.rounds[self._name]}.{color}"
        ranks = [self._ranks[rank] for rank, other in enumerate(colors) if other == color]
        group = TorchGroup.__new__(TorchGroup)
        group._init(self._store, ranks, self._ranks[self.rank], name)
        return group

    def check(self) -> None:
        """Nothing to look at: a store does not tell of ranks that are gone."""


class _SharedStore:
    """What the groups of one process group share.

    Attributes:
        keys: A store for epcomm's keys alone.
        rounds: The last round of each group, by its name.
    """

    def __init__(self, process_group: Any) -> None:
        import torch.distributed as dist

        if hasattr(process_group, "get_group_store"):
            store = process_group.get_group_store()
        else:  # an older torch
            store = dist.distributed_c10d._get_process_group_store(process_group)
        self.keys = dist.PrefixStore("epcomm", store)
        self.rounds: dict[str, int] = {}


_stores: weakref.WeakKeyDictionary[Any, _SharedStore] = weakref.WeakKeyDictionary()


def _shared_store(process_group: Any) -> _SharedStore:
    if process_group not in _stores:
        _stores[process_group] = _SharedStore(process_group)
    return _stores[process_group]
