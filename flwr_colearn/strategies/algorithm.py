"""The co-learning rule, apart from any Flower API: both strategies are thin layers over it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from logging import INFO, WARNING
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flwr.common import log

from ..aggregation.mean import Empty, RunningMean, empty_array, relative_change, trainable
from ..errors import ColearnError, expected, whole_number
from ..history import History, RoundRecord
from ..normalization.schemes import Normalization, Pooled, as_normalization
from ..plan import LocalPlan
from ..recovery.grid import Event
from ..roles import UNTRAINED, Arrays, NDArray, Role, Roles, assign_roles
from ..schedules import (
    EpochRule,
    ExponentialRate,
    LearningRate,
    as_epoch_rule,
    as_learning_rate,
)

Weighting = Literal["uniform", "weighted"]


@dataclass
class Progress:
    """All that the rule remembers from round to round, besides the last shared model."""

    round: int = 0
    local_epochs: int = 0
    epochs_done: int = 0
    seconds_per_epoch: float = 0.0


@dataclass
class _OpenRound:
    """A round under way: its record and the mean of what has arrived."""

    record: RoundRecord
    mean: RunningMean
    opened_at: float


class CoLearningRule:
    """Algorithm 1 of Mi et al. (2020), server side: plan, mean, relative change, next plan.

    A round is `open` (closing the one before), `fold` for every reply, `average`, `close`.

    Parameters
    ----------
    local_epochs : int or EpochRule
        T: ``IncreasingEpochs`` (ILE), ``FixedEpochs`` or a number (FLE).
    learning_rate : float or LearningRate
        ``CyclicalRate`` (CLR), ``ExponentialRate`` (ELR), ``ConstantRate`` or a number.
    weighting : {"uniform", "weighted"}
        Weights of the mean: 1/K each, or by number of examples.
    total_epochs : int, optional
        Budget: local epochs per participant after which the run ends.
    roles : mapping or sequence, optional
        See `flwr_colearn.Role`.
    history : str, Path or History, optional
        Where the rounds are recorded.
    normalization : Normalization, optional
        What the average does with normalization layers; by default `Pooled`.
    empty : callable, optional
        Gives the memory of the averages; see `RunningMean`.
    participants : int, default 256
        K, or more: how many models a round has at most.

    Raises
    ------
    ColearnError
        If an argument is not what it should be.
    """

    def __init__(
        self,
        local_epochs: int | EpochRule,
        learning_rate: float | LearningRate,
        weighting: Weighting = "uniform",
        total_epochs: int | None = None,
        roles: Roles = None,
        history: str | Path | History | None = None,
        normalization: Normalization = Pooled(),  # noqa: B008  (an immutable value)
        empty: Empty = empty_array,
        participants: int = 256,
    ) -> None:
        if weighting not in ("uniform", "weighted"):
            raise expected("weighting", "'uniform' or 'weighted'", weighting)
        if total_epochs is not None:
            whole_number("total_epochs", total_epochs, least=1)
        self.local_epochs = as_epoch_rule(local_epochs)
        self.learning_rate = as_learning_rate(learning_rate)
        if (
            isinstance(self.learning_rate, ExponentialRate)
            and total_epochs is not None
            and self.learning_rate.total_epochs != total_epochs
        ):
            raise expected(
                "total_epochs of ExponentialRate",
                f"the run's own total_epochs={total_epochs}",
                self.learning_rate.total_epochs,
            )
        self.weighting = weighting
        self.total_epochs = total_epochs
        self.history = history if isinstance(history, History) else History(history)
        self.progress = Progress()
        self.normalization = as_normalization(normalization)
        self._given_roles = roles
        self._empty = empty
        self._participants = participants
        self._roles: dict[str, Role] = {}
        self._open_round: _OpenRound | None = None
        self._sent: Arrays = {}
        self._mean: RunningMean | None = None
        self._measured: tuple[object, float] | None = None
        self._averaged = True

    @property
    def spent(self) -> bool:
        """Whether the budget of local epochs is used up."""
        return self.total_epochs is not None and self.progress.epochs_done >= self.total_epochs

    @property
    def under_way(self) -> bool:
        """Whether a round is open: false once the budget is spent.

        Raises
        ------
        ColearnError
            If no round was opened although the budget is not spent.
        """
        if self._open_round is None and self.spent:
            return False
        return self._round is not None

    @property
    def untrained(self) -> list[str]:
        """The names of the model's statistics and counters, once a round was opened."""
        return [name for name, role in self._roles.items() if role in UNTRAINED]

    @property
    def roles(self) -> Mapping[str, Role]:
        """What the average does with every array; empty before the first round."""
        return self._roles

    @property
    def order_matters(self) -> bool:
        """Whether the last bit of the mean depends on the order of the replies."""
        return any(array.dtype == np.float64 for array in self._sent.values())

    def open(self, server_round: int, arrays: Arrays) -> LocalPlan | None:
        """Begin a round from the shared model; ``None`` if the budget is spent.

        The model is compared with the one that the last round started from (eq. 4), so whatever
        a wrapper did to the average, such as adding noise, is what counts.

        Parameters
        ----------
        server_round : int
            From 1. A number not above the last one begins a new run.
        arrays : mapping of str to numpy.ndarray
            The shared model w^i.
        """
        if server_round <= self.progress.round:
            self.reset()
        self.close(arrays)
        if self.spent:
            return None
        local_epochs = self._next_local_epochs(arrays)
        done = self.progress.epochs_done
        plan = self._plan(server_round, local_epochs, done)
        if not self._roles:
            self._roles = self._assign_roles(arrays)
        self._sent, self._measured = arrays, None
        self.progress = replace(
            self.progress,
            round=server_round,
            local_epochs=local_epochs,
            epochs_done=done + plan.local_epochs,
        )
        record = RoundRecord(
            server_round, plan.local_epochs, plan.learning_rate, self.progress.epochs_done
        )
        self._open_round = _OpenRound(record, self._new_mean(arrays), time.perf_counter())
        return plan

    def reset(self) -> None:
        """Forget an earlier run."""
        self.progress, self._open_round = Progress(), None
        self._sent, self._measured, self._roles, self._mean = {}, None, {}, None
        self.history.clear()

    def fold(
        self,
        participant: str,
        arrays: Arrays,
        examples: float,
        size: int,
        checked: bool = False,
    ) -> bool:
        """Add one participant's model to the mean, or refuse it.

        Parameters
        ----------
        participant : str
            Whose model it is; named in the record.
        arrays : mapping of str to numpy.ndarray
            The model.
        examples : float
            Number of examples it was trained on, positive.
        size : int
            Bytes received.
        checked : bool, default False
            Whether `arrays` passed `check` already: once is enough for a large model.

        Returns
        -------
        bool
            False if the model was refused; log and record say why.
        """
        record = self._round.record
        record.bytes_up += size
        try:
            if participant in record.participants:
                raise ColearnError("expected one reply from each participant, found a second one")
            if not examples > 0:
                raise expected("number of examples", "a positive number", examples)
            add = self._round.mean.add_checked if checked else self._round.mean.add
            add(arrays, self.weight(examples))
        except ColearnError as error:
            self.refuse(participant, str(error))
            return False
        record.participants.append(participant)
        return True

    def check(self, arrays: Arrays, examples: float) -> None:
        """Raise a ColearnError unless the model can be folded, whatever the others are."""
        self._round.mean.check(arrays, self.weight(examples))

    def fold_all(self, models: Sequence[tuple[str, Arrays, float, int]]) -> list[bool]:
        """Do what `fold` does with each of these, in one pass over memory if none is refused.

        Parameters
        ----------
        models : sequence of (participant, arrays, examples, size)
            As for `fold`.

        Returns
        -------
        list of bool
            For each whether it is in the mean.
        """
        record = self._round.record
        names = [participant for participant, *_ in models]
        at_once = (
            len(set(names)) == len(names) > 1
            and not record.participants
            and all(examples > 0 for _, _, examples, _ in models)
            # Arrays in another order are copied, one model at a time if it is one by one.
            and all(a.flags.c_contiguous for _, arrays, _, _ in models for a in arrays.values())
        )
        if at_once:
            try:
                self._round.mean.add_all([(a, self.weight(n)) for _, a, n, _ in models])
            except ColearnError:
                at_once = False  # one by one it is found out whose model is at fault
        if not at_once:
            return [self.fold(*model) for model in models]
        record.bytes_up += sum(size for *_, size in models)
        record.participants.extend(names)
        return [True] * len(models)

    def weight(self, examples: float) -> float:
        """Return n_k of a participant with so many examples."""
        return 1 if self.weighting == "uniform" else examples

    def refuse(self, participant: str, reason: str) -> None:
        """Record that a participant's reply is left out of the average."""
        log(WARNING, "CoLearn: reply of participant %s refused: %s", participant, reason)
        self._round.record.refusals.append({"participant": participant, "reason": reason})

    def sent_down(self, size: int) -> None:
        """Count bytes of arrays sent to participants."""
        self._round.record.bytes_down += size

    def note_normalization(
        self, down: int = 0, up: int = 0, fresh: Iterable[str] = (), warning: str = ""
    ) -> None:
        """Record what the normalization scheme cost (or, below 0, saved) in bytes of arrays.

        Parameters
        ----------
        down, up : int
            Bytes sent to and received from participants, over what was counted before.
        fresh : iterable of str
            Participants that had lost their local arrays and began from the shared model's.
        warning : str
            What must be known of the shared model to read its evaluation.
        """
        record = self._round.record
        record.bytes_down += down
        record.bytes_up += up
        entry = record.normalization
        entry["scheme"] = self.normalization.name
        entry["bytes"] = entry.get("bytes", 0) + down + up
        entry["fresh"] = [*entry.get("fresh", []), *fresh]
        if warning:
            entry["shared-model"] = warning

    def average(self) -> dict[str, NDArray]:
        """Return the mean of the models folded in this round (eq. 2).

        Raises
        ------
        ColearnError
            If no participant's model arrived.
        """
        record, mean = self._round.record, self._round.mean
        if not mean.count:
            entries = record.refusals + record.absences
            reasons = "; ".join(f"{each['participant']}: {each['reason']}" for each in entries)
            raise ColearnError(
                f"round {record.round}: expected a model from at least one participant, "
                f"found none ({reasons or 'no replies before the timeout'})"
            )
        return mean.mean()

    @property
    def replied(self) -> list[str]:
        """The participants whose models are in the round's mean."""
        return self._round.record.participants

    def require(self, least: int) -> None:
        """Raise a ColearnError if fewer than `least` models are in the round's mean."""
        record = self._round.record
        if len(record.participants) < least:
            reasons = "; ".join(f"{r['participant']}: {r['reason']}" for r in record.refusals)
            raise ColearnError(
                f"round {record.round}: expected models of {least} participants, found "
                f"{len(record.participants)} ({reasons})"
            )

    def note_recovery(self, events: Iterable[Event]) -> None:
        """Record what a RecoveringGrid had to do in this round."""
        record = self._round.record
        lists = {
            "restart": record.restarts,
            "refusal": record.refusals,
            "absence": record.absences,
        }
        for event in events:
            lists[event.kind].append({"participant": event.participant, "reason": event.reason})
            record.bytes_up += event.size

    def note_seconds(self, seconds: float) -> None:
        """Learn from the slowest participant's seconds how long a local epoch takes."""
        if seconds > 0.0:
            epochs = self._round.record.local_epochs
            self.progress = replace(self.progress, seconds_per_epoch=seconds / epochs)

    def note(self, **metrics: Mapping[str, Any] | None) -> None:
        """Keep metrics (train_metrics=, evaluate_metrics=, server_metrics=) for the record."""
        if self._open_round is not None:
            for name, values in metrics.items():
                setattr(self._open_round.record, name, dict(values or {}))

    def close(self, arrays: Arrays) -> None:
        """Complete the record of the round under way, if any, and write it.

        Parameters
        ----------
        arrays : mapping of str to numpy.ndarray
            The shared model w^{i+1} that the round ended with.
        """
        if self._open_round is None:
            return
        record = self._open_round.record
        self._averaged = self._open_round.mean.count > 0
        record.relative_change = self._change(arrays) if self._averaged else None
        record.participants.sort()  # they arrived in any order
        record.seconds = round(time.perf_counter() - self._open_round.opened_at, 3)
        self._open_round = None
        self.history.append(record)

    def state(self) -> dict[str, Any]:
        """Return all that `restore` needs besides the model, as JSON can hold it."""
        return {
            "progress": asdict(self.progress),
            "relative-change": None if self._measured is None else repr(self._measured[1]),
            "records": [record.to_json() for record in self.history],
        }

    def restore(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Go on after the round that `state` was taken after.

        Parameters
        ----------
        state : mapping
            What `state` returned.
        arrays : mapping of str to numpy.ndarray
            The shared model after that round; the same object must be given to `open`.
        """
        self.reset()
        self.progress = Progress(**state["progress"])
        self.history.restore(RoundRecord.from_json(line) for line in state["records"])
        if state["relative-change"] is not None:
            self._roles = self._assign_roles(arrays)
            self._measured = arrays, float(state["relative-change"])

    def configuration(self) -> dict[str, str]:
        """Return what must be the same for a run to be resumed."""
        rate = self.learning_rate
        starts = [rate.start(i) for i in range(3)] if callable(getattr(rate, "initial", 0)) else ""
        return {
            "local epochs": str(self.local_epochs),
            "learning rate": f"function of the round: {starts}" if starts else str(rate),
            "weighting": self.weighting,
            "total epochs": str(self.total_epochs),
            "normalization": str(self.normalization),
        }

    def log_summary(self, write: Callable[[str], None]) -> None:
        """Write the settings as branches of Flower's strategy tree."""
        write("\t├──> Co-learning settings:")
        write(f"\t│\t├── Local epochs: {self.local_epochs}")
        write(f"\t│\t├── Learning rate: {self.learning_rate}")
        write(f"\t│\t├── Weighting: {self.weighting}")
        write(f"\t│\t├── Normalization: {self.normalization}")
        write(f"\t│\t└── Budget in local epochs: {self.total_epochs or 'none'}")

    @property
    def _round(self) -> _OpenRound:
        if self._open_round is None:
            raise ColearnError(
                "round: expected configure_train (configure_fit) before the aggregation, found none"
            )
        return self._open_round

    def _new_mean(self, arrays: Arrays) -> RunningMean:
        if self._mean is None:
            self._mean = RunningMean(arrays, self._roles, self._empty, self._participants)
        else:
            self._mean.renew(arrays)
        return self._mean

    def _assign_roles(self, arrays: Arrays) -> dict[str, Role]:
        roles = assign_roles(arrays, self._given_roles)
        self.normalization.check(arrays, roles)
        return self.normalization.roles(arrays, roles)

    def _next_local_epochs(self, arrays: Arrays) -> int:
        last = self.progress.local_epochs
        if not last:
            return int(self.local_epochs.initial)
        if not self._averaged:  # eq. 4 compares averages, and the last round brought none
            return last
        change = self._change(arrays)
        chosen = int(self.local_epochs.next(last, change))
        if chosen != last:
            log(INFO, "CoLearn: relative change %.4g, local epochs %s -> %s", change, last, chosen)
        return chosen

    def _plan(self, server_round: int, local_epochs: int, epochs_done: int) -> LocalPlan:
        rate = self.learning_rate
        planned = getattr(rate, "total_epochs", self.total_epochs)
        if self.total_epochs is not None:
            local_epochs = min(local_epochs, self.total_epochs - epochs_done)
        return LocalPlan(
            round=server_round,
            local_epochs=local_epochs,
            learning_rate=rate.start(server_round - 1),
            schedule=rate.kind,
            decay=getattr(rate, "decay", None),
            epochs_done=epochs_done,
            total_epochs=planned,
        )

    def _change(self, arrays: Arrays) -> float:
        """Relative change from the model sent last; measured once for the same arrays."""
        if self._measured is None or self._measured[0] is not arrays:
            new, old = trainable(arrays, self._roles), trainable(self._sent, self._roles)
            change = relative_change(new, old)
            self._measured = arrays, change
        return self._measured[1]
