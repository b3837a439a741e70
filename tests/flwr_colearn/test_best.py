"""Best: the best shared model beside the last, and the early end of a run."""

import copy
import json
import math
import pickle
import re
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Result,
)
from hypothesis import given
from hypothesis import strategies as st

from flwr_colearn import (
    Averaging,
    Best,
    ColearnError,
    CyclicalRate,
    DynamicAveraging,
    FixedEpochs,
    History,
    InProcessGrid,
    RunResult,
    SynchronousSGD,
    run,
)
from flwr_colearn.best import BestSoFar
from tests.faults import MODEL, K, bits, numpy_of, participants, record_of, strategy_of

NAN, INF = math.nan, math.inf
PLAN = {"local-epochs": 1, "learning-rate": 0.2}
MISSING = None


def values(*numbers, name="score"):
    """An evaluate_fn with these values in rounds 0, 1, ...; None is no metric."""

    def evaluate(server_round, arrays):
        number = numbers[server_round] if server_round < len(numbers) else numbers[-1]
        evaluate.models.append(bits(arrays))
        return None if number is MISSING else MetricRecord({name: number})

    evaluate.models = []
    return evaluate


def start(evaluate, rounds=6, strategy=None, **arguments):
    """Run co-learning, or another strategy, with the evaluations of `values`."""
    return run(
        strategy or strategy_of(local_epochs=FixedEpochs(1)),
        InProcessGrid(participants(), K),
        record_of(MODEL),
        rounds,
        train_config=ConfigRecord(PLAN if strategy else {}),
        evaluate_fn=evaluate,
        **arguments,
    )


# Which model is the best ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("best", "numbers", "expected"),
    [
        (Best("score"), [0.1, 0.5, 0.9, 0.2, 0.8], 2),
        (Best("score", "min"), [0.4, 0.5, 0.9, 0.2, 0.8], 3),
        (Best("score"), [0.9, 0.5, 0.8, 0.2, 0.8], 0),  # the initial model
        (Best("score"), [0.1, 0.5, 0.5, 0.5, 0.4], 1),  # the first of equal ones
        (Best("score"), [NAN, 0.5, NAN, 0.7, NAN], 3),
        (Best("score"), [0.1, INF, 0.2, -INF, 0.1], 2),
        (Best("score", "min"), [0.3, -INF, 0.2, INF, 0.3], 2),
        (Best("score"), [MISSING, MISSING, 0.5, MISSING, 0.4], 2),
        (Best("score"), [-3, -2, -7, -2, -4], 1),  # integers, all of them negative
    ],
)
def test_the_best_model_is_kept_beside_the_last(best, numbers, expected):
    evaluate = values(*numbers)
    result = start(evaluate, len(numbers) - 1, best=best)
    assert len({repr(model) for model in evaluate.models}) == len(numbers)
    assert (result.best.round, result.best.value) == (expected, numbers[expected])
    assert result.best.metric == "score"
    assert bits(result.best.arrays) == evaluate.models[expected]
    assert bits(result.arrays) == evaluate.models[-1]
    assert result.stopped == ""


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("accuracy", "max"), ("loss", "min"), ("eval_loss", "min"), ("Top1-Error", "min")],
)
def test_the_mode_is_known_by_the_name_and_may_be_given(metric, mode):
    assert Best(metric).mode == mode
    assert Best(metric, "max").mode == "max"
    assert Best(metric, mode="min").mode == "min"


def test_the_metric_may_be_that_of_the_participants():
    # Their accuracy is the same in all rounds, so the first round has the best model.
    result = start(None, 3, best=Best("accuracy", source="participants"))
    assert result.best.round == 1
    assert result.best.value == dict(result.evaluate_metrics_clientapp[1])["accuracy"]


def test_the_servers_metric_goes_before_that_of_the_participants():
    numbers = [0.001, 0.002, 0.004, 0.003]
    result = start(values(*numbers, name="accuracy"), 3, best=Best("accuracy"))
    assert (result.best.round, result.best.value) == (2, 0.004)
    result = start(
        values(*numbers, name="accuracy"), 3, best=Best("accuracy", source="participants")
    )
    assert (result.best.round, result.best.value) == (1, 0.203125)


def test_values_of_two_sources_are_never_compared():
    # Only the server evaluates in the rounds 0 and 3; the participants' value is larger always.
    result = start(
        values(0.001, MISSING, MISSING, 0.002, name="accuracy"), 3, best=Best("accuracy")
    )
    assert (result.best.round, result.best.value) == (3, 0.002)


def test_changes_of_the_evaluated_record_do_not_reach_the_best_model():
    seen = []

    def evaluate(server_round, arrays):
        seen.append(arrays)
        return MetricRecord({"score": -server_round})

    result = start(evaluate, 2, best=Best("score"))
    seen[0].clear()
    assert bits(result.best.arrays) == bits(record_of(MODEL))


