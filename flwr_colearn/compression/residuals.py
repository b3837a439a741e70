"""Residual: the rounding error of a participant's models, which its next round compensates."""

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
"""The prefix of the keys in ``context.state``."""


class Residual:
    """The rounding error of earlier rounds of a session, in a participant's state (error feedback).

    The residual is stored as bfloat16 in ``context.state``, which Flower keeps for the run and
    drops with the SuperNode. Without it the rounding error of the last round, at most half a step
    of each number, is not compensated. The residuals before and after a round are both stored, so
    that a repeated round, after a restart or a resume of the server, starts with the same residual
    and gives the same bits.

    Where models stay with the participants, the participant's own model has no rounding error until
    the average replaces it. The residual of that round is therefore used only after that.

    Parameters
    ----------
    state : RecordDict
        The participant's state.
    request : ConfigRecord
        The agreement in the message: ``round``, ``session`` and, where they apply, `AVERAGE_OF`
        and `LOCAL_REFERENCE`.
    """

    def __init__(self, state: RecordDict, request: ConfigRecord) -> None:
        self._state = state
        self._request = request

    @property
    def wanted(self) -> bool:
        """Whether the message is of a round of training, whose rounding error is stored."""
        return "round" in self._request

    def note_average(self) -> None:
        """Record that the message's model replaces the participant's own.

        If that model is the average of the last reply, the rounding error is missing from it, and
        the residual is used from then on. If it is another model of a later round, the residual is
        dropped, since it belongs to a model that no longer exists.
        """
        kept = records_of(self._state, ConfigRecord).get(RESIDUAL)
        average_of = self._request.get(AVERAGE_OF)
        if kept is None or average_of is None:
            return
        if average_of == kept["round"] and self._request.get("session") == kept["session"]:
            kept["settled"] = True
        # In a repeated round the residual stays: `_kept` returns the one before that round.
        elif self._request.get("round") != kept["round"]:
            log(WARNING, "Compression: the residual of earlier rounds is dropped with the model")
            del self._state[RESIDUAL]

    def before(self, base: Arrays) -> dict[str, NDArray]:
        """Return the residual of the rounds before this one; empty if it is lost.

        Parameters
        ----------
        base : mapping of str to numpy.ndarray
            The reference model. Arrays of other shapes than its are left out.
        """
        # A damaged state costs accuracy in one round, and must not end the run.
        try:
            arrays = self._kept()
        except (ColearnError, KeyError, TypeError) as error:
            log(WARNING, "Compression: the residual of earlier rounds is lost: %r", error)
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
                log(WARNING, "Compression: this participant has no residual of earlier rounds")
            return {}
        # `this == last` is a repeated round, which starts with the same residual as before.
        when = "after" if kept["settled"] and this != last else "before"
        return BFloat16().decode(records_of(self._state, ArrayRecord)[f"{RESIDUAL}.{when}"])

    def keep(self, before: Arrays, trained: Arrays, arriving: Arrays) -> None:
        """Store the residuals before and after this round.

        Parameters
        ----------
        before : mapping of str to numpy.ndarray
            The residual before the round.
        trained, arriving : mapping of str to numpy.ndarray
            The rounded arrays, before the rounding and as the server will decode them.
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
