"""The short studies of docs/choosing.md: sites of unequal sizes, and what epsilon means."""

import math

import pytest

from clients.settings import ParticipantSettings
from simulations.settings import RunSettings
from simulations.study import epsilon, unequal

PARTICIPANTS = ParticipantSettings(examples=310, batch_size=20)
SETTINGS = RunSettings(initial_epochs=1, epsilon=0.0, total_epochs=2)


@pytest.fixture(scope="module")
def units(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unequal")
    return unequal.run(PARTICIPANTS, SETTINGS, range(1), folder)


def test_participants_in_processes_train_the_same_models(units, tmp_path):
    two = unequal.run(PARTICIPANTS, SETTINGS, range(1), tmp_path, processes=2)
    for name, (run,) in units.items():
        assert two[name][0].metrics == run.metrics
        assert two[name][0].bytes == run.bytes
        assert (bool(run.round_seconds), two[name][0].round_seconds) == (True, [])
    studies = (epsilon.Study(PARTICIPANTS, SETTINGS, (1,), rounds=2, processes=p) for p in (1, 2))
    one_process, two_processes = (epsilon.results(study) for study in studies)
    assert two_processes == one_process


def test_treatments_differ_in_weights_and_steps_only(units):
    configs = {name: runs[0].config for name, runs in units.items()}
    plain = configs[unequal.PLAIN]
    assert plain["partition"] == "shares"
    # Shards of 10, 20, 40, 80 and 160 are 1, 1, 2, 4 and 8 mini-batches: 16 / 5.
    expected = {
        "1/K, local epochs": ("uniform", 0),
        "weights, local epochs": ("weighted", 0),
        "1/K, equal steps": ("uniform", 3),
    }
    assert {n: (c["weighting"], c["local-steps"]) for n, c in configs.items()} == expected
    for config in configs.values():
        assert {**config, "weighting": "uniform", "local-steps": 0} == plain
    values = [tuple(runs[0].values) for runs in units.values()]
    assert len(set(values)) == len(values)


def test_the_table_has_differences_to_the_plain_mean_by_seed(units):
    table = list(unequal.rows(units))
    scores = [runs[0].score for runs in units.values()]
    assert [row["accuracy %"] for row in table] == [f"{score:.2f}" for score in scores]
    differences = [f"{score - scores[0]:+.2f} (0.00)" for score in scores[1:]]
    assert [row["against 1/K"] for row in table] == ["", *differences]


def test_levels_and_the_path_of_an_epsilon_between_them():
    study = epsilon.Study(PARTICIPANTS, SETTINGS, fixed=(1, 2), rounds=3)
    found = epsilon.results(study)
    for t, changes in found["changes"].items():
        assert len(changes) == 3
        assert found["levels"][t] == pytest.approx(sum(changes) / 3)
    (path,) = found["paths"]
    assert path["epsilon"] == pytest.approx(math.sqrt(found["levels"][1] * found["levels"][2]))
    # The first rounds of the path are those of the run with T=1.
    grows = next((i for i, c in enumerate(found["changes"][1]) if c <= path["epsilon"]), 3)
    assert path["path"] == [1] * min(grows + 1, 3) + path["path"][min(grows + 1, 3) :]
    assert len(path["path"]) == 3
