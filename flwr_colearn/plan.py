"""LocalPlan: the local training of one round, as the server sends it to a participant."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .epoch_file import EpochFile, Load, Save
from .errors import ColearnError, expected, real_number, whole_number
from .schedules import LearningRate, rate_before, rates_of
from .site_files import state_path

EPOCHS, RATES, READ = "epochs-iterated", "rates-iterated", "plan-read"
"""The entries by which a participant states what it did with the plan."""


@dataclass
class PlanUse:
    """What a ClientApp did with the plan of one message.

    Attributes
    ----------
    read : bool
        Whether a plan was read from the config.
    iterations : list of list of float
        The learning rates of the epochs that each iteration of a plan has begun.
    """

    read: bool = False
    iterations: list[list[float]] = dataclasses.field(default_factory=list)

    def statement(self) -> dict[str, Any]:
        """Return the entries of the reply.

        They are those of the longest iteration: a ClientApp may iterate the plan once to list the
        rates, and once to train.
        """
        rates = max(self.iterations, key=len, default=[])
        # Flower's ConfigRecord cannot tell the type of an empty list.
        return {EPOCHS: len(rates), READ: self.read, **({RATES: list(rates)} if rates else {})}


_USE: ContextVar[PlanUse | None] = ContextVar("flwr_colearn_plan_use", default=None)


@contextmanager
def watched_plan() -> Iterator[PlanUse]:
    """Observe the plans that this thread reads within, and their iterations in any thread."""
    use = PlanUse()
    token = _USE.set(use)
    try:
        yield use
    finally:
        _USE.reset(token)


@dataclass(frozen=True)
class Epoch:
    """One local epoch.

    Attributes
    ----------
    index : int
        j, from 1 to T.
    learning_rate : float
        The learning rate to train it with.
    steps : int or None
        The number of mini-batches after which a shorter pass over the data ends; None for a whole
        pass. ``itertools.islice(batches, epoch.steps)`` are those of either.
    """

    index: int
    learning_rate: float
    steps: int | None = None


@dataclass(frozen=True)
class LocalPlan:
    """The local training of one round: T_i epochs, each with its learning rate.

    The server sends the plan in the train (fit) config; the participant reads and iterates it.

    Parameters
    ----------
    round : int
        The round, from 1 as Flower counts (``server-round``); the paper's i is ``round - 1``.
    local_epochs : int
        T_i, the number of passes over the participant's data.
    learning_rate : float
        eta^i, the rate from which the schedule starts.
    learning_rates : sequence of float, optional
        The rates of the epochs 1 .. T_i; by default all are eta^i.
    epochs_done : int, default 0
        The local epochs that every participant has done before this round.
    time_limit : float, optional
        The seconds after which a training counts as hanging; see `flwr_colearn.participant_mod`.
    session : str, optional
        The training that the round belongs to, which a resumed server has in common with the
        interrupted one. Plans of the same epochs are equal whatever their sessions.
    local_steps : int, optional
        The steps (mini-batches) of the round, the same for every participant, in place of T_i
        passes over its data. `over` makes local epochs of them.
    last_steps : int, optional
        The steps of the last local epoch, if that is a part of a pass; set by `over`.

    Raises
    ------
    ColearnError
        If a value lies outside its range, or there are not T_i rates. When the plan is iterated:
        if it asks for steps and `over` was not called.

    Examples
    --------
    The complete training loop of a participant::

        plan = LocalPlan.from_config(message.content["config"])
        for epoch in plan:
            train_one_epoch(model, data, epoch.learning_rate)

    That of a participant which also serves ``CoLearn(local_steps=...)``::

        for epoch in plan.over(len(batches)):
            train(model, itertools.islice(batches, epoch.steps), epoch.learning_rate)

    >>> from flwr_colearn import CyclicalRate
    >>> plan = LocalPlan.of(CyclicalRate(0.01, decay=0.25), round=1, local_epochs=2)
    >>> [epoch.learning_rate for epoch in plan]
    [0.005, 0.0025]
    """

    round: int
    local_epochs: int
    learning_rate: float
    learning_rates: tuple[float, ...] | None = None
    epochs_done: int = 0
    time_limit: float | None = None
    session: str | None = dataclasses.field(default=None, compare=False)
    local_steps: int | None = None
    last_steps: int | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "round": whole_number(_entry("round"), self.round, least=1),
            "local_epochs": whole_number(_entry("local_epochs"), self.local_epochs, least=1),
            "learning_rate": real_number(_entry("learning_rate"), self.learning_rate, least=0.0),
            "epochs_done": whole_number(_entry("epochs_done"), self.epochs_done, least=0),
        }
        plain["learning_rates"] = self._rates(plain["local_epochs"], plain["learning_rate"])
        if self.time_limit is not None:
            limit = real_number(_entry("time_limit"), self.time_limit, least=0.0)
            plain["time_limit"] = limit
        if self.session is not None:
            plain["session"] = str(self.session)
        if self.local_steps is not None:
            plain["local_steps"] = whole_number(_entry("local_steps"), self.local_steps, least=1)
        # Flower's ConfigRecord refuses numpy's numbers, so all values become Python's own.
        for field, value in plain.items():
            object.__setattr__(self, field, value)

    def _rates(self, local_epochs: int, learning_rate: float) -> tuple[float, ...]:
        if self.learning_rates is None:
            return (learning_rate,) * local_epochs
        name, given = _entry("learning_rates"), self.learning_rates
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise expected(name, "a list of numbers", given)
        rates = tuple(real_number(f"a rate of {name}", rate, least=0.0) for rate in given)
        if len(rates) != local_epochs:
            raise expected(name, f"one rate for each of the {local_epochs} local epochs", rates)
        return rates

    def __iter__(self) -> Iterator[Epoch]:
        """Yield the local epochs 1 .. T with their learning rates."""
        if self.local_steps is not None:
            raise ColearnError(
                f"plan: expected to be told the mini-batches of a pass over this participant's "
                f"data, since the server asks for {self.local_steps} steps in place of local "
                "epochs; iterate plan.over(len(batches)), and train epoch.steps batches of each"
            )
        assert self.learning_rates is not None
        begun: list[float] = []
        # A plan that was read in the ClientApp's thread may be iterated in another one.
        use = getattr(self, "_use", None) or _USE.get()
        if use is not None:
            use.iterations.append(begun)
        for index, rate in enumerate(self.learning_rates, 1):
            begun.append(rate)
            yield Epoch(index, rate, self.last_steps if index == self.local_epochs else None)

    def over(self, batches: int) -> "LocalPlan":
        """Return the plan of a participant with so many mini-batches in a pass over its data.

        A plan of local epochs is returned unchanged. Of one that asks for steps, T becomes
        ceil(steps / batches), the last pass may be shorter, and local epoch j has the rate at j / T
        of the round, between the server's rates in geometric proportion: for ``CyclicalRate`` that
        is eq. 3 with this T.

        Parameters
        ----------
        batches : int
            The mini-batches of a whole pass, at least 1.

        Examples
        --------
        >>> from flwr_colearn import CyclicalRate
        >>> plan = LocalPlan.of(CyclicalRate(0.16, decay=0.25), 1, local_epochs=1, local_steps=50)
        >>> [(round(epoch.learning_rate, 3), epoch.steps) for epoch in plan.over(40)]
        [(0.08, None), (0.04, 10)]
        """
        if self.local_steps is None:
            return self
        whole_number("mini-batches of a pass over the data", batches, least=1)
        whole, rest = divmod(self.local_steps, batches)
        passes = whole + bool(rest)
        own = dataclasses.replace(
            self,
            local_epochs=passes,
            learning_rates=tuple(self._rate_at(j, passes) for j in range(1, passes + 1)),
            local_steps=None,
            last_steps=rest or None,
        )
        own._watch(getattr(self, "_use", None))
        return own

    def _watch(self, use: PlanUse | None) -> None:
        """Have iterations of the plan, in any thread, noted in `use`."""
        object.__setattr__(self, "_use", use)  # no field, since plans of the same epochs are equal

    def _rate_at(self, epoch: int, passes: int) -> float:
        """Return the rate after epoch / passes of the round."""
        rates = (self.learning_rate, *(self.learning_rates or ()))
        before, within = divmod(epoch * self.local_epochs, passes)
        low, share = rates[before], within / passes
        if not within:
            return low
        high = rates[before + 1]
        if low > 0.0 and high > 0.0:
            return float(low ** (1.0 - share) * high**share)
        return low * (1.0 - share) + high * share  # rates of 0 have no geometric mean

    def resumable(
        self, state_dir: str | Path | None, save: Save, load: Load, name: str = "participant"
    ) -> Iterator[Epoch]:
        """Yield the local epochs that are left to train, and save the state after each.

        A participant that is interrupted in a round, and trains the round again, goes on after its
        last finished epoch. If every epoch has a seed of its own, the trained model has the bits of
        an uninterrupted round. The state of an earlier attempt is used if session, round, learning
        rates and the state at the beginning, which includes the received model, are the same.
        Otherwise it is removed, so that the state of a finished round is there until the next one
        begins. The last epoch is always trained, so that the loop has its results.

        If the file cannot be written or read, or is damaged, the log has a warning, and epochs are
        trained again.

        Parameters
        ----------
        state_dir : str, Path or None
            The participant's folder, ``context.node_config.get("state-dir")``. Without one all
            epochs are trained and nothing is saved.
        save : callable
            Returns all that a later epoch depends on, as numpy arrays by name: weights, the
            optimizer's state and, where there is one, the loss scale. It is called before the first
            epoch, after the received model is loaded, and after each epoch but the last.
        load : callable
            Restores a state that `save` returned.
        name : str
            The participant's name, if several participants have the same folder.

        Examples
        --------
        ::

            folder = context.node_config.get("state-dir")
            for epoch in plan.resumable(folder, save, load):
                seed = plan.epochs_done + epoch.index
                train_one_epoch(model, data, epoch.learning_rate, seed)
        """
        if not state_dir:
            yield from self
            return
        path = state_path(Path(state_dir), name, self.session or "", "epoch")
        what: tuple[Any, ...] = (self.session, self.round, self.learning_rates, self.epochs_done)
        if self.last_steps is not None:
            what += (self.last_steps,)
        file = EpochFile(path, repr(what))
        done = file.resume(save, load)
        for epoch in list(self)[done:]:
            yield epoch
            if epoch.index < self.local_epochs:
                file.keep(epoch.index, save)

    @classmethod
    def of(
        cls,
        schedule: LearningRate,
        round: int,
        local_epochs: int,
        epochs_done: int = 0,
        local_steps: int | None = None,
    ) -> "LocalPlan":
        """Return the plan of a round with the rates of a schedule.

        Parameters
        ----------
        schedule : LearningRate
            Any schedule.
        round, local_epochs, epochs_done, local_steps : int
            See `LocalPlan`. With `local_steps` the plan's `learning_rate` is the rate at which the
            round begins, from which `over` goes on.

        Raises
        ------
        ColearnError
            If the schedule returns anything but finite numbers of at least 0.
        """
        start, rates = rates_of(schedule, local_epochs, round - 1, epochs_done)
        if local_steps is not None:
            start = rate_before(schedule, local_epochs, round - 1, epochs_done)
        return cls(round, local_epochs, start, rates, epochs_done, local_steps=local_steps)

    def to_config(self) -> dict[str, Any]:
        """Return the plan as entries of a ``ConfigRecord``, unused optional ones left out.

        Returns
        -------
        dict
            The keys are in kebab-case: ``local-epochs`` (T_i) and ``learning-rate`` (eta^i) are one
            number each, and ``learning-rates`` is a list of T_i floats.
        """
        entries = {key: getattr(self, field) for field, key in _KEYS.items()}
        entries[_KEYS["learning_rates"]] = list(self.learning_rates or ())
        return {key: value for key, value in entries.items() if value is not None}

    def to_fit_config(self) -> dict[str, int | float | str]:
        """Return the plan as entries of the legacy fit config, which takes no lists.

        ``learning-rates`` is a string there, such as ``"[0.005, 0.0025]"``.
        """
        key = _KEYS["learning_rates"]
        return {**self.to_config(), key: json.dumps(list(self.learning_rates or ()))}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LocalPlan":
        """Read the plan from a train (fit) config.

        Parameters
        ----------
        config : Mapping
            A ``ConfigRecord`` (Message API) or the fit config's dict (NumPyClient). Keys that are
            not the plan's are ignored. A config that holds only ``server-round``, ``local-epochs``
            and ``learning-rate``, such as one written for FedAvg, is a plan of constant rate.

        Raises
        ------
        ColearnError
            If a required key is missing or a value is wrong; the message names the key.
        """
        # The other keys have defaults, so that a config written for FedAvg is a plan too.
        for field in ("round", "local_epochs", "learning_rate"):
            if _KEYS[field] not in config:
                raise ColearnError(
                    f"train config: expected the key '{_KEYS[field]}', found only "
                    f"{sorted(config)}. Does the server run flwr_colearn.CoLearn?"
                )
        values = {field: config[key] for field, key in _KEYS.items() if key in config}
        if isinstance(values.get("learning_rates"), str):
            values["learning_rates"] = _listed(values["learning_rates"])
        plan, use = cls(**values), _USE.get()
        if use is not None:
            use.read = True
            plan._watch(use)
        return plan


_KEYS = {
    "round": "server-round",
    "local_epochs": "local-epochs",
    "learning_rate": "learning-rate",
    "learning_rates": "learning-rates",
    "epochs_done": "epochs-done",
    "time_limit": "time-limit",
    "session": "session",
    "local_steps": "local-steps",
}


def _entry(field: str) -> str:
    return f"'{_KEYS[field]}' in the train config"


def _listed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise expected(_entry("learning_rates"), "a list of numbers", text) from None
