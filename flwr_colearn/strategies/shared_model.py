"""SharedModel: the model at the start of a round, its roles, and its relative change."""

from collections.abc import Mapping

from flwr.app import ArrayRecord

from ..aggregation import check_initial, relative_change, trainable
from ..records import fingerprint, is_unchanged, view
from ..roles import UNTRAINED, Arrays, Role, assign_roles
from ..transport import Transport


class SharedModel:
    """The shared model of a run, w^i.

    Attributes
    ----------
    arrays : mapping of str to numpy.ndarray
        The model at the start of the round under way; empty before the first round.
    roles : dict
        The role of every array in the average; empty before the first round.
    trained : list of str
        The names of the arrays that participants train, including local arrays.
    variances : list of str
        The names of the arrays of variances, however the normalization scheme averages them.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset the state of an earlier run."""
        self.arrays: Arrays = {}
        self.roles: dict[str, Role] = {}
        self.trained: list[str] = []
        self.variances: list[str] = []
        self._known: list[bytes] | None = None
        self._sent: list[bytes] = []
        self._change: float | None = None
        self._measured = False

    def send(self, record: ArrayRecord, transport: Transport) -> None:
        """Set the model at the start of a round.

        Parameters
        ----------
        record : ArrayRecord
            w^i.
        transport : Transport
            The transport, whose `roles` and normalization scheme give the role of every array.

        Raises
        ------
        ColearnError
            In the first round, if the model has NaN, or if roles or normalization scheme do not fit
            it.
        """
        # The relative change of the last round has been used for this round's plan by now.
        self.arrays, self._measured = view(record), False
        self._sent = fingerprint(record)
        if not self.roles:
            check_initial(self.arrays)
            roles = assign_roles(self.arrays, transport.roles)
            transport.normalization.check(self.arrays, roles)
            self.roles = transport.normalization.roles(self.arrays, roles)
            self.trained = [name for name, role in roles.items() if role is Role.TRAINABLE]
            self.variances = [name for name, role in roles.items() if role is Role.VARIANCE]

    @property
    def untrained(self) -> list[str]:
        """The names of the model's statistics and counters."""
        return [name for name, role in self.roles.items() if role in UNTRAINED]

    def change(self, record: ArrayRecord, averaged: bool = True) -> float | None:
        """Return |w^{i+1} - w^i| / |w^i| for the model at the end of a round (eq. 4).

        The change is computed once for the same arrays. A wrapper that changes the average, for
        example by adding noise, makes other arrays, for which it is computed again.

        Parameters
        ----------
        record : ArrayRecord
            w^{i+1}.
        averaged : bool, default True
            Whether the round had an average; without one the change is ``None``.
        """
        if self._measured and (self._known is None or is_unchanged(record, self._known)):
            return self._change
        new, old = trainable(view(record), self.roles), trainable(self.arrays, self.roles)
        # A model of integers only has no weights whose change could be measured.
        self._change = relative_change(new, old) if averaged and new else None
        self._known, self._measured = fingerprint(record), True
        return self._change

    def differs(self, record: ArrayRecord) -> bool:
        """Return whether a record has other arrays than the model sent, by identity."""
        return not is_unchanged(record, self._sent)

    def state(self) -> Mapping[str, str | None]:
        """Return the last relative change in types of JSON, without rounding."""
        # repr, since JSON has no infinity.
        known = self._measured and self._change is not None
        return {"relative-change": repr(self._change) if known else None}

    def restore(self, state: Mapping[str, str | None]) -> None:
        """Restore the change that `state` returned, for any arrays that come next."""
        change = state["relative-change"]
        self._change = None if change is None else float(change)
        # The model before the change is not in the checkpoint, so it cannot be computed again.
        self._known, self._measured = None, True
