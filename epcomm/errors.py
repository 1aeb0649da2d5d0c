"""Every error that epcomm raises on purpose.

::

    EpcommError
    ├── InvalidArgument (ValueError)     a call's arguments are wrong; the Buffer works as before
    ├── UnsupportedConfig                this machine or group cannot do what was asked
    ├── RankMismatch                     ranks passed different values where they must agree
    ├── ClosedError                      the Buffer was destroyed before this call
    ├── CompileError                     a kernel did not compile
    └── TransportError                   memory or messages between ranks failed
        ├── PeerMapError                 a peer's memory could not be reached
        ├── CudaError                    a CUDA call failed
        └── CommTimeout (TimeoutError)   a wait for peers passed its deadline

A message says what was wrong, what was got, the rule, and what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence


class EpcommError(Exception):
    """The base of all errors that epcomm raises on purpose."""


class InvalidArgument(EpcommError, ValueError):
    """A call's arguments are wrong. The Buffer works as before."""


class UnsupportedConfig(EpcommError):
    """This machine, group or build cannot do what was asked."""


class RankMismatch(EpcommError):
    """Ranks passed different values where they must agree. Every rank raises the same message."""


class ClosedError(EpcommError):
    """The Buffer was destroyed before this call, or there is none yet."""


class CompileError(EpcommError):
    """A kernel did not compile."""


class TransportError(EpcommError):
    """Memory or messages between ranks failed."""


class PeerMapError(TransportError):
    """A peer's memory could not be reached."""


class CudaError(TransportError):
    """A CUDA call failed."""


class CommTimeout(TransportError, TimeoutError):
    """A wait for peers passed its deadline.

    Attributes:
        phase: What was being waited for, such as ``"dispatch: staged rows"``.
        rank: The rank that waited.
        peers: The ranks that did not answer (empty where the transport cannot tell; where it only
            tells which rank gave up, that one).
        timeout_s: The deadline, in seconds.
        gave_up: The rank that waited in vain and so ended this one's wait; None if it is this one.
    """

    def __init__(
        self,
        phase: str,
        rank: int,
        peers: Sequence[int],
        timeout_s: float,
        detail: str = "",
        *,
        gave_up: int | None = None,
    ) -> None:
        self.phase = phase
        self.rank = rank
        self.peers = tuple(peers)
        self.timeout_s = timeout_s
        self.gave_up = gave_up
        who = f"rank(s) {', '.join(map(str, self.peers))}" if self.peers else "other ranks"
        what = f"rank {rank} waited {timeout_s:g} s for {who}"
        if gave_up is not None:
            for_whom = "" if self.peers == (gave_up,) else f" for {who}"
            what = f"rank {gave_up} gave up waiting{for_whom}, so rank {rank} ends too"
        super().__init__(
            f"{phase}: {what}{'; ' + detail if detail else ''}. Look first at what those ranks "
            "printed; if they are only slow, raise timeout_s= or EPCOMM_TIMEOUT_S. If this was a "
            "call on a Buffer, destroy that Buffer on every rank and make a new one."
        )


def kind_of(value: object) -> str:
    """Return what a message calls a value of a wrong type."""
    return "None" if value is None else f"a {type(value).__name__}"


def failed_before(phase: str, why: str) -> TransportError:
    """Return the error of a call on a Buffer on which a wait has failed before."""
    return TransportError(
        f"{phase}: an earlier call on this Buffer failed: {why}. Destroy this Buffer on every rank "
        "and make a new one."
    )


def out_of_step(phase: str, rank: int, theirs: str) -> TransportError:
    """Return the error of a rank that finds another at a different exchange."""
    return TransportError(
        f"{phase}: rank {rank} is at {theirs!r}: an earlier exchange ended on some ranks only, or "
        "ranks make different calls. Make the same call again on every rank."
    )
