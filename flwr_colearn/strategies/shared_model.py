"""SharedModel: the model that a round starts from, its roles, and how far it moved."""

from collections.abc import Mapping

from flwr.app import ArrayRecord

from ..aggregation import relative_change, trainable
from ..records import fingerprint, is_unchanged, view
from ..roles import UNTRAINED, Arrays, Role, assign_roles
from ..transport import Transport


class SharedModel:
    """The shared model of a run, w^i.

    Attributes
    ----------
    arrays : mapping of str to numpy.ndarray
        What the round under way started from; empty before the first.
    roles : dict
        What the average does with every array; empty before the first round.
    trained : list of str
        Names of the arrays that participants train, those that stay with them included.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget an earlier run."""
        self.arrays: Arrays = {}
        self.roles: dict[str, Role] = {}
        self.trained: list[str] = []
        self._known: list[bytes] | None = None
        self._change: float | None = None
        self._measured = False

    def send(self, record: ArrayRecord, transport: Transport) -> None:
        """Begin a round from this model.

        Parameters
        ----------
        record : ArrayRecord
            w^i.
        transport : Transport
            Its roles and normalization scheme decide what the average does with every array.

        Raises
        ------
        ColearnError
            In the first round, if roles or normalization scheme do not fit the model.
        """
        self.arrays, self._measured = view(record), False
        if not self.roles:
            roles = assign_roles(self.arrays, transport.roles)
            transport.normalization.check(self.arrays, roles)
            self.roles = transport.normalization.roles(self.arrays, roles)
            self.trained = [name for name, role in roles.items() if role is Role.TRAINABLE]

    @property
    def untrained(self) -> list[str]:
        """The names of the model's statistics and counters."""
        return [name for name, role in self.roles.items() if role in UNTRAINED]

    def change(self, record: ArrayRecord, averaged: bool = True) -> float | None:
        """Return |w^{i+1} - w^i| / |w^i| for the model that a round ended with (eq. 4).

        It is measured once for the same arrays. Whatever a wrapper does to the average, such as
        adding noise, makes others of them, and counts.

        Parameters
        ----------
        record : ArrayRecord
            w^{i+1}.
        averaged : bool, default True
            Whether the round brought an average; if not, there is nothing to compare: ``None``.
        """
        if self._measured and (self._known is None or is_unchanged(record, self._known)):
            return self._change
        new, old = trainable(view(record), self.roles), trainable(self.arrays, self.roles)
        self._change = relative_change(new, old) if averaged else None
        self._known, self._measured = fingerprint(record), True
        return self._change

    def state(self) -> Mapping[str, str | None]:
        """Return the last change, exactly, as JSON can hold it."""
        known = self._measured and self._change is not None
        return {"relative-change": repr(self._change) if known else None}

    def restore(self, state: Mapping[str, str | None]) -> None:
        """Go on with the change that `state` returned, whatever the arrays are next."""
        change = state["relative-change"]
        self._change = None if change is None else float(change)
        self._known, self._measured = None, True
