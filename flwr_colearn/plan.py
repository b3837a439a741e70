"""LocalPlan: what one round asks of one participant, and all that server and participant share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ColearnError, decay_factor, expected, real_number, whole_number
from .schedules import ConstantRate, CyclicalRate, ExponentialRate, LearningRate


@dataclass(frozen=True)
class Epoch:
    """One local epoch: `index` j from 1 to T, and the learning rate to train it with."""

    index: int
    learning_rate: float


@dataclass(frozen=True)
class LocalPlan:
    """The local training of one round: T_i epochs from the rate eta^i downwards.

    The server sends it in the train (fit) config; the participant reads it back and iterates it.

    Parameters
    ----------
    round : int
        The round, from 1 as Flower counts (``server-round``); the paper's i is ``round - 1``.
    local_epochs : int
        T_i, full passes over the participant's data.
    learning_rate : float
        eta^i, the rate that the schedule starts from.
    schedule : str, default "constant"
        "cyclical" (eq. 3), "exponential" or "constant".
    decay : float, optional
        r of the schedule; required by "cyclical" and "exponential".
    epochs_done : int, default 0
        Local epochs that every participant has done before this round.
    total_epochs : int, optional
        Local epochs planned for the whole run; required by "exponential".
    time_limit : float, optional
        Seconds after which a participant that is still training counts as hanging; see
        `flwr_colearn.participant_mod`.

    Raises
    ------
    ColearnError
        If a value lies outside its range.

    Examples
    --------
    The whole of a participant's loop::

        plan = LocalPlan.from_config(message.content["config"])
        for epoch in plan:
            train_one_epoch(model, data, epoch.learning_rate)

    >>> [epoch.learning_rate for epoch in LocalPlan(1, 2, 0.01, "cyclical", decay=0.25)]
    [0.005, 0.0025]
    """

    round: int
    local_epochs: int
    learning_rate: float
    schedule: str = ConstantRate.kind
    decay: float | None = None
    epochs_done: int = 0
    total_epochs: int | None = None
    time_limit: float | None = None

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {
            "round": whole_number(_entry("round"), self.round, least=1),
            "local_epochs": whole_number(_entry("local_epochs"), self.local_epochs, least=1),
            "learning_rate": real_number(_entry("learning_rate"), self.learning_rate, least=0.0),
            "epochs_done": whole_number(_entry("epochs_done"), self.epochs_done, least=0),
        }
        if self.schedule not in _NEEDS:
            raise expected(
                _entry("schedule"),
                f"one of {', '.join(_NEEDS)} (is flwr-colearn the same version on both sides?)",
                self.schedule,
            )
        needed = _NEEDS[self.schedule]
        if "decay" in needed or self.decay is not None:
            plain["decay"] = decay_factor(_entry("decay"), self.decay)
        if "total_epochs" in needed or self.total_epochs is not None:
            total = whole_number(_entry("total_epochs"), self.total_epochs, least=1)
            plain["total_epochs"] = total
        if self.time_limit is not None:
            limit = real_number(_entry("time_limit"), self.time_limit, least=0.0)
            plain["time_limit"] = limit
        for field, value in plain.items():  # numpy's numbers cannot be sent: plain ones instead
            object.__setattr__(self, field, value)

    def __iter__(self) -> Iterator[Epoch]:
        """Yield the local epochs 1 .. T with their learning rates."""
        rate = self.rate
        for j in range(1, self.local_epochs + 1):
            yield Epoch(j, rate.at(j, self.local_epochs, epochs_done=self.epochs_done))

    @property
    def rate(self) -> LearningRate:
        """The schedule of this round, as a value."""
        if self.schedule == CyclicalRate.kind:
            assert self.decay is not None
            return CyclicalRate(self.learning_rate, self.decay)
        if self.schedule == ExponentialRate.kind:
            assert self.decay is not None
            assert self.total_epochs is not None
            return ExponentialRate(self.learning_rate, self.decay, self.total_epochs)
        return ConstantRate(self.learning_rate)

    def to_config(self) -> dict[str, int | float | str]:
        """Return the plan as entries of a Flower config, unused optional ones left out.

        Returns
        -------
        dict
            kebab-case keys, ``local-epochs`` and ``learning-rate`` among them, with plain int,
            float and str values, as both ``ConfigRecord`` and the legacy fit config accept.
        """
        entries = {key: getattr(self, field) for field, key in _KEYS.items()}
        return {key: value for key, value in entries.items() if value is not None}

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
        for field in ("round", "local_epochs", "learning_rate"):
            if _KEYS[field] not in config:
                raise ColearnError(
                    f"train config: expected the key '{_KEYS[field]}', found only "
                    f"{sorted(config)}. Does the server run flwr_colearn.CoLearn?"
                )
        return cls(**{field: config[key] for field, key in _KEYS.items() if key in config})


_KEYS = {
    "round": "server-round",
    "local_epochs": "local-epochs",
    "learning_rate": "learning-rate",
    "schedule": "learning-rate-schedule",
    "decay": "learning-rate-decay",
    "epochs_done": "epochs-done",
    "total_epochs": "total-epochs",
    "time_limit": "time-limit",
}
_NEEDS: dict[str, tuple[str, ...]] = {
    CyclicalRate.kind: ("decay",),
    ExponentialRate.kind: ("decay", "total_epochs"),
    ConstantRate.kind: (),
}


def _entry(field: str) -> str:
    return f"'{_KEYS[field]}' in the train config"
