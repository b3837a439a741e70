import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from clients.settings import ParticipantSettings
from clients.tasks.registry import shards
from flwr_colearn import ColearnError
from flwr_colearn.normalization import SCHEMES
from simulations.settings import RunSettings
from simulations.study import __main__ as study
from simulations.study import normalization, normalization_cells
from simulations.study.normalization import cells, rows, run_study
from simulations.study.normalization_cells import (
    TRAININGS,
    Cell,
    Unit,
    _labels,
    config_of,
    evaluate,
    run_cell,
)

PARTICIPANTS = ParticipantSettings(partition="classes")
SETTINGS = RunSettings(total_epochs=2, learning_rate=0.05)


def cell(training="fedavg", scheme="pooled", **kwargs):
    return Cell(training, scheme, replace(PARTICIPANTS, **kwargs), SETTINGS)


def unit(**kwargs):
    values = {
        "training": "fedavg", "partition": "iid", "scheme": "pooled", "seed": 0,
        "shared_accuracy": 0.5, "sites_accuracy": 0.5, "local_accuracy": 0.75, "rounds": 2,
        "bytes": 3_000_000, "scheme_bytes": -1_000_000, "seconds": 1.0, "config": {},
    }  # fmt: skip
    return Unit(**{**values, **kwargs})


def test_every_scheme_has_a_cell_and_synchronised_only_where_steps_are_exchanged():
    plan = list(cells(list(TRAININGS), ["iid"], SCHEMES, [0], PARTICIPANTS, SETTINGS))
    assert len(plan) == 3 * len(SCHEMES) - 2
    assert {c.training for c in plan if c.scheme == "synchronised"} == {"synchronous"}
    assert {c.normalization().name for c in plan} == set(SCHEMES)


def test_steps_are_those_of_an_average_participant():
    assert cell("synchronous", partition="iid").rounds == 2 * 9  # 259.4 examples, batches of 32
    assert cell("synchronous").rounds == 2 * 9
    assert cell("fedavg").rounds == 2


@pytest.mark.parametrize(
    ("training", "scheme"),
    [("synchronous", "synchronised"), ("colearn", "recalibrated"), ("fedavg", "local-bn"),
     ("fedavg", "group-norm")],
)  # fmt: skip
def test_a_unit_of_each_training(training, scheme):
    found = run_cell(replace(cell(training, scheme), test_examples=100))
    assert (found.training, found.scheme, found.partition) == (training, scheme, "classes")
    assert (found.shared_accuracy is None) == (scheme == "local-bn")
    assert 0.0 <= found.local_accuracy <= 1.0
    assert found.bytes > 0
    signs = {"synchronised": 1, "recalibrated": 1, "local-bn": -1, "group-norm": 0}
    assert np.sign(found.scheme_bytes) == signs[scheme]


@pytest.mark.parametrize("scheme", ["local-bn", "recalibrated"])
def test_participants_in_processes_train_the_same_models(scheme):
    short = replace(cell("colearn", scheme), test_examples=100)
    one, two = (replace(run_cell(short, processes), seconds=0.0) for processes in (1, 2))
    assert two == one


def test_units_are_written_skipped_and_refused_with_another_config(tmp_path, monkeypatch):
    plan = [cell(scheme="pooled"), cell(scheme="average")]
    calls = []

    def fake(each, processes):
        calls.append(each.scheme)
        return unit(scheme=each.scheme, config=config_of(each))

    monkeypatch.setattr(normalization, "run_cell", fake)
    assert len(run_study(plan, tmp_path, minutes=0)) == 0  # no time: nothing is begun
    assert len(run_study(plan, tmp_path, float("inf"))) == 2
    assert len(run_study(plan, tmp_path, float("inf"))) == 2
    assert calls == ["pooled", "average"]
    assert len(list((tmp_path / "units").glob("*.json"))) == 2
    other = replace(plan[0], test_examples=7)
    with pytest.raises(ColearnError, match="test-examples"):
        run_study([other], tmp_path, float("inf"))


