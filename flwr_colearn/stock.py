"""Stock: what `flwr_colearn.run` needs for a strategy outside this package."""

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.common import log as write
from flwr.serverapp.strategy import Strategy

from ._flwr import is_private
from .aggregation import (
    RunningMean,
    ToldExamples,
    Update,
    Updates,
    arrays_of,
    check_echo,
    check_model,
    contributions,
    examples_of,
    lowered_weights,
    read_reply,
    relative_change,
    spectral_vectors,
    trainable,
)
from .errors import ColearnError
from .grids import is_closed
from .history import RoundLog, RoundRecord
from .managed import Managed
from .normalization import Average
from .policy import attempt_limit, guard_under, timed
from .records import cast_record, kind_of, number_in, records_of, to_record, types_of, view
from .recovery import too_few_in_process
from .roles import UNTRAINED, Arrays, NDArray, Role, assign_roles
from .stock_metrics import Kind, StockMetrics
from .strategy_state import chain_of
from .traffic import Event
from .transport import ConnectedGrid, Transport


class Stock(Managed[RoundLog]):
    """Records the rounds of a strategy outside this package, and pools its statistics.

    Such strategies treat a model's running means, variances and counters as weights: FedAvg
    averages variances, FedAdam applies its step to them, FedAvgM makes them negative. After each
    aggregation they are replaced by the pooled statistics of all replies, so that the strategy acts
    on trainable arrays only. The strategy receives counters as float64, since not every strategy
    can do arithmetic on integers. Statistics are not pooled with the scheme ``Average()``, nor
    under differential privacy, since pooled statistics would be without its noise. Arrays that stay
    with the participants, or that participants do not return, keep the values that were sent.

    Parameters
    ----------
    strategy : Strategy
        A strategy of any class.
    log : RoundLog
        The record and history of its rounds. A record's local epochs and learning rate are those of
        the train config's ``local-epochs`` and ``learning-rate``, 0 without them.
    """

    weighting = "weighted"

    def __init__(self, strategy: Strategy, log: RoundLog) -> None:
        self._strategy = strategy
        self.log = log
        self.transport = Transport()
        self._private = any(map(is_private, chain_of(strategy)))
        self._key = str(getattr(strategy, "weighted_by_key", "num-examples"))
        self._timeout = float("inf")
        self._roles: dict[str, Role] = {}
        self._sent: Arrays = {}
        self._sums: RunningMean | None = None
        self._updates: Updates | None = None
        self._guarded: Mapping[str, Any] | None = None
        self._measured: dict[int, Update] = {}
        self._told = ToldExamples()
        self._variances: list[str] = []
        self._record = ArrayRecord()
        self._epochs_done = 0
        self._weights_differ = False

    @property
    def roles(self) -> Mapping[str, Role]:
        """The role of every array in the average; empty before the first round."""
        return self._roles

    def begin(
        self,
        grid: ConnectedGrid,
        timeout: float,
        num_rounds: int | None,
        save: Callable[[int], None],
    ) -> None:
        """Begin a run, and reset the state of an earlier one."""
        self.transport = grid.transport
        wanted, found = getattr(self._strategy, "min_available_nodes", 0), list(grid.get_node_ids())
        # Flower's strategies would wait for ever.
        if is_closed(grid) and len(found) < wanted:
            raise too_few_in_process(wanted, len(found))
        self._timeout, self._roles, self._epochs_done = timeout, {}, 0
        self._weights_differ, self._updates, self._guarded = False, None, None
        self._told = ToldExamples()
        self.log.clear()

    def open(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> None:
        """Begin a round's record."""
        self._sent, self._record = view(arrays), arrays
        # Roles depend on names, shapes and types, which are the same in all rounds of a run.
        if not self._roles:
            scheme = self.transport.normalization
            roles = assign_roles(self._sent, self.transport.roles)
            scheme.check(self._sent, roles)
            self._variances = [name for name, role in roles.items() if role is Role.VARIANCE]
            self._roles = scheme.roles(self._sent, roles)
            self._warn_of_privacy()
        self._sums = self._sums_of(self._sent) if self._trains and not self._private else None
        epochs = int(number_in(config, "local-epochs"))
        self._epochs_done += epochs
        self._renew_updates(epochs)
        # "lr" is the key of Flower's own examples.
        rate = number_in(config, "learning-rate") or number_in(config, "lr")
        self.log.open(RoundRecord(server_round, epochs, rate, self._epochs_done))
        self.time_limit = attempt_limit(self._timeout)
        config.update(timed(self.time_limit))

    def check_reply(self, sent: Message, reply: Message) -> None:
        """Raise a ColearnError unless `reply` is a usable answer to the train message `sent`.

        The condition is that of the sum of statistics, so that a reply which could not be pooled is
        refused, and its participant restarted, before the strategy averages it.
        """
        if kind_of(sent) != MessageType.TRAIN:
            return
        check_echo(sent, reply)
        model, examples = read_reply(reply, self._key)
        # The strategy itself may send a model that cannot be summed; the replies to it need only be
        # like it, and finite.
        if self._sums is None:
            check_model(model, view(arrays_of(sent)))
        elif self._updates is None:
            self._sums.check(model, examples)
        else:
            update = self._updates.admitted(model, self._sums, examples)
            self._measured[_node(reply)] = update

    def _renew_updates(self, epochs: int) -> None:
        """Begin a round of the guard; a model that cannot be summed has none."""
        guard = guard_under(self.transport.applied_guard, self._private)
        self._measured = {}
        if self._updates is None and guard is not None and self._sums is not None:
            self._updates = Updates(guard, self._sums.weights)
            if self._guarded is not None:
                self._updates.restore(self._guarded)
        if self._updates is not None:
            self._updates.renew(self._sent, epochs)

    def admitted(self, replies: list[Message], name_of: Callable[[int], str]) -> list[Message]:
        """Return the replies without those beyond the guard's bound, which are recorded.

        With recovery all have been checked on arrival; without it this is the only check.
        """
        if self._updates is None or self._sums is None or self.transport.recovery is not None:
            return replies
        kept = []
        for reply in replies:
            try:
                if reply.has_content():
                    model, examples = read_reply(reply, self._key)
                    update = self._updates.admitted(model, self._sums, examples)
                    self._measured[_node(reply)] = update
                kept.append(reply)
            except ColearnError as error:
                name = name_of(_node(reply))
                write(WARNING, "Run: reply of participant %s refused: %s", name, error)
                self.log.note_events([Event("refusal", name, str(error))])
        return kept

    def _sums_of(self, model: Arrays) -> RunningMean | None:
        """Return a mean of models like this one; None if the model itself could not be summed."""
        sums = RunningMean(
            model,
            self._roles,
            variances=self._variances,
            rounded=not self.transport.compression.keeps_signs,
        )
        try:
            sums.check(model)
        except ColearnError:
            return None
        return sums

    def floats_of(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return the model for the strategy, with counters as float64, which is exact up to 2^53.

        Some strategies cannot do arithmetic on integers. The messages hold the original types.
        """
        counters = [name for name in self._roles if self._sent[name].dtype.kind != "f"]
        return cast_record(arrays, dict.fromkeys(counters, "float64") if self._trains else {})

    def metrics(self, kind: Kind, name_of: Callable[[int], str]) -> StockMetrics:
        """Return the treatment of the metrics in one of the strategy's aggregations."""
        innermost = list(chain_of(self._strategy))[-1]
        return StockMetrics(innermost, kind, self._key, name_of)

    def give_floats(self, replies: list[Message]) -> None:
        """Replace the models in replies by the form that the strategy receives."""
        for reply in replies:
            for key, record in list(records_of(reply.content, ArrayRecord).items()):
                reply.content[key] = self.floats_of(record)

    @property
    def _trains(self) -> bool:
        """Whether the model has weights; one of integers only, such as trees, is not changed."""
        return Role.TRAINABLE in self._roles.values()

    def arrived(self, replies: list[Message]) -> list["Arrived"]:
        """Return the statistics in replies, before the strategy's aggregation."""
        if self._private:
            self._warn_of_weights(replies)
            return []
        names, found = self._pooled_names(), []
        for reply in replies if names else []:
            try:
                model, examples = arrays_of(reply), examples_of(reply, self._key)
                given = self.floats_of(model)
                sent = {name: model[name] for name in names if name in model}
                found.append(Arrived(reply, sent, {n: given[n] for n in sent}, examples))
            # The strategy itself decides what it does with this reply; only the pool is without it.
            except ColearnError as error:
                write(WARNING, "Run: statistics of node %s left out: %s", _node(reply), error)
        return found

    def statistics_of(self, arrived: list["Arrived"]) -> dict[str, NDArray]:
        """Return the arrays that replace the strategy's own averages, computed from the replies.

        They are computed after the strategy's aggregation, so that an array that the strategy
        changed in a reply counts as changed.

        Statistics and counters are pooled. Arrays that stay with the participants, or that
        participants do not return, keep the values that were sent.
        """
        scheme, sent = self.transport.normalization, self._sent
        names = [] if self._private else self._pooled_names()
        pooled = self._pooled(names, arrived) if names else {}
        local = scheme.local(sent, self._roles) if scheme.is_local else []
        unreturned = scheme.not_returned(self.log.record.round, sent, self._roles)
        return {**pooled, **{name: sent[name] for name in (*local, *unreturned)}}

    def with_statistics(self, average: ArrayRecord, statistics: dict[str, NDArray]) -> ArrayRecord:
        """Return the strategy's average with these arrays in place of its own.

        Variances that the strategy itself made negative, as momentum does, are 0; not under
        differential privacy, whose noise is part of the model.
        """
        model = view(average)
        kept = [n for n in self._variances if n not in statistics and n in model]
        raised = {} if self._private else {n: np.maximum(model[n], 0) for n in kept}
        own = {**raised, **statistics}
        if not own:
            return average
        # Under `Average` the vectors of the strategy's own average stay.
        vectors = spectral_vectors({**model, **own}, self._roles, self._sent)
        ours = to_record({n: vectors.get(n, array) for n, array in own.items()})
        return ArrayRecord({n: ours.get(n, a) for n, a in average.items()})

    def _pooled_names(self) -> list[str]:
        if isinstance(self.transport.normalization, Average) or not self._trains:
            return []
        return [name for name, role in self._roles.items() if role in UNTRAINED]

    def _pooled(self, names: list[str], arrived: list["Arrived"]) -> dict[str, NDArray]:
        """Return these arrays, pooled over all replies."""
        like = {name: self._sent[name] for name in names}
        mean = RunningMean(
            like,
            {name: self._roles[name] for name in names},
            rounded=not self.transport.compression.keeps_signs,
        )
        for each in arrived:
            try:
                mean.add(each.passed_on(types_of(self._record)), each.examples)
            except ColearnError as error:
                node = _node(each.reply)
                write(WARNING, "Run: statistics of node %s left out: %s", node, error)
        return mean.mean() if mean.count else {}

    def fix_examples(self, replies: list[Message], name_of: Callable[[int], str]) -> None:
        """Put the number of examples that its sender stated first into every reply."""
        for name, (reply, stated) in self._stated(replies, name_of).items():
            first, warnings = self._told.fixed(name, stated)
            self._told.remember(name, first)
            self.log.note_events(warnings)
            if warnings:
                self._put_examples(reply, first)

    def bound_shares(self, replies: list[Message], name_of: Callable[[int], str]) -> None:
        """Lower the numbers of examples in replies to the guard's largest share."""
        guard = self.transport.applied_guard
        if guard is None or guard.largest_share == 1.0 or self._private:
            return
        stated = self._stated(replies, name_of)
        examples = {name: number for name, (_, number) in stated.items()}
        lowered, warnings = lowered_weights(examples, guard.largest_share)
        self.log.note_events(warnings)
        for name, weight in lowered.items():
            # Whole, since strategies may expect that of a number of examples.
            self._put_examples(stated[name][0], max(1, round(weight)))

    def _stated(
        self, replies: list[Message], name_of: Callable[[int], str]
    ) -> dict[str, tuple[Message, float]]:
        """Return the replies that state a number of examples, with it, by participant."""
        stated = {}
        for reply in replies:
            # The strategy itself decides what it does with a reply without a number.
            with suppress(ColearnError):
                stated[name_of(_node(reply))] = reply, examples_of(reply, self._key)
        return stated

    def _put_examples(self, reply: Message, examples: float) -> None:
        """Put a number of examples into a reply's metrics."""
        for metrics in records_of(reply.content, MetricRecord).values():
            metrics[self._key] = examples

    def note_training(self, names: list[str], metrics: MetricRecord | None) -> None:
        """Record the participants whose replies were aggregated, and the aggregated metrics."""
        self.log.record.participants = names
        self.log.note(train_metrics=metrics)

    def measure(self, arrays: ArrayRecord) -> None:
        """Record the relative change of the model, which is that of the trainable arrays."""
        # The same record object: the strategy returned no model, so there is no change to measure.
        if arrays is self._record:
            return
        new, old = trainable(view(arrays), self._roles), trainable(self._sent, self._roles)
        if new:  # a model of integers only has no weights
            self.log.record.relative_change = relative_change(new, old)

    def note_contributions(self, replies: list[Message], name_of: Callable[[int], str]) -> None:
        """Record the weights by number of examples, and norms and cosines of the updates."""
        stated = self._stated(replies, name_of)
        weights = {name: number for name, (_, number) in stated.items()}
        for name, (reply, _) in stated.items():
            if self._updates is not None and _node(reply) in self._measured:
                self._updates.accept(name, self._measured[_node(reply)])
        self.log.record.contributions = contributions(weights, self._updates)

    def close(self, arrays: ArrayRecord) -> None:
        """Complete the record of the round under way."""
        self.log.close(self.log.record.relative_change)

    def configuration(self) -> dict[str, str]:
        """Return the settings that a resumed run must have in common with the saved one."""
        return {
            "strategy": " around ".join(type(each).__name__ for each in chain_of(self._strategy)),
        }

    def own_state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, in types of JSON.

        Flower's strategies sample nodes with Python's global random generator, so the state
        contains that of the generator.
        """
        # A resumed run has no updates before its first training, and may be saved before that.
        guard = self._guarded if self._updates is None else self._updates.state()
        return {
            "epochs-done": self._epochs_done,
            "random": random.getstate(),
            "examples": self._told.state(),
            "guard": guard,
        }

    def restore_own_state(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `own_state` returned."""
        self._epochs_done = int(state["epochs-done"])
        self._guarded = state.get("guard")
        self._told.restore(state.get("examples", {}))
        # JSON has no tuples, and setstate takes nothing else.
        version, numbers, gauss = state["random"]
        random.setstate((version, tuple(numbers), gauss))

    def _warn_of_weights(self, replies: list[Message]) -> None:
        """Log a warning, once a run, if participants under differential privacy weigh differently.

        Whether the strategy weighs by this number at all is not known, so nothing is refused.
        """
        records = [r for reply in replies for r in records_of(reply.content, MetricRecord).values()]
        weights = [record[self._key] for record in records if self._key in record]
        if self._weights_differ or all(weight == weights[0] for weight in weights):
            return
        self._weights_differ = True
        write(
            WARNING,
            "Run: under differential privacy, expected the same '%s' from all participants, found "
            "%s to %s. The noise is calibrated for a share of 1/K of each, and a strategy that "
            "weighs by this number, as FedAvg does, gives one participant more. Let participants "
            "reply with the same number, or use CoLearn or Averaging(weighting='uniform').",
            self._key,
            min(weights),
            max(weights),
        )

    def _warn_of_privacy(self) -> None:
        untrained = [name for name, role in self._roles.items() if role in UNTRAINED]
        if self._private and untrained:
            warn_of_private_statistics(untrained)


@dataclass
class Arrived:
    """The statistics and counters of a reply, as they arrived and as the strategy was given them.

    Attributes
    ----------
    reply : Message
        The reply, which the strategy may change.
    sent, given : dict of str to flwr.app.Array
        The arrays that the participant sent, and the same as the strategy was given them.
    examples : float
        The number of examples.
    """

    reply: Message
    sent: dict[str, Array]
    given: dict[str, Array]
    examples: float

    def passed_on(self, types: Mapping[str, str]) -> dict[str, NDArray]:
        """Return the arrays, in these types, with the strategy's changes to them.

        Arrays that a strategy has removed, as FedMedian does to save memory, are those that
        arrived.
        """
        records = records_of(self.reply.content, ArrayRecord).values()
        now = {name: array for record in records for name, array in record.items()}
        changed = {n: now[n] for n, g in self.given.items() if n in now and now[n].data != g.data}
        return view(ArrayRecord({**self.sent, **cast_record(ArrayRecord(changed), types)}))


def warn_of_private_statistics(untrained: list[str]) -> None:
    """Log a warning about statistics and counters under a differential privacy wrapper."""
    write(
        WARNING,
        "CoLearn: the model holds batch-norm statistics or counters (%s, %s in all). A "
        "differential privacy wrapper takes them for weights: its noise makes variances "
        "negative, and counters drown the update's norm or end the run. Use a model "
        "without batch norm, or do not send them.",
        untrained[0],
        len(untrained),
    )


def _node(reply: Message) -> int:
    return reply.metadata.src_node_id
