"""CompareAlone: a site's own model, trained on its data alone, against the shared model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.common import log

from clients.local_training import participant_files, site_seed
from clients.trainer import NDArray, Trainer, follow, restore, state_of
from flwr_colearn import LocalPlan
from flwr_colearn.schedules import LearningRate

ALONE = "colearn.alone"
"""The key in ``context.state`` of the state of a site's own model, and the prefix of its arrays."""

OWN, COMMON = "own", "common"
"""The test sets: examples that the site holds out, and a test set that all sites have."""

Tests = Mapping[str, Trainer]
"""By the name of a test set, the trainer that evaluates on it."""

_EXAMPLES = "num-examples"


@dataclass(frozen=True)
class AloneState:
    """A site's own model after a round, with all that its next epoch depends on.

    Attributes
    ----------
    session : str
        The training that the model belongs to.
    round : int
        The last round in which it was trained.
    epochs : int
        The local epochs of the rounds in which the site trained it.
    arrays : mapping
        What `clients.trainer.state_of` returns.
    """

    session: str
    round: int
    epochs: int
    arrays: Mapping[str, NDArray]

    @classmethod
    def of(cls, context: Context, session: str) -> "AloneState | None":
        """Return the state that a context stores for a session; None if there is none."""
        if ALONE not in context.state:
            return None
        kept = cast(ConfigRecord, context.state[ALONE])
        if kept["session"] != session:
            return None
        arrays = cast(ArrayRecord, context.state[f"{ALONE}.arrays"])
        return cls(
            session,
            cast(int, kept["round"]),
            cast(int, kept["epochs"]),
            {name: array.numpy() for name, array in arrays.items()},
        )

    def keep_in(self, context: Context) -> None:
        """Store the state in a participant's context."""
        context.state[ALONE] = ConfigRecord(
            {"session": self.session, "round": self.round, "epochs": self.epochs}
        )
        record = ArrayRecord({name: Array(array) for name, array in self.arrays.items()})
        context.state[f"{ALONE}.arrays"] = record


@dataclass(frozen=True)
class CompareAlone:
    """Train a model at each site on the site's data alone, and compare the shared model with it.

    In every round the site first trains the shared model, as without the comparison, and then its
    own model: for the same local epochs, over the same order of its data. The own model begins with
    the initial model of the run and never receives another. Its momentum carries over from round to
    round, as in a training without a server. After the round both models are evaluated.

    The own model is in ``context.state``, so that with a ``state-dir`` in the node config it
    survives a restart of the SuperNode and a resume of the server, and no epoch of a finished round
    is trained again. An interrupted round goes on after the last finished epoch. A site that has
    lost the model, or that joins after the first round, has no comparison: the log has a warning.

    Parameters
    ----------
    tests : callable, optional
        ``Context -> mapping``: the trainers by the name of the test set, `OWN` or `COMMON`. By
        default the ClientApp's trainer, which evaluates on the site's own examples.
    learning_rate : LearningRate, optional
        The schedule of the own model. By default it has the rates of the server's plan, so that
        nothing but the averaging differs between the models.
    """

    tests: Callable[[Context], Tests] | None = None
    learning_rate: LearningRate | None = None

    def train(
        self,
        trainer: Trainer,
        received: Mapping[str, NDArray],
        plan: LocalPlan,
        context: Context,
        seed: int,
        session: str,
    ) -> None:
        """Train the own model for the local epochs of a round, unless it has them already.

        Parameters
        ----------
        trainer : Trainer
            The trainer of the site; its weights are those of the own model afterwards.
        received : mapping
            The shared model of the message, which in the first round is the initial one.
        plan : LocalPlan
            The plan of the round.
        context : Context
            The participant's context.
        seed : int
            The run's seed.
        session : str
            The training that the message belongs to.
        """
        before = AloneState.of(context, session)
        if before is not None and before.round >= plan.round:
            return  # a repeated round
        if before is None and (plan.round > 1 or plan.epochs_done):
            _warn_of_lost(plan.round)
            return
        folder, name = participant_files(context)
        try:
            trainer.set_weights(received)
            if before is not None:
                restore(trainer, before.arrays)
            # A name that no participant can have, whose files are the shared model's.
            follow(self._own(plan), trainer, site_seed(seed, context), folder, f"{name}\0alone")
        # The comparison is no part of the run, which must not end or wait for it.
        except Exception:
            log(WARNING, "Alone: the training of this site's own model failed", exc_info=True)
            return
        epochs = plan.local_epochs + (before.epochs if before else 0)
        AloneState(session, plan.round, epochs, state_of(trainer)).keep_in(context)

    def evaluate(
        self,
        trainer: Trainer,
        shared: Mapping[str, NDArray],
        context: Context,
        session: str,
        server_round: int,
    ) -> dict[str, float]:
        """Evaluate both models, and write a table to the site's log.

        Returns
        -------
        dict
            By metric the values of the own model (``alone-accuracy``, on the common test set
            ``alone-common-accuracy``), those of the shared model on the common test set
            (``common-accuracy``), and ``alone-epochs``. Empty if there is no own model of this
            round or an earlier one.
        """
        state = AloneState.of(context, session)
        if state is None or state.round > server_round:
            why = "there is no own model" if state is None else "it has more epochs already"
            log(INFO, "Alone: no comparison in round %s, since %s", server_round, why)
            return {}
        tests = {OWN: trainer} if self.tests is None else self.tests(context)
        own = _weights_in(state.arrays)
        found = {
            name: Comparison(_measured(test, own), _measured(test, shared))
            for name, test in tests.items()
        }
        _log_table(found, server_round, state.epochs)
        return {"alone-epochs": state.epochs, **_metrics_of(found)}

    def _own(self, plan: LocalPlan) -> LocalPlan:
        """Return the plan of the own model for a round."""
        if self.learning_rate is None:
            return plan
        return LocalPlan.of(
            self.learning_rate, plan.round, plan.local_epochs, plan.epochs_done, plan.local_steps
        )


