"""Stages: the three exchanges after a training, by which the server learns one sum."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from ..aggregation import check_structure, failure_of
from ..errors import ColearnError, expected
from ..grids import WrappingGrid
from ..records import records_of, view
from ..roles import Arrays, NDArray
from .layout import Layout
from .masks import Attempt
from .messages import MASK, SHARE, TOTALS, UNMASK, WORDS, answer_in, list_in, query_of
from .unmasking import Unmasking

LONGEST_POLL = 3.0
"""The longest pause between two polls for answers, in seconds."""

REQUESTS = 3
"""The number of times that the survivors are asked for shares, until enough have answered."""

Accept = Callable[[int, RecordDict], None]


class TooFewError(ColearnError):
    """Raised if too few participants are left, while nothing was unmasked."""


@dataclass(frozen=True)
class Trained:
    """A participant that has trained, and the keys in its reply."""

    node_id: int
    name: str
    key: bytes
    cipher: bytes


@dataclass
class Total:
    """The sum that was unmasked.

    Attributes
    ----------
    words : dict
        The sums of the models' words, by array.
    weight : int
        The sum of the weights.
    clipped : int
        The number of elements that participants clipped.
    metrics : list of int
        The sums of the words of metrics.
    survivors : list of int
        The numbers of the participants in the sum.
    """

    words: dict[str, NDArray]
    weight: int
    clipped: int
    metrics: list[int]
    survivors: list[int]


@dataclass
class Stages:
    """One attempt to sum the models of participants that have trained.

    A participant that fails, does not answer in time or sends what does not fit drops out. One that
    drops out before its vector has arrived is not in the sum, and a vector that arrives later is
    never pulled. At most one sum is unmasked.

    Attributes
    ----------
    grid : Grid
        Sends the messages.
    attempt : Attempt
        The attempt.
    members : sequence of Trained
        The participants, whose place is their number.
    threshold : int
        The number of shares that give a secret.
    least : int
        The number of participants that must be in the sum, at least the threshold.
    timeout : float
        The seconds within which a participant must answer a message.
    dropouts : dict
        The reasons of dropouts, by number.
    """

    grid: Grid
    attempt: Attempt
    members: Sequence[Trained]
    threshold: int
    least: int
    timeout: float
    dropouts: dict[int, str] = field(default_factory=dict)

    def total(self, layout: Layout, model: Arrays, metrics: list[str]) -> Total:
        """Return the sum of the participants' words.

        Raises
        ------
        TooFewError
            If too few participants are left, and nothing was unmasked.
        ColearnError
            If the sum cannot be unmasked any more.
        """
        unmasking = Unmasking(self.attempt, self.threshold, [each.key for each in self.members])
        sealed = self._shares(unmasking)
        words = layout.empty(model)
        totals = np.zeros(2 + 2 * len(metrics), np.uint64)
        survivors = self._vectors(sealed, {**words}, totals, metrics)
        self._unmask(unmasking, survivors, [*words.values(), totals])
        weight, clipped, *rest = (int(each) for each in totals.view(np.int64))
        if not len(survivors) <= weight <= len(survivors) * layout.largest_weight:
            raise expected("sum of the weights", f"at least {len(survivors)}", weight)
        return Total(words, weight, clipped, rest, survivors)

    # The stages ---------------------------------------------------------------------------------

    def _shares(self, unmasking: Unmasking) -> dict[int, list[bytes]]:
        """Return the encrypted shares of every participant that sent them."""
        sealed: dict[int, list[bytes]] = {}

        def accept(index: int, content: RecordDict) -> None:
            answer = answer_in(content, SHARE, self.attempt)
            shares, commitment = list_in(answer, "shares", bytes), answer.get("commitment")
            if len(shares) != len(self.members) or not isinstance(commitment, bytes):
                raise expected("shares", f"one for each of {len(self.members)}", len(shares))
            sealed[index], unmasking.commitments[index] = shares, commitment

        entries = {
            "keys": [each.key for each in self.members],
            "ciphers": [each.cipher for each in self.members],
            "names": [each.name for each in self.members],
            "threshold": self.threshold,
        }
        everyone = range(len(self.members))
        self._ask(SHARE, {index: {**entries, "index": index} for index in everyone}, accept)
        self._check_number(sealed)
        return sealed

    def _vectors(
        self,
        sealed: Mapping[int, list[bytes]],
        words: Arrays,
        totals: NDArray,
        metrics: list[str],
    ) -> list[int]:
        """Add the masked vectors that arrive to `words` and `totals`; return their senders."""
        survivors: list[int] = []

        def accept(index: int, content: RecordDict) -> None:
            answer_in(content, MASK, self.attempt)
            records = records_of(content, ArrayRecord)
            if set(records) != {WORDS, TOTALS}:
                raise expected("masked vector", f"records {WORDS} and {TOTALS}", sorted(records))
            vector, last = view(records[WORDS]), view(records[TOTALS])
            check_structure(vector, words)
            check_structure(last, {"totals": totals})
            for name, total in words.items():
                np.add(total, vector[name], out=total)
            np.add(totals, last["totals"], out=totals)
            survivors.append(index)

        requests = {
            index: {
                "senders": [sender for sender in sealed if sender != index],
                "shares": [sealed[sender][index] for sender in sealed if sender != index],
                "metrics": metrics,
            }
            for index in sealed
        }
        self._ask(MASK, requests, accept)
        self._check_number(survivors)
        return sorted(survivors)

    def _unmask(self, unmasking: Unmasking, survivors: list[int], sums: Iterable[NDArray]) -> None:
        """Ask the survivors for shares, and remove the masks from the sums, in place."""
        answered: set[int] = set()

        def accept(index: int, content: RecordDict) -> None:
            answer = answer_in(content, UNMASK, self.attempt)
            shares = (list_in(answer, key, bytes) for key in ("seeds", "private"))
            unmasking.add(survivors, *shares)
            answered.add(index)

        for _ in range(REQUESTS):
            waiting = [index for index in survivors if index not in answered]
            # The same question, so that no second sum can be unmasked by the answers.
            self._ask(UNMASK, {index: {"survivors": survivors} for index in waiting}, accept)
            if len(answered) >= self.threshold:
                break
        else:
            raise ColearnError(
                f"round {self.attempt.round}: expected shares of {self.threshold} participants to "
                f"unmask the sum, found {len(answered)} ({self._reasons()}). The models of this "
                "round are not summed again, since two sums could tell one model"
            )
        masks = unmasking.masks(survivors)
        for array in sums:
            masks.add_to(array)

    def _check_number(self, participants: Iterable[int]) -> None:
        count = len(list(participants))
        if count < self.least:
            raise TooFewError(
                f"round {self.attempt.round}: expected at least {self.least} participants in the "
                f"sum of models, found {count} ({self._reasons()})"
            )

    def _reasons(self) -> str:
        named = {self.members[index].name: reason for index, reason in self.dropouts.items()}
        return "; ".join(f"{name}: {reason}" for name, reason in named.items())

    # Messages -----------------------------------------------------------------------------------

    def _ask(self, stage: str, requests: Mapping[int, Mapping[str, Any]], accept: Accept) -> None:
        """Send a message to each participant, and give every reply's content to `accept`.

        Replies are pulled one at a time, so that one vector is in memory besides the sum.
        """
        log(INFO, "Secure aggregation: stage %s, %s participants", stage, len(requests))
        waiting = self._push(stage, requests)
        deadline, poll = time.monotonic() + self.timeout, 0.01
        while waiting:
            arrived = [each for each in list(waiting) if self._pull(each, waiting, accept)]
            if arrived:
                poll = 0.01
            elif time.monotonic() >= deadline:
                break
            else:
                time.sleep(poll)
                poll = min(1.5 * poll, LONGEST_POLL)
        for index in waiting.values():
            self._drop(index, f"no answer within {self.timeout:g} s")
        # A vector that arrives from now on is not pulled.
        if isinstance(self.grid, WrappingGrid):
            self.grid.forget(waiting)

    def _push(self, stage: str, requests: Mapping[int, Mapping[str, Any]]) -> dict[str, int]:
        """Send the messages; return the participants by the ids of their messages."""
        messages = {
            index: Message(
                query_of(stage, self.attempt, entries),
                self.members[index].node_id,
                MessageType.TRAIN,
                # Flower deletes the message, and a late reply, soon after nobody waits for them.
                ttl=2.0 * self.timeout + 60.0,
            )
            for index, entries in requests.items()
        }
        accepted = set(self.grid.push_messages(list(messages.values())))
        sent = {message.metadata.message_id: index for index, message in messages.items()}
        for message_id, index in sent.items():
            if message_id not in accepted:
                self._drop(index, "the message was not accepted")
        return {message_id: index for message_id, index in sent.items() if message_id in accepted}

    def _pull(self, message_id: str, waiting: dict[str, int], accept: Accept) -> bool:
        """Return whether a reply to a message has arrived, and process it."""
        for reply in self.grid.pull_messages([message_id]):
            if reply.metadata.reply_to_message_id != message_id:
                continue
            index = waiting.pop(message_id)
            try:
                failure = failure_of(reply)
                if failure is not None:
                    raise ColearnError(failure)
                accept(index, reply.content)
            except ColearnError as error:
                self._drop(index, str(error))
            return True
        return False

    def _drop(self, index: int, reason: str) -> None:
        self.dropouts[index] = reason
        name = self.members[index].name
        log(WARNING, "Secure aggregation: participant %s dropped out: %s", name, reason)
