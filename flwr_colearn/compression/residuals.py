"""Residual: what rounding took away from a participant's models, for its next round."""

import math
from logging import WARNING

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import log

from ..errors import ColearnError
from ..records import records_of, to_record
from ..roles import Arrays, NDArray
from .agreement import AVERAGE_OF, LOCAL_REFERENCE
from .codecs import BFloat16, difference

RESIDUAL = "colearn.residual"
"""Keys in ``context.state`` begin so."""


class Residual:
    """What earlier rounds of a session rounded away, in a participant's state (error feedback).

    It is kept as bfloat16 in ``context.state``, which Flower keeps for the run and loses with the
    SuperNode: then that round's rounding, half a step of each number at most, is not made up for.
    Both what a round began with and what it left are kept, so that a round which is repeated, by a
    restart or by a server that resumes, begins with what it began with and gives the same bits.

    Where models stay with the participants, a model is still unrounded until the average has
    replaced it; what its rounding left counts from then on only.

    Parameters
    ----------
    state : RecordDict
        The participant's.
    request : ConfigRecord
        What the server said of the compression: ``round``, ``session`` and, if so, `AVERAGE_OF`
        and `LOCAL_REFERENCE`.
    """

    def __init__(self, state: RecordDict, request: ConfigRecord) -> None:
        self._state = state
        self._request = request

    @property
    def wanted(self) -> bool:
        """Whether this is a round of training, which is made up for."""
        return "round" in self._request

    def note_average(self) -> None:
        """Note that the message's model takes the place of the participant's own.

        If that model is the average that the last reply went into, the rounding is missing from it
        and counts from now on. If it is another one of a later round, the participant begins anew:
        what it has kept belongs to a model that is gone.
        """
        kept = records_of(self._state, ConfigRecord).get(RESIDUAL)
        average_of = self._request.get(AVERAGE_OF)
        if kept is None or average_of is None:
            return
        if average_of == kept["round"] and self._request.get("session") == kept["session"]:
            kept["settled"] = True
        elif self._request.get("round") != kept["round"]:  # else a round that is repeated
            log(WARNING, "Compression: what earlier rounds rounded away is lost with the model")
            del self._state[RESIDUAL]

    def before(self, base: Arrays) -> dict[str, NDArray]:
        """Return what the rounds before this one left over; nothing where that is lost.

        Parameters
        ----------
        base : mapping of str to numpy.ndarray
            The model that the difference is to. What does not have its shapes is left out.
        """
        try:
            arrays = self._kept()
        except (ColearnError, KeyError, TypeError) as error:
            log(WARNING, "Compression: what earlier rounds rounded away is lost: %r", error)
            return {}
        unlike = [n for n, a in arrays.items() if n not in base or base[n].shape != a.shape]
        if unlike:
            log(WARNING, "Compression: residuals of another shape are dropped: %s", unlike)
        return {name: array for name, array in arrays.items() if name not in unlike}

    def _kept(self) -> Arrays:
        this, last, kept = self._request["round"], math.inf, ConfigRecord()
        if RESIDUAL in self._state:
            kept = records_of(self._state, ConfigRecord)[RESIDUAL]
            last = kept["round"]  # type: ignore[assignment]
        if this < last or kept["session"] != self._request.get("session", ""):  # type: ignore[operator]
            if this != 1:
                log(WARNING, "Compression: what earlier rounds rounded away is not kept here")
            return {}
        when = "after" if kept["settled"] and this != last else "before"
        return BFloat16().decode(records_of(self._state, ArrayRecord)[f"{RESIDUAL}.{when}"])

    def keep(self, before: Arrays, trained: Arrays, arriving: Arrays) -> None:
        """Keep what this round began with, and what its rounding left over.

        Parameters
        ----------
        before : mapping of str to numpy.ndarray
            What the round began with.
        trained, arriving : mapping of str to numpy.ndarray
            The arrays that were rounded, as they are and as the server will have them.
        """
        after = {n: difference(a, arriving[n], before.get(n)) for n, a in trained.items()}
        for when, arrays in (("before", before), ("after", after)):
            self._state[f"{RESIDUAL}.{when}"] = BFloat16().encode(to_record(dict(arrays)))[0]
        self._state[RESIDUAL] = ConfigRecord(
            {
                "round": self._request["round"],
                "session": self._request.get("session", ""),
                "settled": not self._request.get(LOCAL_REFERENCE),
            }
        )
