import numpy as np
import pytest
import torch

from clients.torch.streams import (
    Drifting,
    GraphicalModel,
    Interleaved,
    Passes,
    Relabelled,
    random_drifts,
    relabelled,
)


def passes(examples=10, batch_size=3, seed=0):
    numbers = torch.arange(examples)
    return Passes(numbers[:, None].float(), numbers, batch_size, seed)


def test_a_pass_has_every_example_at_most_once_and_the_next_another_order():
    stream = passes()
    first = torch.cat([stream.batch(i)[1] for i in range(3)]).tolist()
    second = torch.cat([stream.batch(i)[1] for i in range(3, 6)]).tolist()
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


def test_inputs_and_targets_stay_together():
    inputs, targets = passes().batch(1)
    assert inputs[:, 0].tolist() == targets.tolist()


def test_a_batch_depends_on_its_number_and_seed_only():
    stream = passes()
    ahead = stream.batch(7)[1]
    stream.batch(0)
    assert stream.batch(7)[1].tolist() == ahead.tolist() == passes().batch(7)[1].tolist()
    assert any(
        passes(seed=1).batch(i)[1].tolist() != passes().batch(i)[1].tolist() for i in range(3)
    )


def test_interleaved_streams_take_turns():
    one, two = passes(seed=1), passes(seed=2)
    both = Interleaved((one, two))
    for index in range(4):
        assert both.batch(2 * index)[1].tolist() == one.batch(index)[1].tolist()
        assert both.batch(2 * index + 1)[1].tolist() == two.batch(index)[1].tolist()


def test_features_depend_on_the_class_as_the_network_says():
    """The first feature has no parent but the class: its frequencies are its table's entries."""
    model = GraphicalModel(3, seed=5)
    x, y = model.sample(40_000, np.random.default_rng(0))
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    tables = np.random.default_rng(5)
    parents = [0] + [tables.integers(0, j) for j in range(1, 3)]
    table = tables.beta(2, 2, (3, 2, 2))
    for label in (0, 1):
        on = (x[y == label, 0] == 1).double().mean().item()
        assert on == pytest.approx(table[0, label, 0], abs=0.02)
        given = x[(y == label) & (x[:, parents[2]] == 1), 2]
        assert (given == 1).double().mean().item() == pytest.approx(table[2, label, 1], abs=0.03)
    assert y.double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_drift_changes_the_data_of_all_learners_at_once():
    def frequencies(stream, numbers):
        x = torch.cat([stream.batch(i)[0][stream.batch(i)[1] == 0] for i in numbers])
        return (x == 1).float().mean(0)

    one, two = (Drifting((200,), 5, 20, concept_seed=0, seed=seed) for seed in (1, 2))
    before, after = range(200), range(200, 400)
    assert (frequencies(one, before) - frequencies(two, before)).abs().max() < 0.06
    assert (frequencies(one, after) - frequencies(two, after)).abs().max() < 0.06
    assert (frequencies(one, before) - frequencies(one, after)).abs().max() > 0.15


def test_drift_times_are_random_and_apart():
    for seed in range(20):
        times = random_drifts(400, 3, seed)
        assert len(times) == 3
        assert all(b - a >= 50 for a, b in zip((0, *times), (*times, 400), strict=True))
    assert len({random_drifts(400, 3, seed) for seed in range(20)}) > 15


def test_classes_are_numbered_anew_from_the_drift_on_and_the_same_for_all_learners():
    plain = passes(seed=3)
    one = Relabelled(plain, (20, 40), classes=10, seed=7)
    other = Relabelled(passes(seed=5), (20, 40), classes=10, seed=7)
    numberings = [{}, {}, {}]
    for stream in (one, other):
        for index in range(60):
            inputs, targets = stream.batch(index)
            assert inputs.equal(stream.stream.batch(index)[0])
            numbering = numberings[(index >= 20) + (index >= 40)]
            for x, y in zip(inputs[:, 0].int().tolist(), targets.tolist(), strict=True):
                assert numbering.setdefault(x, y) == y
    assert all(sorted(numbering.values()) == list(range(10)) for numbering in numberings)
    assert numberings[0] == {x: x for x in range(10)}
    assert numberings[0] != numberings[1] != numberings[2] != numberings[0]
    # Test data of a concept is numbered as the stream's.
    assert relabelled(torch.arange(10), 2, 10, 7).tolist() == [numberings[2][x] for x in range(10)]