# A reference written apart ----------------------------------------------------------------------


def by_hand(numbers, mode, patience):
    """The best round and the last one, by a search over the whole list for every prefix."""
    pick = max if mode == "max" else min
    finite = {i: x for i, x in enumerate(numbers) if x is not MISSING and math.isfinite(x)}
    for last in range(len(numbers)):
        seen = {i: x for i, x in finite.items() if i <= last}
        top = min((i for i in seen if seen[i] == pick(seen.values())), default=None)
        after = [
            i for i in range(1, last + 1) if numbers[i] is not MISSING and (top is None or i > top)
        ]
        if patience is not None and len(after) >= patience:
            break
    return top, last


@given(
    numbers=st.lists(st.sampled_from([MISSING, NAN, INF, -INF, 0.0, 1.0, 2.0, 3.0]), min_size=2),
    mode=st.sampled_from(["max", "min"]),
    patience=st.none() | st.integers(1, 4),
    killed=st.integers(0, 20),
)
def test_it_is_the_search_over_all_values_also_when_it_is_restored(numbers, mode, patience, killed):
    top, last = by_hand(numbers, mode, patience)
    rule = Best("score", mode, patience)
    tracker, done = BestSoFar(rule), 0
    for index, number in enumerate(numbers):
        arrays = record_of({"w": np.array([index])})
        metrics = None if number is MISSING else {"score": number}
        tracker.observe(index, arrays, metrics, None)
        done = index
        if index == killed:
            saved = json.loads(json.dumps(tracker.state(), allow_nan=False)), tracker.arrays()
            tracker = BestSoFar(rule)
            tracker.restore(*saved)
        if tracker.reason:
            break
    assert done == last
    found = tracker.model
    assert (None if found is None else found.round) == top
    if top is not None:
        assert found.value == numbers[top]
        assert numpy_of(found.arrays)["w"].tolist() == [top]


# The early end ----------------------------------------------------------------------------------


def test_a_run_without_improvement_ends_and_says_why(flower_log, tmp_path):
    history = tmp_path / "history.jsonl"
    evaluate = values(0.1, 0.5, 0.4, 0.5, NAN, 0.9)
    result = start(evaluate, 9, best=Best("score", patience=3), history=history)
    reason = "'score' (max) has not improved in the last 3 evaluations: the best is 0.5, of round 1"
    assert result.stopped == reason
    assert (result.best.round, len(evaluate.models)) == (1, 5)
    assert f"Run: stopped early after round 4: {reason}" in flower_log.text
    assert [record.stopped for record in History.read(history)] == ["", "", "", reason]


def test_rounds_without_the_metric_do_not_count():
    evaluate = values(0.5, MISSING, 0.4, MISSING, MISSING, 0.3, MISSING, 0.9)
    result = start(evaluate, 9, best=Best("score", patience=2))
    assert len(evaluate.models) == 6
    assert result.best.round == 0


def test_an_improvement_resets_the_patience():
    evaluate = values(0.1, 0.05, 0.2, 0.1, 0.3, 0.2, 0.1, 0.9)
    result = start(evaluate, 9, best=Best("score", patience=2))
    assert (result.best.round, len(evaluate.models)) == (4, 7)
    assert result.stopped


def test_a_diverged_model_ends_the_run_but_not_before_it_has_begun():
    evaluate = values(NAN)
    result = start(evaluate, 9, best=Best("score", patience=2))
    assert len(evaluate.models) == 3
    assert "none was finite" in result.stopped
    assert result.best is None


def test_patience_that_ends_with_the_last_round_is_no_early_end():
    result = start(
        values(0.5, 0.4, 0.3), 2, best=Best("score", patience=2), history=(h := History())
    )
    assert result.stopped == ""
    assert [record.stopped for record in h] == ["", ""]


def test_without_patience_no_run_ends_early():
    assert len(start(values(0.9, 0.1), 4, best=Best("score")).evaluate_metrics_serverapp) == 5


def test_a_budget_and_patience_end_whichever_is_first():
    for patience, rounds in ((2, 2), (9, 4)):
        strategy = strategy_of(local_epochs=FixedEpochs(1), total_epochs=4)
        result = strategy.start(
            InProcessGrid(participants(), K),
            record_of(MODEL),
            evaluate_fn=values(0.9, 0.1),
            best=Best("score", patience=patience),
        )
        assert len(strategy.history) == rounds
        assert bool(result.stopped) is (rounds < 4)


# Messages about a metric that is not there ------------------------------------------------------


