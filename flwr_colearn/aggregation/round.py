"""RoundMean: the mean of one round, with its participants and the refused replies."""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from logging import WARNING
from typing import Literal

import numpy as np
from flwr.app import Message, MessageType, RecordDict
from flwr.common import log

from ..errors import ColearnError, expected
from ..policy import Guard
from ..records import fingerprint, is_unchanged
from ..roles import Arrays, NDArray, Roles
from ..traffic import Event
from .examples import ToldExamples
from .mean import Empty, RunningMean, empty_array
from .replies import arrays_of, check_echo, check_train_reply, metrics_of, read_reply
from .shares import lowered_weights
from .updates import Update, Updates, contributions

Weighting = Literal["uniform", "weighted"]

Model = tuple[str, Arrays, float]
"""A participant, its model, and the number of examples on which it was trained."""


class RoundMean:
    """The mean over one round's participants (eq. 2), with the reasons for refused replies.

    Parameters
    ----------
    like : mapping of str to numpy.ndarray
        The model from which the participants start.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.
    weighting : {"uniform", "weighted"}, default "uniform"
        "uniform" for 1/K each as in eq. 2, "weighted" for weights by number of examples.
    participants : int, default 256
        K, or more: the largest number of models in a round.
    weighted_by_key : str, default "num-examples"
        The name of the metric with the participant's number of examples.
    empty : callable, optional
        Allocates the averages; see `RunningMean`.
    variances, rounded
        The arrays that cannot be negative, and whether rounding makes them so; see `RunningMean`.
    guard : Guard, optional
        The bounds of updates' norms; without it norms are not computed.
    gradients, refuses
        See `Updates`.
    admits : callable, optional
        ``(reply) -> None``: a further check of a train reply; raises `ColearnError` to refuse it.

    Attributes
    ----------
    participants : list of str
        The participants whose models are in the mean.
    events : list of Event
        The refusals, and the events given to `note`.
    examples : ToldExamples
        The numbers of examples that participants stated first, which "weighted" uses.
    updates : Updates or None
        The norms of updates, with the guard's state across rounds; None without a guard.
    contributions : dict
        After `mean`, by participant: ``weight``, its share of the mean; ``norm`` of its update and
        ``cosine`` to the mean's, which are None where they are not measured.

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
        variances: Collection[str] | None = None,
        rounded: bool = False,
        guard: Guard | None = None,
        gradients: bool = False,
        refuses: bool = True,
        admits: Callable[[Message], None] = lambda reply: None,
    ) -> None:
        self.weighting = as_weighting(weighting)
        self.weighted_by_key = weighted_by_key
        self._admits = admits
        self._mean = RunningMean(like, roles, empty, participants, variances, rounded)
        self.examples = ToldExamples()
        self._largest_share = 1.0 if guard is None else guard.largest_share
        # The batches whose gradients are exchanged differ from step to step.
        self.fixes_examples = not gradients
        self.updates: Updates | None = None
        if guard is not None:
            self.updates = Updates(guard, self._mean.weights, gradients, refuses)
        self.renew(1, like)

    def renew(self, server_round: int, like: Arrays, epochs: float = 1) -> None:
        """Begin a round of so many epochs, with a model of the same names, shapes and types."""
        self._mean.renew(like)
        if self.updates is not None:
            self.updates.renew(like, epochs)
        self.round = server_round
        self.contributions: dict[str, dict[str, float | None]] = {}
        self._weights: dict[str, float] = {}
        # The weights of those that `largest_share` lowers.
        self._lowered: dict[str, float] = {}
        # Of the replies that `check` has accepted, by node: the updates, the numbers of examples.
        self._measured: dict[int, Update] = {}
        self._stated: dict[int, float] = {}
        # The same numbers by participant, of the replies that the strategy passed on.
        self._told: dict[str, float] = {}
        self.participants: list[str] = []
        self.events: list[Event] = []
        self._checked: list[bytes] = []
        # The last bit of a float64 sum depends on its order.
        self.order_matters = any(array.dtype == np.float64 for array in like.values())

    def weight(self, examples: float) -> float:
        """Return n_k of a participant with the given number of examples."""
        return 1 if self.weighting == "uniform" else examples

    @property
    def count(self) -> int:
        """The number of models in the mean."""
        return self._mean.count

    def check(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to `sent`.

        An accepted model can be added independently of the others, and `fold` does not check it
        again.
        """
        if sent.metadata.message_type != MessageType.TRAIN:
            check_train_reply(sent, reply, self.weighted_by_key)
            return
        check_echo(sent, reply)
        self._admits(reply)
        model, examples = read_reply(reply, self.weighted_by_key)
        update = self._check(model, examples)
        self._stated[reply.metadata.src_node_id] = examples
        if update is not None:
            self._measured[reply.metadata.src_node_id] = update
        # `fold` compares this: a wrapper or subclass may change the reply after the check.
        self._checked = fingerprint(arrays_of(reply))

    def measured(self, model: Arrays, examples: float) -> Update | None:
        """Return the update of a model, for `add_all`; None without a guard.

        Raises
        ------
        ColearnError
            If the model cannot be added to the mean.
        """
        return self._check(model, examples)

    def _check(self, model: Arrays, examples: float, update: Update | None = None) -> Update | None:
        """Raise a ColearnError unless a model can be added; return its update, if not given."""
        weight = self.weight(examples)
        if self.updates is None or update is not None:
            self._mean.check(model, weight)
            return update
        return self.updates.admitted(model, self._mean, weight)

    def fold(
        self, replies: Iterable[Message], name_of: Callable[[int], str]
    ) -> list[tuple[str, RecordDict]]:
        """Add the models of replies; return the participants and metrics of the accepted ones.

        A list has all models in memory, so they are added at once. Replies of another iterable are
        added one after the other, and each can be freed before the next is pulled.

        Parameters
        ----------
        replies : iterable of Message
            The replies, with any changes that the strategy made to them.
        name_of : callable
            ``node id -> name`` of a participant.
        """
        if self._bounds_shares:
            replies = list(replies)
        if isinstance(replies, list):
            read = [
                (reply, m) for reply in replies if (m := self._read(reply, name_of)) is not None
            ]
            self._lower({name: examples for _, (name, _, examples) in read})
            updates = [self._measured.get(reply.metadata.src_node_id) for reply, _ in read]
            fits = self.add_all([model for _, model in read], updates)
            pairs = zip(read, fits, strict=True)
            return [(model[0], metrics_of(reply)) for (reply, model), fit in pairs if fit]
        # `map` and not a loop: a loop's variable would keep a reply in memory during the next pull.
        folded = map(partial(self._fold, name_of), replies)
        return [each for each in folded if each is not None]

    @property
    def _bounds_shares(self) -> bool:
        return self.weighting == "weighted" and self._largest_share < 1.0

    def _lower(self, examples: dict[str, float]) -> None:
        """Lower the weights of participants whose share is beyond the largest one."""
        if self._bounds_shares:
            self._lowered, warnings = lowered_weights(examples, self._largest_share)
            self.events.extend(warnings)

    def _weight_of(self, participant: str, examples: float) -> float:
        return self._lowered.get(participant, self.weight(examples))

    def _fold(self, name_of: Callable[[int], str], reply: Message) -> tuple[str, RecordDict] | None:
        """Add one reply's model; return the participant and its metrics, or None if refused."""
        model = self._read(reply, name_of)
        if model is None:
            return None
        checked, self._checked = self._checked, []
        same = is_unchanged(arrays_of(reply), checked)
        if not self.add(*model, same, self._measured.get(reply.metadata.src_node_id)):
            return None
        return model[0], metrics_of(reply)

    def _read(self, reply: Message, name_of: Callable[[int], str]) -> Model | None:
        """Return participant, model and examples; refuse a reply without them and return None."""
        name = name_of(reply.metadata.src_node_id)
        try:
            arrays, examples = read_reply(reply, self.weighted_by_key)
            self._admits(reply)
        except ColearnError as error:
            self.refuse(name, str(error))
            return None
        # Another number than that of the arriving reply is the strategy's own, which decides.
        stated = self._stated.get(reply.metadata.src_node_id, examples)
        self._told[name] = stated
        if self.weighting == "weighted" and self.fixes_examples and stated == examples:
            examples, warnings = self.examples.fixed(name, examples)
            self.events.extend(warnings)
        return name, arrays, examples

    def add(
        self,
        participant: str,
        arrays: Arrays,
        examples: float,
        checked: bool = False,
        update: Update | None = None,
    ) -> bool:
        """Add one participant's model, or refuse it.

        Parameters
        ----------
        participant : str
            The name of the participant.
        arrays : mapping of str to numpy.ndarray
            The model.
        examples : float
            The number of examples on which it was trained, positive.
        checked : bool, default False
            Whether `check` has accepted the model already; a second check of a large model is slow.
        update : Update, optional
            The update as it arrived, if `check` has measured it. Changes that a wrapper made since
            then are the server's own.

        Returns
        -------
        bool
            False if the model was refused; the log and `events` contain the reason.
        """
        try:
            if participant in self.participants:
                raise ColearnError("expected one reply from each participant, found a second one")
            if not examples > 0:
                raise expected("number of examples", "a positive number", examples)
            if not checked:
                update = self._check(arrays, examples, update)
            self._mean.add_checked(arrays, self._weight_of(participant, examples))
        except ColearnError as error:
            self.refuse(participant, str(error))
            return False
        self._accept(participant, examples, update)
        return True

    def _accept(self, participant: str, examples: float, update: Update | None) -> None:
        self.participants.append(participant)
        self._weights[participant] = self._weight_of(participant, examples)
        self.examples.remember(participant, self._told.get(participant, examples))
        if self.updates is not None and update is not None:
            self.updates.accept(participant, update)

    def add_all(
        self, models: Sequence[Model], updates: Sequence[Update | None] | None = None
    ) -> list[bool]:
        """Do the same as `add` for each of the models, in one pass over memory if none is refused.

        Parameters
        ----------
        models : sequence of (participant, arrays, examples)
            The models.
        updates : sequence of Update, optional
            Their updates where `check` has measured them, else None; see `add`.

        Returns
        -------
        list of bool
            The results of `add`.
        """
        names = [participant for participant, *_ in models]
        found = list(updates or [None] * len(models))
        at_once = (
            len(set(names)) == len(names) > 1
            and not self.participants
            and all(examples > 0 for _, _, examples in models)
            # Other arrays are copied, and one by one only a single copy is in memory at a time.
            and all(a.flags.c_contiguous for _, arrays, _ in models for a in arrays.values())
        )
        if at_once:
            try:
                for index, (_, arrays, _) in enumerate(models):
                    found[index] = found[index] or self._bounded(arrays)
                self._mean.add_all([(a, self._weight_of(name, n)) for name, a, n in models])
            except ColearnError:
                # Added one by one, the invalid model is refused and the others are not.
                at_once = False
        if not at_once:
            return [
                self.add(*model, update=update) for model, update in zip(models, found, strict=True)
            ]
        for (name, _, examples), update in zip(models, found, strict=True):
            self._accept(name, examples, update)
        return [True] * len(models)

    def _bounded(self, arrays: Arrays) -> Update | None:
        """Return a model's update; raise a ColearnError if it is beyond the bound."""
        if self.updates is None:
            return None
        update = self.updates.measure(arrays)
        self.updates.check(update)
        return update

    def refuse(self, participant: str, reason: str) -> None:
        """Record that a participant's reply is left out of the mean."""
        event = Event("refusal", participant, reason)
        log(WARNING, "CoLearn: reply of participant %s refused: %s", participant, event.reason)
        self.events.append(event)

    def note(self, events: Iterable[Event]) -> None:
        """Record further events of participants, for the reasons in errors."""
        self.events.extend(events)

    def require(self, least: int) -> None:
        """Raise a ColearnError if fewer than `least` models are in the mean."""
        if len(self.participants) < least:
            raise ColearnError(
                f"round {self.round}: expected models of {least} participants, found "
                f"{len(self.participants)} ({self._reasons('refusal')})"
            )

    def mean(self) -> dict[str, NDArray]:
        """Return the mean of the models (eq. 2), in arrays that the caller may change.

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
        mean = self._mean.mean()
        self.contributions = contributions(self._weights, self.updates)
        return mean

    def _reasons(self, *kinds: str) -> str:
        left_out = [event for event in self.events if event.kind in kinds]
        return "; ".join(f"{event.participant}: {event.reason}" for event in left_out)


def as_weighting(value: object) -> Weighting:
    """Return `value` if it is a weighting.

    Raises
    ------
    ColearnError
        If `value` is anything else.
    """
    if value == "uniform" or value == "weighted":
        return value
    raise expected("weighting", "'uniform' or 'weighted'", value)


def check_private_weighting(weighting: Weighting) -> None:
    """Raise a ColearnError for weights that must not be used under differential privacy."""
    if weighting != "uniform":
        raise expected(
            "weighting under differential privacy",
            "'uniform', since the wrapper's noise is calibrated for a share of 1/K of every "
            "participant, and a site with more examples than others would have a larger one",
            weighting,
        )