@dataclass(frozen=True)
class Comparison:
    """The metrics of both models on one test set.

    Attributes
    ----------
    alone, shared : mapping
        The metrics of the site's own model and of the shared one, by name.
    """

    alone: Mapping[str, float]
    shared: Mapping[str, float]

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Return metric, alone, shared and difference (shared - alone) of each metric of both."""
        return [
            (name, value, self.shared[name], self.shared[name] - value)
            for name, value in self.alone.items()
            if name != _EXAMPLES and name in self.shared
        ]


def _measured(trainer: Trainer, weights: Mapping[str, NDArray]) -> dict[str, float]:
    trainer.set_weights(weights)
    return trainer.evaluate()


def _weights_in(arrays: Mapping[str, NDArray]) -> dict[str, NDArray]:
    prefix = "weights/"
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _metrics_of(found: Mapping[str, Comparison]) -> dict[str, float]:
    """Return the metrics under the names that they have in a reply."""
    metrics = {}
    for test, comparison in found.items():
        infix = "" if test == OWN else f"{test}-"
        for name, alone, shared, _ in comparison.rows():
            metrics[f"alone-{infix}{name}"] = alone
            # The shared model's metrics on the own test set are those of the evaluation itself.
            if infix:
                metrics[f"{infix}{name}"] = shared
    return metrics


def _log_table(found: Mapping[str, Comparison], server_round: int, epochs: int) -> None:
    log(INFO, "Alone or shared, round %s (%s local epochs alone):", server_round, epochs)
    log(INFO, "\t%-8s %-16s %10s %10s %11s", "test", "metric", "alone", "shared", "difference")
    for test, comparison in found.items():
        for name, alone, shared, difference in comparison.rows():
            sign = "+" if difference > 0 or math.isnan(difference) else ""
            spelled = f"{sign}{difference:.4f}"
            log(INFO, "\t%-8s %-16s %10.4f %10.4f %11s", test, name, alone, shared, spelled)


def _warn_of_lost(server_round: int) -> None:
    log(
        WARNING,
        "Alone: expected this site's own model of the rounds before round %s, found none, so this "
        "site has no comparison in this run; a 'state-dir' in the SuperNode's node config keeps it",
        server_round,
    )
