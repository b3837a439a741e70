import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import LegacyContext, ServerConfig
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from flwr_colearn import (
    ColearnError,
    CyclicalRate,
    IncreasingEpochs,
    InProcessGrid,
    Recovery,
    Role,
    secagg,
)
from flwr_colearn import legacy as plain
from tests import small_net
from tests.small_net import K

STEP = 2 * 8.0 / 2**22  # of SecAgg+'s default quantization
EPSILON = 0.03


def strategy_of(kind=secagg.CoLearn, model=None, shared=None, **arguments):
    """A strategy that appends every shared model to `shared`."""

    def evaluate(server_round, arrays, config):
        if shared is not None:
            shared.append(arrays)

    arguments = {
        "local_epochs": IncreasingEpochs(1, epsilon=EPSILON),
        "learning_rate": CyclicalRate(0.5),
        "fraction_evaluate": 0.0,
        **arguments,
    }
    initial = ndarrays_to_parameters(small_net.initial() if model is None else model)
    return kind(K, initial_parameters=initial, evaluate_fn=evaluate, **arguments)


def run(strategy, rounds=1, workflow=None, mods=(secaggplus_mod,), **arguments):
    """Flower's SecAgg+ over K participants in this process."""
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        config=ServerConfig(num_rounds=rounds),
        strategy=strategy,
    )
    workflow = workflow or SecAggPlusWorkflow(
        num_shares=K, reconstruction_threshold=3, max_weight=1.0
    )
    grid = InProcessGrid(small_net.legacy_app(*mods, **arguments), K)
    DefaultWorkflow(fit_workflow=workflow)(grid, context)


def test_the_model_learns_and_the_epochs_follow_equation_4():
    shared = []
    strategy = strategy_of(shared=shared)
    run(strategy, rounds=14)
    path = strategy.history.epochs_path
    assert path == small_net.epochs_by_equation_4(1, EPSILON, shared)
    assert path[-1] > path[0]
    assert len(set(path)) < len(path)
    assert small_net.accuracy(shared[0]) < 0.7
    assert small_net.accuracy(shared[-1]) > 0.95


def test_the_average_is_the_plain_one_up_to_the_quantization_in_the_types_that_were_sent():
    masked, unmasked = [], []
    run(strategy_of(shared=masked))
    without = strategy_of(plain.CoLearn, shared=unmasked)
    default = DefaultWorkflow().fit_workflow
    run(without, workflow=default, mods=())
    for found, wanted in zip(masked[1], unmasked[1], strict=True):
        assert found.dtype == np.float32
        assert np.abs(found - wanted).max() <= STEP + 1e-6
    assert any(np.abs(a - b).max() > 0 for a, b in zip(masked[1], unmasked[1], strict=True))


def test_float64_models_stay_float64():
    shared = []
    model = [array.astype(np.float64) for array in small_net.initial()]
    run(strategy_of(model=model, shared=shared), train=lambda k, plan, arrays: arrays)
    assert {array.dtype for array in shared[-1]} == {np.dtype(np.float64)}


