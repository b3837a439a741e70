"""Fits: one round's trainings over Flower's legacy API, with restarts of participants that fail."""

import time
from collections.abc import Callable
from logging import WARNING
from threading import Lock
from typing import Any

from flwr.common import (
    Code,
    DisconnectRes,
    EvaluateIns,
    EvaluateRes,
    FitIns,
    FitRes,
    GetParametersIns,
    GetParametersRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ReconnectIns,
    log,
)

from ._flwr import ClientProxy
from .errors import ColearnError
from .policy import Recovery
from .traffic import Directions, Event, EventKind

Check = Callable[[str, FitRes], None]


class Fits:
    """The trainings of one round's participants, each repeated until its result can be averaged.

    The restarts happen inside ``ClientProxy.fit``, before the server calls ``aggregate_fit``. A
    subclass or a wrapper that filters or changes results in ``aggregate_fit`` therefore receives
    every result, and a result that it drops is not asked for again.

    Parameters
    ----------
    recovery : Recovery
        The limits of restarts; `patience` is not used.
    check : callable
        ``(participant, result) -> None``; raises `ColearnError` for a result that is refused.

    Attributes
    ----------
    began : set of str
        The participants that were asked to train.
    lost : dict
        The participants whose restarts are spent, with the reasons.
    seconds : dict
        The seconds of the successful attempt, by participant.
    bytes : Directions
        The bytes of the models of all attempts but each participant's first request and its
        accepted result, which the strategy counts.
    """

    def __init__(self, recovery: Recovery, check: Check) -> None:
        self.recovery = recovery
        self.began: set[str] = set()
        self.lost: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.bytes = Directions()
        self._check = check
        self._events: list[Event] = []
        # Flower calls the participants from threads.
        self._lock = Lock()

    def around(self, client: ClientProxy) -> ClientProxy:
        """Return a client whose `fit` is restarted when it fails."""
        return _RestartedClient(client, self)

    @property
    def events(self) -> list[Event]:
        """The restarts, refusals and absences, in the order of the participants' names."""
        return sorted(self._events, key=lambda event: event.participant)

    def fit(
        self, client: ClientProxy, ins: FitIns, timeout: float | None, group_id: int | None
    ) -> FitRes:
        """Return a participant's result, after restarts where it failed.

        Raises
        ------
        Exception
            That of the last attempt, if the restarts are spent. Flower then lists a failure.
        """
        self.began.add(client.cid)
        restarts = 0
        while True:
            began = time.monotonic()
            try:
                return self._attempt(client, ins, timeout, group_id, began)
            except Exception as error:  # Flower's grid raises errors of many types
                if restarts >= self._most_restarts:
                    self._lose(client.cid, error, restarts)
                    raise
                self._note("restart", client.cid, _reason(error))
            time.sleep(self.recovery.pause_before(restarts))
            restarts += 1
            self._count(down=size_of(ins.parameters))

    @property
    def _most_restarts(self) -> float:
        return float("inf") if self.recovery.restarts_for_ever else self.recovery.max_restarts

    def _attempt(
        self,
        client: ClientProxy,
        ins: FitIns,
        timeout: float | None,
        group_id: int | None,
        began: float,
    ) -> FitRes:
        result = client.fit(ins, timeout, group_id)
        if result.status.code is not Code.OK:
            raise ColearnError(f"{client.cid}: {result.status.message}")
        try:
            with self._lock:
                self._check(client.cid, result)
        except ColearnError as error:
            self._count(up=size_of(result.parameters))
            self._note("refusal", client.cid, str(error))
            raise
        self.seconds[client.cid] = time.monotonic() - began
        return result

    def _lose(self, participant: str, error: Exception, restarts: int) -> None:
        reason = f"{_reason(error)} (after {restarts} restarts)"
        self.lost[participant] = reason
        self._note("absence", participant, reason)

    def _note(self, kind: EventKind, participant: str, reason: str) -> None:
        event = Event(kind, participant, reason)
        self._events.append(event)
        log(WARNING, "Recovery: %s of participant %s: %s", kind, participant, event.reason)

    def _count(self, down: int = 0, up: int = 0) -> None:
        with self._lock:
            self.bytes = Directions(self.bytes.down + down, self.bytes.up + up)


class _RestartedClient(ClientProxy):
    """A ClientProxy around another one, whose `fit` is that of `Fits`."""

    def __init__(self, client: ClientProxy, fits: Fits) -> None:
        super().__init__(client.cid)
        self._client, self._fits = client, fits
        self.properties = client.properties

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner client, such as ``node_id``."""
        # Copying asks for attributes before there is an inner client.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._client, name)

    def fit(self, ins: FitIns, timeout: float | None, group_id: int | None) -> FitRes:
        """Train, with restarts."""
        return self._fits.fit(self._client, ins, timeout, group_id)

    def get_properties(
        self, ins: GetPropertiesIns, timeout: float | None, group_id: int | None
    ) -> GetPropertiesRes:
        """Return the properties of the inner client."""
        return self._client.get_properties(ins, timeout, group_id)

    def get_parameters(
        self, ins: GetParametersIns, timeout: float | None, group_id: int | None
    ) -> GetParametersRes:
        """Return the parameters of the inner client."""
        return self._client.get_parameters(ins, timeout, group_id)

    def evaluate(
        self, ins: EvaluateIns, timeout: float | None, group_id: int | None
    ) -> EvaluateRes:
        """Evaluate by the inner client."""
        return self._client.evaluate(ins, timeout, group_id)

    def reconnect(
        self, ins: ReconnectIns, timeout: float | None, group_id: int | None
    ) -> DisconnectRes:
        """Reconnect the inner client."""
        return self._client.reconnect(ins, timeout, group_id)


def size_of(parameters: Parameters) -> int:
    """Return the bytes of a model."""
    return sum(len(tensor) for tensor in parameters.tensors)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
