"""Failure: the reason why an attempt of a participant failed, and what to expect of another one."""

import re
from dataclasses import dataclass
from typing import Literal

from flwr.app import Message

from .._flwr import CLIENT_CRASHED, NODE_UNAVAILABLE, RAISING_CODES
from ..aggregation import failure_of

Kind = Literal["passing", "repeatable", "memory", "machine"]

# By name, since neither framework is imported here: torch.cuda.OutOfMemoryError, TensorFlow's
# ResourceExhaustedError, Python's MemoryError. The text is that of a site's mod.
_MEMORY = re.compile(r"\b(OutOfMemoryError|ResourceExhaustedError|MemoryError|out of memory)\b")

# What a disk or a network raises, which may work again a moment later.
_PASSING = re.compile(
    r"\b(OSError|BlockingIOError|InterruptedError|BrokenPipeError|Timeout\w*|Connection\w*Error)\b"
)

_MACHINE = {
    NODE_UNAVAILABLE: "its machine is gone (preempted, switched off or without a connection)",
    CLIENT_CRASHED: "its process was ended (preempted, killed or beyond its time limit)",
}


@dataclass(frozen=True)
class Failure:
    """The failure of one attempt of a participant.

    Attributes
    ----------
    reason : str
        The reason, for the record.
    kind : {"passing", "repeatable", "memory", "machine"}
        A "repeatable" failure, a refused reply or an exception, cannot differ the next time if it
        had the same reason before: the model, the data and the seed are the same. A participant
        that ran out of "memory" needs a longer pause, until other programs have freed some. A
        "machine" that is preempted or dies, and all that is "passing", may differ at once.
    """

    reason: str
    kind: Kind = "passing"

    @classmethod
    def of(cls, reply: Message) -> "Failure":
        """Return the failure of which an error reply of Flower or of the ClientApp informs."""
        reason, code = str(failure_of(reply)), reply.error.code
        if code in _MACHINE:
            return cls(f"{_MACHINE[code]}: {reason}", "machine")
        if code not in RAISING_CODES:
            return cls(reason)
        if _MEMORY.search(reason):
            return cls(f"it ran out of memory: {reason}", "memory")
        return cls(reason, "passing" if _PASSING.search(reason) else "repeatable")

    @classmethod
    def refused(cls, reason: str) -> "Failure":
        """Return the failure of a reply that was refused for this reason."""
        return cls(f"its reply was refused: {reason}", "repeatable")
