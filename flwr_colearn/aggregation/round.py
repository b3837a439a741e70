"""RoundMean: one round's mean, who is in it, and what was refused."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from logging import WARNING
from typing import Literal

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common import log

from ..errors import ColearnError, expected
from ..records import fingerprint, is_unchanged
from ..roles import Arrays, NDArray, Roles
from ..traffic import Event
from .mean import Empty, RunningMean, empty_array
from .replies import arrays_of, check_echo, check_train_reply, metrics_of, read_reply

Weighting = Literal["uniform", "weighted"]

Model = tuple[str, Arrays, float]
"""A participant, its model, and the number of examples it was trained on."""


class RoundMean:
    """The mean over one round's participants (eq. 2), with the reasons of those left out.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The model that the participants start from.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.
    weighting : {"uniform", "weighted"}, default "uniform"
        1/K each as in eq. 2, or by number of examples.
    participants : int, default 256
        K, or more: how many models a round has at most.
    weighted_by_key : str, default "num-examples"
        The metric that says how many examples a participant has.
    empty : callable, optional
        Gives the memory of the averages; see `RunningMean`.

    Attributes
    ----------
    participants : list of str
        Those whose models are in the mean.
    events : list of Event
        Refusals, and what `note` was told.

    Raises
    ------
    ColearnError
        If the roles do not fit the model, or the weighting is unknown.
    """

    def __init__(
        self,
        like: Arrays,
        roles: Roles = None,
        weighting: Weighting = "uniform",
        participants: int = 256,
        weighted_by_key: str = "num-examples",
        empty: Empty = empty_array,
    ) -> None:
        self.weighting = as_weighting(weighting)
        self.weighted_by_key = weighted_by_key
        self._mean = RunningMean(like, roles, empty, participants)
        self.renew(1, like)

    def renew(self, server_round: int, like: Arrays) -> None:
        """Begin a round, from another model of the same names, shapes and types."""
        self._mean.renew(like)
        self.round = server_round
        self.participants: list[str] = []
        self.events: list[Event] = []
        self._checked: list[bytes] = []
        # The last bit of a float64 sum depends on its order.
        self.order_matters = any(array.dtype == np.float64 for array in like.values())

    def weight(self, examples: float) -> float:
        """Return n_k of a participant with so many examples."""
        return 1 if self.weighting == "uniform" else examples

    @property
    def count(self) -> int:
        """How many models are in the mean."""
        return self._mean.count

    def check(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to `sent`.

        What passes can be added, whatever the others are; `fold` does not check it again.
        """
        if sent.metadata.message_type != MessageType.TRAIN:
            check_train_reply(sent, reply, self.weighted_by_key)
            return
        check_echo(sent, reply)
        model, examples = read_reply(reply, self.weighted_by_key)
        self._mean.check(model, self.weight(examples))
        self._checked = fingerprint(arrays_of(reply))

    def fold(
        self, replies: Iterable[Message], name_of: Callable[[int], str]
    ) -> list[tuple[str, RecordDict]]:
        """Add the models of replies; return the participants and metrics of those accepted.

        A list holds all models anyway, so they are added at once; else one after the other, and
        each reply may be dropped before the next is pulled.

        Parameters
        ----------
        replies : iterable of Message
            As the strategy has them: what it changed in a reply counts.
        name_of : callable
            ``node id -> name`` of a participant.
        """
        if isinstance(replies, list):
            read = [
                (reply, m) for reply in replies if (m := self._read(reply, name_of)) is not None
            ]
            fits = self.add_all([model for _, model in read])
            pairs = zip(read, fits, strict=True)
            return [(model[0], metrics_of(reply)) for (reply, model), fit in pairs if fit]
        # Not a loop, whose variable would hold a reply while the next one arrives.
        folded = map(partial(self._fold, name_of), replies)
        return [each for each in folded if each is not None]

    def _fold(self, name_of: Callable[[int], str], reply: Message) -> tuple[str, RecordDict] | None:
        """Add one reply's model; return the participant and its metrics, if it is accepted."""
        model = self._read(reply, name_of)
        if model is None:
            return None
        checked, self._checked = self._checked, []
        if not self.add(*model, checked=is_unchanged(arrays_of(reply), checked)):
            return None
        return model[0], metrics_of(reply)

    def _read(self, reply: Message, name_of: Callable[[int], str]) -> Model | None:
        """Return participant, model and examples; None if there is no model: it is refused."""
        name = name_of(reply.metadata.src_node_id)
        try:
            return name, *read_reply(reply, self.weighted_by_key)
        except ColearnError as error:
            self.refuse(name, str(error))
            return None

    def add(self, participant: str, arrays: Arrays, examples: float, checked: bool = False) -> bool:
        """Add one participant's model, or refuse it.

        Parameters
        ----------
        participant : str
            Whose model it is.
        arrays : mapping of str to numpy.ndarray
            The model.
        examples : float
            Number of examples it was trained on, positive.
        checked : bool, default False
            Whether the model passed `check` already: once is enough for a large model.

        Returns
        -------
        bool
            False if the model was refused; log and `events` say why.
        """
        try:
            if participant in self.participants:
                raise ColearnError("expected one reply from each participant, found a second one")
            if not examples > 0:
                raise expected("number of examples", "a positive number", examples)
            add = self._mean.add_checked if checked else self._mean.add
            add(arrays, self.weight(examples))
        except ColearnError as error:
            self.refuse(participant, str(error))
            return False
        self.participants.append(participant)
        return True

    def add_all(self, models: Sequence[Model]) -> list[bool]:
        """Do what `add` does with each of these, in one pass over memory if none is refused."""
        names = [participant for participant, *_ in models]
        at_once = (
            len(set(names)) == len(names) > 1
            and not self.participants
            and all(examples > 0 for _, _, examples in models)
            # Arrays in another order are copied, one model at a time if it is one by one.
            and all(a.flags.c_contiguous for _, arrays, _ in models for a in arrays.values())
        )
        if at_once:
            try:
                self._mean.add_all([(arrays, self.weight(n)) for _, arrays, n in models])
            except ColearnError:
                at_once = False  # one by one it is found out whose model is at fault
        if not at_once:
            return [self.add(*model) for model in models]
        self.participants.extend(names)
        return [True] * len(models)

    def refuse(self, participant: str, reason: str) -> None:
        """Note that a participant's reply is left out of the mean."""
        log(WARNING, "CoLearn: reply of participant %s refused: %s", participant, reason)
        self.events.append(Event("refusal", participant, reason))

    def note(self, events: Iterable[Event]) -> None:
        """Take note of what else happened to participants, for the reasons in errors."""
        self.events.extend(events)

    def require(self, least: int) -> None:
        """Raise a ColearnError if fewer than `least` models are in the mean."""
        if len(self.participants) < least:
            raise ColearnError(
                f"round {self.round}: expected models of {least} participants, found "
                f"{len(self.participants)} ({self._reasons('refusal')})"
            )

    def mean(self) -> dict[str, NDArray]:
        """Return the mean of the models (eq. 2); its arrays are the caller's.

        Raises
        ------
        ColearnError
            If no participant's model arrived.
        """
        if not self._mean.count:
            reasons = self._reasons("refusal", "absence") or "no replies before the timeout"
            raise ColearnError(
                f"round {self.round}: expected a model from at least one participant, found none "
                f"({reasons})"
            )
        return self._mean.mean()

    def _reasons(self, *kinds: str) -> str:
        left_out = [event for event in self.events if event.kind in kinds]
        return "; ".join(f"{event.participant}: {event.reason}" for event in left_out)


def as_weighting(value: object) -> Weighting:
    """Return `value` if it is a weighting.

    Raises
    ------
    ColearnError
        If it is anything else.
    """
    if value == "uniform" or value == "weighted":
        return value
    raise expected("weighting", "'uniform' or 'weighted'", value)