@pytest.mark.parametrize(
    ("evaluate", "metric", "found"),
    [
        (values(0.5), "acc", r"\['accuracy', 'score'\]"),  # a spelling mistake
        (values([0.1, 0.2]), "score", r"\['accuracy', 'score'\]"),  # no single number
    ],
)
def test_a_metric_that_is_never_there_is_said_once_and_at_the_end(
    evaluate, metric, found, flower_log
):
    result = start(evaluate, 3, best=Best(metric, patience=1))
    assert (result.best, len(evaluate.models)) == (None, 4)
    first = rf"to have the metric '{metric}' as a number, found (\['score'\]|{found})"
    assert len(re.findall(first, flower_log.text)) == 1
    last = f"no evaluation of this run had a finite '{metric}'"
    assert flower_log.text.count(last) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": ""}, "metric of Best: expected the name"),
        ({"metric": 3}, "metric of Best: expected the name"),
        ({"metric": "a", "mode": "maximum"}, "mode of Best: expected 'max' or 'min'"),
        ({"metric": "a", "patience": 0}, "patience of Best: expected a whole number of at least 1"),
        ({"metric": "a", "patience": 2.5}, "patience of Best: expected a whole number"),
        ({"metric": "a", "source": "site"}, "source of Best: expected 'server'"),
    ],
)
def test_impossible_settings_are_refused(arguments, message):
    with pytest.raises(ColearnError, match=message):
        Best(**arguments)


def test_anything_else_is_refused_before_the_first_round():
    evaluate = values(0.5)
    with pytest.raises(ColearnError, match=r"best: expected Best\(metric\) or None, found 'score'"):
        start(evaluate, best="score")
    assert evaluate.models == []


# Any strategy -----------------------------------------------------------------------------------