def test_a_participant_that_fails_is_left_out_and_recorded():
    shared = []

    def train(k, plan, arrays):
        if k == 4:
            raise RuntimeError("disk full")
        return [array + np.float32(k) for array in arrays]

    strategy = strategy_of(shared=shared)
    run(strategy, train=train)
    [record] = strategy.history
    assert record.participants == ["1", "2", "3", "4"]
    [absence] = record.absences
    assert absence["participant"] == "5"
    assert "disk full" in absence["reason"]
    assert np.abs(shared[1][0] - shared[0][0] - 1.5).max() <= STEP + 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recovery": Recovery()}, "recovery under SecAgg.*: expected None"),
        ({"weighting": "weighted"}, "weighting under SecAgg.*: expected 'uniform'"),
        ({"roles": ["trainable", "mean", "variance"]}, "roles under SecAgg.*found 'mean'"),
        ({"roles": {"3": Role.COUNTER}}, "roles under SecAgg.*found 'counter'"),
    ],
)
def test_what_cannot_work_under_secagg_is_refused_at_construction(arguments, message):
    with pytest.raises(ColearnError, match=message):
        strategy_of(**arguments)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1, 2]), "array '1' under SecAgg.*float32 or float64.*found 'int64'"),
        (np.ones(2, np.float16), "array '1' under SecAgg.*float32 or float64.*found 'float16'"),
        (np.array(0.5, np.float32), r"array '1' under SecAgg.*one dimension.*found \(\)"),
    ],
)
def test_what_secagg_would_spoil_is_refused_before_anybody_trains(array, message):
    strategy = strategy_of(model=[np.zeros(2, np.float32), array])
    with pytest.raises(ColearnError, match=message):
        run(strategy, train=lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize("spoilt", [np.array(1.0, np.float32), np.ones(1, np.float16)])
@pytest.mark.filterwarnings("ignore:.*encountered in cast")
def test_flower_spoils_what_is_refused(spoilt):
    averages = []

    class Unchecked(plain.CoLearn):
        def aggregate_fit(self, server_round, results, failures):
            averages.append(parameters_to_ndarrays(results[0][1].parameters))
            return None, {}

    run(
        strategy_of(Unchecked, model=[np.ones(1, np.float32), spoilt]),
        train=lambda k, plan, arrays: [(array + k).astype(array.dtype) for array in arrays],
    )
    [[right, wrong]] = averages  # the average of 1, 2, 3, 4 and 5 is 3
    assert right == pytest.approx([3.0], abs=1e-5)
    assert np.abs(wrong - 3.0).max() > 1


def test_a_number_of_examples_other_than_one_ends_the_run():
    with pytest.raises(ColearnError, match=r"number of examples of participant \d.*1, since.*20"):
        run(strategy_of(), examples=20)


def run_to_an_average_of(value, **arguments):
    """Run one round in which the participants' mean is `value`, by a workflow that lets it pass."""
    shared = []
    strategy = strategy_of(model=[np.ones(3, np.float32)], shared=shared, **arguments)
    workflow = SecAggPlusWorkflow(K, 3, max_weight=1.0, clipping_range=16.0)
    run(strategy, workflow=workflow, train=lambda *_: [np.array([0, 1, value], np.float32)])
    return shared[1][0]


@pytest.mark.parametrize("value", [8.1, -8.1, 15.0])
def test_an_average_beyond_the_clipping_range_is_refused(value):
    with pytest.raises(ColearnError, match=r"array '0' of the average under SecAgg\+.* of 8\.0"):
        run_to_an_average_of(value)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_average_that_is_not_finite_is_refused(value):
    strategy = strategy_of()
    with pytest.raises(ColearnError, match=r"array '0' of the average under SecAgg\+"):
        strategy._as_sent(ndarrays_to_parameters([np.array([0.0, value])]))


@pytest.mark.parametrize(("value", "clipping_range"), [(7.9, 8.0), (-7.9, 8.0), (15.0, 16.0)])
def test_an_average_within_the_clipping_range_passes(value, clipping_range):
    average = run_to_an_average_of(value, clipping_range=clipping_range)
    assert average == pytest.approx([0, 1, value], abs=1e-4)


def test_the_plain_strategy_says_what_to_use_instead():
    with pytest.raises(ColearnError, match=r"one average for all.*flwr_colearn.secagg.CoLearn"):
        run(strategy_of(plain.CoLearn))


def test_too_few_arrays_are_refused_with_the_reason():
    with pytest.raises(ColearnError, match="1 missing"):
        run(strategy_of(), train=lambda k, plan, arrays: arrays[:3])


def test_a_round_below_the_reconstruction_threshold_changes_neither_the_model_nor_the_epochs():
    shared = []

    def train(k, plan, arrays):
        if plan.round == 2 and k < 3:
            raise RuntimeError("disk full")
        return [array + np.float32(1e-6) for array in arrays]

    strategy = strategy_of(shared=shared)
    run(strategy, rounds=3, train=train)
    assert [np.array_equal(*pair) for pair in zip(shared[2], shared[1], strict=True)] == [True] * 4
    assert strategy.history.epochs_path == [1, 2, 2]
    assert [len(record.participants) for record in strategy.history] == [5, 0, 5]


def test_the_precision_that_a_larger_max_weight_costs():
    """Why the documentation asks for max_weight=1.0."""

    def error(max_weight):
        shared = []
        workflow = SecAggPlusWorkflow(K, 3, max_weight=max_weight)
        model = [np.full(1000, 0.123, np.float32)]
        strategy = strategy_of(model=model, shared=shared)
        run(strategy, workflow=workflow, train=lambda k, plan, arrays: arrays)
        return np.abs(shared[1][0] - model[0]).max()

    assert error(1.0) <= STEP + 1e-6
    assert 100 * STEP < error(1000.0) < 2000 * STEP