def test_the_table_says_what_is_local_and_what_was_not_run():
    plan = [replace(cell(scheme=s), participants=replace(PARTICIPANTS, partition=p))
            for s in ("pooled", "local-bn", "average") for p in ("iid", "classes")]  # fmt: skip
    units = [
        unit(),
        unit(seed=1, shared_accuracy=0.7, sites_accuracy=0.7),
        unit(scheme="local-bn", shared_accuracy=None, sites_accuracy=0.6, scheme_bytes=0),
    ]
    pooled, local, average = rows(units, plan)
    assert pooled["IID: global"] == "60.0 ± 14.1"
    assert pooled["IID: local"] == "75.0 ± 0.0"
    assert pooled["two classes each: global"] == "not run"
    assert (pooled["MB"], pooled["of which scheme"]) == ("3.0", "-1.00")
    assert local["IID: global"] == "(60.0)"
    assert set(average.values()) == {"federated averaging", "average", "not run", ""}


@pytest.mark.parametrize(
    ("training", "scheme"), [("colearn", "average"), ("fedavg", "average"), ("fedavg", "pooled")]
)
def test_training_that_diverges_is_a_result_of_its_own(training, scheme):
    diverging = cell(training, scheme)
    diverging = replace(diverging, settings=replace(SETTINGS, learning_rate=1e12))
    found = run_cell(replace(diverging, test_examples=20))
    assert found.diverged
    assert found.shared_accuracy is None
    both = [found, replace(found, seed=1, diverged=False, shared_accuracy=0.5)]
    (row,) = rows(both[:1], [diverging])
    assert row["two classes each: global"] == row["two classes each: local"] == "diverged"
    assert row["MB"] == ""
    (row,) = rows(both, [diverging])
    assert row["two classes each: global"] == "1 of 2 diverged"


def test_one_participant_that_diverges_is_enough(monkeypatch):
    def poison(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id == 2:
            arrays = {name: array.numpy() for name, array in reply.content["arrays"].items()}
            arrays["0.weight"] = arrays["0.weight"] * np.float32(np.nan)
            reply.content["arrays"] = ArrayRecord({n: Array(a) for n, a in arrays.items()})
        return reply

    monkeypatch.setattr(normalization_cells, "count_epochs", poison)
    assert run_cell(replace(cell("fedavg", "pooled"), test_examples=20)).diverged


def test_other_failures_of_a_cell_are_not_taken_for_divergence(monkeypatch):
    def fails(*args, **kwargs):
        raise ColearnError("participants: expected 5, found 3")

    monkeypatch.setattr("flwr_colearn.CoLearn.start", fails)
    with pytest.raises(ColearnError, match="found 3"):
        run_cell(cell("colearn", "average"))


def test_local_accuracy_weighs_classes_as_the_participants_data_do(monkeypatch):
    """A model that is always right about even digits, and never about odd ones."""

    class Evaluator:
        train_set = None

        def set_weights(self, weights):
            pass

        def predict(self):
            targets = np.tile(np.arange(10), 3)
            answers = targets + targets % 2 * (1 - 2 * (targets == 9))
            return np.eye(10, dtype=np.float32)[answers], targets

    class Grid:
        contexts = dict.fromkeys(range(1, 6))

    overall, local = evaluate(Evaluator(), {}, Grid(), PARTICIPANTS, is_local=False)
    assert overall == [0.5] * 5
    labels = _labels(PARTICIPANTS)
    for found, shard in zip(local, shards(PARTICIPANTS, 5), strict=True):
        assert found == pytest.approx((labels[shard] % 2 == 0).mean())


def test_study_normalization_is_this_study(tmp_path, capsys):
    arguments = ["normalization", "digits", "--minutes", "0", "--output", str(tmp_path)]
    study.main(arguments)
    out = capsys.readouterr().out
    assert "0 of 84 units" in out
    assert "not run" in out
    assert json.loads((tmp_path / "results.json").read_text()) == []
    assert (tmp_path / "table.md").exists()