STRATEGIES = {
    "FedAvg": lambda: FedAvg(),
    "FedAdam": lambda: FedAdam(eta=0.01),
    "Krum": lambda: Krum(num_malicious_nodes=0),
    "Averaging": lambda: Averaging(K),
    "CoLearn": lambda: strategy_of(),
    "privacy": lambda: DifferentialPrivacyServerSideFixedClipping(
        strategy_of(), noise_multiplier=0.1, clipping_norm=1.0, num_sampled_clients=K
    ),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_has_its_best_model_and_ends_early(make):
    evaluate = values(0.1, 0.2, 0.9, 0.3, 0.4, 0.5)
    result = start(evaluate, 9, make(), best=Best("score", patience=2))
    assert len(evaluate.models) == 5
    assert bits(result.best.arrays) == evaluate.models[2]
    assert bits(result.arrays) == evaluate.models[4]


def test_dynamic_averaging_has_it_too():
    from tests.flwr_colearn.dynamic.test_strategy import grid_of, zeros

    evaluate = values(0.1, 0.2, 0.9, 0.3, 0.4)
    strategy = DynamicAveraging(0.01, num_learners=3)
    result = strategy.start(
        grid_of(3), zeros(), 9, evaluate_fn=evaluate, best=Best("score", patience=2)
    )
    assert len(evaluate.models) == 5
    assert bits(result.best.arrays) == evaluate.models[2]
    assert result.stopped
    assert [record.stopped for record in strategy.history] == ["", "", "", result.stopped]


def test_synchronous_sgd_has_it_too():
    strategy = SynchronousSGD(K, learning_rate=CyclicalRate(0.1))
    result = strategy.start(
        InProcessGrid(participants(lambda k, plan, arrays: arrays), K),
        record_of(MODEL),
        9,
        evaluate_fn=values(0.1, 0.2, 0.1),
        best=Best("score", patience=1),
    )
    assert (result.best.round, len(strategy.history)) == (1, 2)


# Flower's Result --------------------------------------------------------------------------------


def test_the_result_is_flowers_with_two_fields_more():
    result = start(values(0.1, 0.2), 1, best=Best("score", patience=1))
    assert isinstance(result, Result)
    assert {f.name for f in fields(RunResult)} == {f.name for f in fields(Result)} | {
        "best",
        "stopped",
    }
    assert repr(result).startswith(Result.__repr__(result))
    assert "round 1, 'score' 2.0000e-01" in repr(result)
    for same in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert bits(same.best.arrays) == bits(result.best.arrays)
        assert same.best.value == 0.2


def test_without_it_nothing_is_added():
    result = start(values(0.1, 0.2), 1)
    assert (result.best, result.stopped) == (None, "")
    assert repr(result) == Result.__repr__(result)
    plain = start(values(0.1, 0.2), 1, best=Best("score"))
    assert bits(plain.arrays) == bits(result.arrays)


def test_the_result_of_an_error_has_the_best_model_so_far():
    def evaluate(server_round, arrays):
        if server_round == 3:
            raise OSError("no test set")
        return MetricRecord({"score": -abs(server_round - 1)})

    with pytest.raises(OSError, match="no test set") as caught:
        start(evaluate, best=Best("score"))
    assert caught.value.result.best.round == 1


# Resume -----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The server's process ends here."""


def killed_in(numbers, round_):
    evaluate = values(*numbers)

    def killing(server_round, arrays):
        if server_round == round_:
            raise Killed
        return evaluate(server_round, arrays)

    return killing


@pytest.mark.parametrize("kill", range(5))
@pytest.mark.parametrize(
    "strategy", [lambda: None, lambda: FedAdam(eta=0.01)], ids=["ours", "Flower"]
)
def test_a_run_killed_in_an_evaluation_keeps_its_best_model(strategy, kill, tmp_path):
    numbers = [0.1, 0.5, 0.3, 0.4, 0.2, 0.9]
    rule = Best("score", patience=3)
    whole = start(values(*numbers), 9, strategy(), best=rule)
    with pytest.raises(Killed):
        start(killed_in(numbers, kill), 9, strategy(), best=rule, checkpoints=tmp_path)
    resumed = start(values(*numbers), 9, strategy(), best=rule, checkpoints=tmp_path, resume="auto")
    assert whole.best.round == resumed.best.round == 1
    assert bits(resumed.best.arrays) == bits(whole.best.arrays)
    assert resumed.stopped == whole.stopped != ""
    assert bits(resumed.arrays) == bits(whole.arrays)


def test_a_resumed_run_that_had_ended_early_says_so_and_trains_nothing(tmp_path, flower_log):
    rule = Best("score", patience=1)
    first = start(values(0.5, 0.4), 4, best=rule, checkpoints=tmp_path)
    flower_log.clear()
    evaluate = values(0.9)
    again = start(evaluate, 8, best=rule, checkpoints=tmp_path, resume="auto")
    assert evaluate.models == []
    assert f"stopped early: {first.stopped}" in flower_log.text
    assert "nothing is left to train" in flower_log.text
    assert "raise the patience of Best" in flower_log.text
    assert again.stopped == first.stopped
    assert bits(again.best.arrays) == bits(first.best.arrays) == bits(record_of(MODEL))


@pytest.mark.parametrize("patience", [3, None])
def test_a_run_goes_on_with_more_patience(patience, tmp_path):
    start(values(0.5, 0.4), 4, best=Best("score", patience=1), checkpoints=tmp_path)
    evaluate = values(0.9)
    rule = Best("score", patience=patience)
    result = start(evaluate, 4, best=rule, checkpoints=tmp_path, resume="auto")
    assert (result.best.round, len(evaluate.models), result.stopped) == (2, 3, "")


def test_a_run_that_ended_with_its_patience_spent_gets_no_more_rounds(tmp_path):
    rule = Best("score", patience=2)
    assert start(values(0.5, 0.4), 2, best=rule, checkpoints=tmp_path).stopped == ""
    evaluate = values(0.9)
    assert start(evaluate, 4, best=rule, checkpoints=tmp_path, resume="auto").stopped
    assert evaluate.models == []


@pytest.mark.parametrize(
    "other", [Best("score", "min"), Best("loss"), Best("score", source="server"), None]
)
def test_a_resumed_run_must_compare_the_same(other, tmp_path):
    start(values(0.5, 0.4), 2, best=Best("score"), checkpoints=tmp_path)
    with pytest.raises(ColearnError, match=r"found another (metric|source)"):
        start(values(0.5), 4, best=other, checkpoints=tmp_path, resume="auto")


def test_a_run_saved_without_a_best_model_begins_to_compare(tmp_path):
    start(values(0.9, 0.8), 2, checkpoints=tmp_path)
    result = start(values(0.1), 4, best=Best("score"), checkpoints=tmp_path, resume="auto")
    assert result.best.round == 3


def test_records_of_older_versions_are_read():
    record = next(iter(_records(values(0.1, 0.2))))
    line = json.loads(record.to_json())
    assert line.pop("stopped") == ""
    assert asdict(type(record).from_json(json.dumps(line))) == asdict(record)


def _records(evaluate):
    start(evaluate, 1, history=(history := History()))
    return history


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "features.md").read_text()
    [code] = [each for each in re.findall(r"```python\n(.*?)```", text, re.S) if "Best(" in each]
    code = code.replace("CoLearn(\n    5,", f"CoLearn(\n    {K},")
    names = {
        "grid": InProcessGrid(participants(), K),
        "initial_arrays": record_of(MODEL),
        "evaluate": values(0.1, 0.9, 0.8, name="accuracy"),
    }
    exec(code, names)
    assert capsys.readouterr().out.startswith(
        "1 0.9\n'accuracy' (max) has not improved in the last 10"
    )
    assert [record.stopped for record in names["strategy"].history][10] == names["result"].stopped
