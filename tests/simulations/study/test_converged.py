import json
import math
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from clients.objective import Objective
from clients.tasks.registry import load_task, server_trainer, shards
from flwr_colearn import ColearnError
from simulations.study.converged import command, page, tables, training, variants
from simulations.study.converged.training import Run, run_config, training_examples
from simulations.study.converged.variants import read_study, studies

torch.set_num_threads(1)  # small networks: more threads only get in each other's way

QUICK = """
title = "Digits"
note = "A note."
config = "digits"
every = 2
headline = "pooled"
figure = ["pooled", "co-learning", "fedavg-1"]

[changes]
examples = 150
num-participants = 3
initial-epochs = 2
total-epochs = 5

[[variants]]
name = "pooled"
title = "pooled (ELR)"
arm = "vanilla-elr"

[[variants]]
name = "co-learning"
title = "co-learning"
arm = "clr-ile"
epsilon = 10.0

[[variants]]
name = "fedavg-1"
title = "federated averaging, T=1"
arm = "elr-fle"
initial-epochs = 1

[[variants]]
name = "ensemble"
title = "ensemble"
arm = "ensemble"
"""


@pytest.fixture(autouse=True, scope="module")
def _cpu():
    """Without a GPU, runs repeat themselves bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = tmp_path_factory.mktemp("conf") / "quick.toml"
    path.write_text(QUICK)
    return read_study(path)


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    command.run_study(study, [], range(2), None, folder)
    return folder


@pytest.fixture(scope="module")
def runs(study, results):
    return page.read_runs(study, results)


# Training


def test_every_variant_trains_the_same_epochs_and_is_evaluated_at_the_end(runs):
    assert list(runs) == ["co-learning", "ensemble", "fedavg-1", "pooled"]
    for own in runs.values():
        assert [run.seed for run in own] == [0, 1]
        assert all(run.epochs[-1] == 5 for run in own)
        assert all(len(values) == len(run.epochs) for run in own for values in run.metrics.values())


def test_shared_models_are_evaluated_as_they_pass_multiples_of_the_interval(runs):
    assert runs["fedavg-1"][0].epochs == [2, 4, 5]
    assert runs["co-learning"][0].epochs == [2, 5]  # T is 2, and 4 of which 3 are left
    assert runs["co-learning"][0].local_epochs == [2, 3]
    assert runs["pooled"][0].epochs == [2, 4, 5]


def test_rounds_and_bytes_belong_to_the_epochs_that_are_evaluated(runs):
    run = runs["fedavg-1"][0]
    assert run.rounds_at == [2, 4, 5]
    # Messages have a header for every array, besides the elements.
    a_round = run.bytes_at[-1] / 5
    assert run.bytes_at == [2 * a_round, 4 * a_round, 5 * a_round]
    assert 1 <= a_round / (2 * 3 * run.model_bytes) < 1.05
    for name in ("pooled", "ensemble"):
        assert (runs[name][0].rounds, runs[name][0].bytes) == (0, 0)


def test_losses_fall_on_training_examples_and_are_recorded_for_every_variant(runs):
    for own in runs.values():
        for run in own:
            assert set(run.metrics) == {"loss", "accuracy", "train-loss", "train-accuracy"}
            assert run.metrics["train-loss"][-1] < run.metrics["train-loss"][0]


def test_the_training_examples_are_those_of_all_participants(study):
    participants = study.variant("co-learning").participants
    task = load_task(participants)
    found = training_examples(participants, task)
    wanted = np.concatenate(shards(participants, 3))
    assert sorted(found.inputs.sum((1, 2, 3))) == sorted(
        task.train_set.inputs[wanted].sum((1, 2, 3))
    )


def test_training_examples_are_evaluated_by_the_objective_for_other_data(study, monkeypatch):
    """As those of speech commands, whose own one is defined on the test set only."""
    participants = study.variant("co-learning").participants
    own, evaluated = Objective(headline="another"), []
    task = replace(load_task(participants), own_objective=own)

    def trainer(settings, task=task):
        evaluated.append(task.objective)
        return server_trainer(settings, task)

    monkeypatch.setattr(training, "load_task", lambda settings: task)
    monkeypatch.setattr(training, "server_trainer", trainer)
    training.Measured(participants, 2)
    assert evaluated == [task.objective, own]


def test_a_unit_that_is_there_is_read_and_not_trained_again(study, results, monkeypatch):
    monkeypatch.setattr(command, "train", pytest.fail)
    assert len(command.run_study(study, ["pooled"], [1], None, results)) == 1


def test_a_unit_of_another_config_is_refused(study, results):
    changed = replace(study, every=3)
    with pytest.raises(ColearnError, match="found another every"):
        page.read_runs(changed, results)


def test_units_of_different_data_are_refused(study, results, tmp_path):
    folder = command.unit_path(tmp_path, study, "pooled", 0).parent
    shutil.copytree(results / study.name / "units", folder)
    path = folder / "pooled-1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "00000000"}))
    with pytest.raises(ColearnError, match=r"expected results of one data set.*pooled, seed 1"):
        page.read_runs(study, tmp_path)


def test_a_unit_is_the_same_in_two_processes(study, results, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which the workers would have of two cores too
    (two,) = command.run_study(study, ["fedavg-1"], [0], None, tmp_path, processes=2)
    (one,) = [run for run in page.read_runs(study, results)["fedavg-1"] if run.seed == 0]
    assert replace(two, seconds=0) == replace(one, seconds=0)


def test_an_interrupted_unit_goes_on_from_its_last_round(study, results, tmp_path, monkeypatch):
    rounds = []
    follow = command.train.__globals__["train_averaged"]

    def interrupted(*arguments):
        *rest, evaluating, processes = arguments

        def killed(strategy):
            evaluate = evaluating(strategy)

            def once(server_round, arrays):
                rounds.append(server_round)
                if server_round == 3 and rounds.count(3) == 1:
                    raise KeyboardInterrupt
                return evaluate(server_round, arrays)

            return once

        return follow(*rest, killed, processes)

    monkeypatch.setitem(command.train.__globals__, "train_averaged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run_study(study, ["fedavg-1"], [0], None, tmp_path)
    (again,) = command.run_study(study, ["fedavg-1"], [0], None, tmp_path)
    assert 1 not in rounds[rounds.index(3) + 1 :]
    (whole,) = [run for run in page.read_runs(study, results)["fedavg-1"] if run.seed == 0]
    assert replace(again, seconds=0) == replace(whole, seconds=0)


# Descriptions


@pytest.mark.parametrize("path", studies().values(), ids=lambda path: path.stem)
def test_every_description_has_known_keys_and_its_headline(path):
    study = read_study(path)
    study.variant(study.headline)
    for name in study.figure:
        study.variant(name)
    names = [variant.name for variant in study.variants]
    assert len(set(names)) == len(names)


def test_rates_are_never_chosen_on_the_test_set():
    chosen = [read_study(path) for name, path in studies().items() if name.endswith("-rates")]
    assert chosen
    assert not any(study.compares for study in chosen)


def test_an_unknown_variant_is_refused_with_the_known_ones(study):
    with pytest.raises(ColearnError, match=r"one of pooled, co-learning.*found 'vanilla'"):
        study.variant("vanilla")


def test_an_unknown_key_is_refused(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text(QUICK.replace("epsilon", "epsilom"))
    with pytest.raises(ColearnError, match="found 'epsilom'"):
        read_study(path)


# Tables, from made-up runs


def run_of(name, seed, scores, epochs=(54, 60), train_losses=(0.5, 0.4), **changes):
    run = Run(
        variant=name,
        seed=seed,
        epochs=list(epochs),
        metrics={
            "accuracy": [score / 100 for score in scores],
            "loss": [1.0] * len(scores),
            "train-accuracy": [0.9] * len(scores),
            "train-loss": list(train_losses),
        },
        headline="accuracy",
        rounds_at=[9, 10],
        bytes_at=[9_000_000, 10_000_000],
        local_epochs=[2, 2, 2, 4, 4],
        relative_changes=[0.5, 0.1, 0.2, 0.3, 0.4],
        model_bytes=1_000_000,
        examples=600,
        seconds=1.0,
        config={},
        data="",
    )
    return replace(run, **changes)


def test_differences_are_paired_by_seed():
    first = [run_of("a", seed, (0, score)) for seed, score in enumerate((71, 75, 79))]
    second = [run_of("b", seed, (0, score)) for seed, score in enumerate((70, 73, 76))]
    found = tables.difference(first, second[::-1])
    assert found.mean == pytest.approx(2)  # of 1, 2 and 3
    assert found.error == pytest.approx(1 / math.sqrt(3))
    assert str(found) == "+2.00 ± 0.58"


def test_only_common_seeds_are_compared():
    first = [run_of("a", seed, (0, 70)) for seed in (0, 1)]
    found = tables.difference(first, [run_of("b", 1, (0, 71)), run_of("b", 2, (0, 10))])
    assert (round(found.mean, 9), found.error, found.seeds) == (-1, None, 1)
    assert tables.difference(first, []) is None


def test_the_rows_of_variants_that_have_runs(study):
    runs = {
        "pooled": [run_of("pooled", 0, (0, 80), rounds_at=[0, 0], bytes_at=[0, 0])],
        "co-learning": [run_of("co-learning", seed, (0, 79 + seed)) for seed in (0, 1)],
    }
    pooled, ours = tables.rows(study, runs)
    assert list(pooled.values()) == ["pooled (ELR)", "80.00", "", "-", "-", "-", "1"]
    # 10 rounds, twice 58,164,298 parameters of 32 bits over 100 Mbit/s: 372 s.
    assert list(ours.values()) == [
        "co-learning", "79.50 ± 0.71", "-1.00", "10.0", "10.0", "0.10", "2"
    ]  # fmt: skip


def test_the_last_tenth_of_the_epochs(study):
    run = run_of("pooled", 0, (50, 79.5, 80), (20, 54, 60), (1.0, 0.5, 0.4))
    assert tables.late_change(run, "accuracy") == pytest.approx(0.005)
    assert tables.late_change(run, "train-loss") == pytest.approx(-0.1)
    (row,) = tables.convergence_rows(study, {"pooled": [run]})
    assert list(row.values()) == [
        "pooled (ELR)", "+0.50", "", "1.000", "0.400", "-0.100", "90.00", "0.3000", "2 x 3, 4 x 2"
    ]  # fmt: skip


# The page


def test_the_page_shows_every_study_and_the_verdicts(study, results, tmp_path, monkeypatch):
    description = tmp_path / "conf" / "quick.toml"
    description.parent.mkdir()
    description.write_text(QUICK)
    monkeypatch.setattr(page, "FOLDER", description.parent)
    few = "\n".join(page.write_sections(results))  # of two seeds
    assert "too few seeds (2)" in few
    assert "| 4. The ensemble loses about 10 points to vanilla |         | not run |" in few
    monkeypatch.setattr(page, "FEWEST_SEEDS", 2)
    text = "\n".join(page.write_sections(results))
    assert "too few seeds" not in text
    assert "(2 seeds)" in text
    assert "## Digits" in text
    assert "A note." in text
    assert "| Digits " in text
    assert (results / "quick.png").stat().st_size > 10_000
    assert "4. The ensemble loses about 10 points to vanilla" in text
    assert "3. After each doubling" not in text
    assert "one seed" not in text


def test_the_committed_units_are_those_of_the_descriptions():
    for path in variants.studies().values():
        for own in page.read_runs(read_study(path), command.RESULTS).values():
            assert len({run.data for run in own}) == 1


def test_units_are_json(study, runs, tmp_path):
    run = runs["pooled"][0]
    again = Run(**json.loads(json.dumps(asdict(run))))
    assert again == run
    assert run.config == run_config(study.variant("pooled"), 2)
