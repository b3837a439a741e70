"""`Recalibrated` where the exchange of statistics fails at some of the participants."""

import re

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CoLearn,
    ColearnError,
    InProcessGrid,
    Quorum,
    Recalibrated,
    Recovery,
    participant_mod,
)

K = 4
MEAN, VARIANCE = "1.running_mean", "1.running_var"
MODEL = {
    "fc.weight": np.zeros(2, np.float32),
    "1.weight": np.ones(1, np.float32),
    MEAN: np.zeros(1, np.float32),
    VARIANCE: np.ones(1, np.float32),
}
TRAINED = {MEAN: 1.0, VARIANCE: 2.0}


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def pooled(*ks):
    """The statistics of participants k, by hand: means 10 k and variances k + 1, equal weights."""
    means, variances = [10.0 * k for k in ks], [k + 1.0 for k in ks]
    mean = sum(means) / len(ks)
    spread = sum((each - mean) ** 2 for each in means) / len(ks)
    return {MEAN: mean, VARIANCE: sum(variances) / len(ks) + spread}


class Sites:
    """Participants that add 1 to every array; `spoil` changes the answers to a recalibration."""

    def __init__(self, spoil=None, leave=None):
        self.spoil, self.leave, self.asked = spoil, leave, []
        app = ClientApp(mods=[participant_mod])
        app.train()(self.train)
        app.train("recalibrate")(self.recalibrate)
        self.grid = InProcessGrid(app, K)

    def train(self, message, context):
        k = context.node_config["partition-id"]
        arrays = {name: a.numpy() + np.float32(1) for name, a in message.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": k + 1})
        if k == K - 1:  # the last one to train
            for node in self.leave or ():
                self.grid.contexts.pop(node)
        return Message(RecordDict({"a": record(arrays), "m": metrics}), reply_to=message)

    def recalibrate(self, message, context):
        k = context.node_config["partition-id"]
        self.asked.append(k)
        arrays = {MEAN: np.array([10 * k], np.float32), VARIANCE: np.array([k + 1], np.float32)}
        metrics = MetricRecord({"num-examples": k + 1})
        content = RecordDict({"arrays": record(arrays), "metrics": metrics})
        if self.spoil is not None:
            self.spoil(k, content)
        return Message(content, reply_to=message)

    def run(self, recovery):
        strategy = CoLearn(
            K,
            local_epochs=1,
            learning_rate=0.1,
            normalization=Recalibrated(),
            recovery=recovery,
            fraction_evaluate=0.0,
        )
        result = strategy.start(self.grid, record(MODEL), num_rounds=1)
        arrays = {name: array.numpy() for name, array in result.arrays.items()}
        # Whatever becomes of the statistics, the weights are those of the training.
        assert arrays["fc.weight"].tolist() == [1.0, 1.0]
        assert {name: array.dtype for name, array in arrays.items()} == dict.fromkeys(MODEL, "f4")
        (of_round,) = strategy.history
        # Without recovery participants are not queried for their names.
        self.second = "partition-1" if recovery else "2"
        assert len(of_round.participants) == K
        return {name: float(arrays[name][0]) for name in (MEAN, VARIANCE)}, of_round


def replace_by(name, value):
    return lambda content: content["arrays"].update({name: Array(value)})


BAD = {
    "NaN": (replace_by(MEAN, np.array([np.nan], "f4")), f"'{MEAN}': expected finite numbers"),
    "negative": (replace_by(VARIANCE, np.array([-1], "f4")), f"'{VARIANCE}' of variances: exp.*-1"),
    "missing": (lambda content: content["arrays"].pop(VARIANCE), f"1 missing .*{VARIANCE}"),
    "shape": (replace_by(MEAN, np.ones(2, "f4")), rf"'{MEAN}': .*shape \(1,\), found .*\(2,\)"),
    "type": (replace_by(MEAN, np.ones(1)), f"'{MEAN}': expected float32 .*found float64"),
    "no examples": (lambda content: content["metrics"].update({"num-examples": 0}), "positive"),
    "no metrics": (lambda content: content.pop("metrics"), "one MetricRecord, found 0"),
    "no statistics": (lambda content: content.pop("arrays"), "one ArrayRecord, found 0"),
}
each_bad = pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
with_and_without_recovery = pytest.mark.parametrize(
    "recovery", [None, Recovery(max_restarts=1, pause=0.0, policy=Quorum(1))], ids=["none", "some"]
)


def test_statistics_are_pooled_with_equal_weights():
    found, of_round = Sites().run(Recovery())
    assert found == pytest.approx(pooled(0, 1, 2, 3))
    assert of_round.refusals == of_round.restarts == of_round.absences == []


@each_bad
@with_and_without_recovery
def test_a_bad_reply_is_refused_and_the_others_statistics_are_pooled(recovery, spoil, reason):
    sites = Sites(lambda k, content: k == 1 and spoil(content))
    found, of_round = sites.run(recovery)
    assert found == pytest.approx(pooled(0, 2, 3))
    assert {each["participant"] for each in of_round.refusals} == {sites.second}
    assert all(re.search(reason, each["reason"]) for each in of_round.refusals)


@each_bad
def test_without_a_good_reply_the_statistics_stay_those_of_the_training(spoil, reason):
    found, of_round = Sites(lambda k, content: spoil(content)).run(None)
    assert found == TRAINED
    assert sorted(each["participant"] for each in of_round.refusals) == ["1", "2", "3", "4"]
    assert all(re.search(reason, each["reason"]) for each in of_round.refusals)


@with_and_without_recovery
def test_a_node_that_left_after_the_training_is_not_asked(recovery):
    sites = Sites(leave=[2])
    found, of_round = sites.run(recovery)
    assert sites.asked == [0, 2, 3]
    assert found == pytest.approx(pooled(0, 2, 3))
    assert of_round.refusals == of_round.restarts == of_round.absences == []


@with_and_without_recovery
def test_if_all_have_left_the_statistics_stay_those_of_the_training(recovery):
    sites = Sites(leave=range(1, K + 1))
    found, of_round = sites.run(recovery)
    assert sites.asked == []
    assert found == TRAINED
    assert of_round.refusals == of_round.restarts == of_round.absences == []


def raising(failures):
    """Let participant 1 fail so many times."""
    left = [None] * failures

    def spoil(k, content):
        if k == 1 and left:
            left.pop()
            # Another error would be repeated only once, since it would be the same again.
            raise ConnectionError

    return spoil


def test_a_participant_that_fails_is_restarted_and_recorded():
    sites = Sites(raising(2))
    found, of_round = sites.run(Recovery(max_restarts=3, pause=0.0))
    assert found == pytest.approx(pooled(0, 1, 2, 3))
    assert sites.asked.count(1) == 3
    assert [each["participant"] for each in of_round.restarts] == ["partition-1"] * 2
    assert all("ConnectionError" in each["reason"] for each in of_round.restarts)
    assert of_round.refusals == of_round.absences == []


def test_a_participant_that_is_given_up_is_an_absence_in_the_record():
    sites = Sites(raising(99))
    found, of_round = sites.run(Recovery(max_restarts=2, pause=0.0, policy=Quorum(3)))
    assert found == pytest.approx(pooled(0, 2, 3))
    assert sites.asked.count(1) == 3
    assert [each["participant"] for each in of_round.absences] == ["partition-1"]
    assert "ConnectionError" in of_round.absences[0]["reason"]
    assert len(of_round.restarts) == 2


def test_under_the_policy_that_needs_all_one_that_is_lost_ends_the_run():
    with pytest.raises(
        ColearnError, match=r"at least 4 of 4, lost participant partition-1: .*Conn"
    ):
        Sites(raising(99)).run(Recovery(max_restarts=1, pause=0.0))


def test_without_recovery_a_participant_that_fails_is_left_out_and_recorded():
    found, of_round = Sites(raising(99)).run(None)
    assert found == pytest.approx(pooled(0, 2, 3))
    (refusal,) = of_round.refusals
    assert refusal["participant"] == "2"
    assert "ConnectionError" in refusal["reason"]
