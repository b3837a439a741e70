"""A user's own ClientApp in Keras, without this repository's participants, under `Recalibrated`."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flwr_colearn import (
    CoLearn,
    ColearnError,
    InProcessGrid,
    Recalibrated,
    Recovery,
    participant_mod,
)
from flwr_colearn.records import to_record

keras = pytest.importorskip("keras")
flwr_colearn_keras = pytest.importorskip("flwr_colearn.keras")
get_arrays, set_arrays = flwr_colearn_keras.get_arrays, flwr_colearn_keras.set_arrays
layers, recalibrate = keras.layers, flwr_colearn_keras.recalibrate

SIZES = (24, 33, 50)
BATCH = 16
ROLES = ["trainable"] * 4 + ["mean", "variance"] + ["trainable"] * 2
NAMINGS = {  # the function that makes the record, the mean and the kernel before it, the roles
    "types and order": (
        lambda model: to_record(get_arrays(model)),
        ("batch_normalization/moving_mean", "dense/kernel"),
        None,
    ),
    "paths": (
        lambda model: ArrayRecord({v.path: Array(v.numpy()) for v in model.variables}),
        ("net/norm/moving_mean", "net/before/kernel"),
        None,
    ),
    "numbers": (lambda model: ArrayRecord(model.get_weights()), ("4", "0"), ROLES),
}


def new_model():
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,), dtype="float64"),
            layers.Dense(6, dtype="float64", name="before"),
            layers.BatchNormalization(dtype="float64", name="norm"),
            layers.Dropout(0.5, dtype="float64"),
            layers.Dense(3, dtype="float64"),
        ],
        name="net",
    )


def load_data(context):
    k = context.node_config["partition-id"]
    x = np.random.default_rng(k).normal(3 * k, k + 1, (SIZES[k], 4))
    return [x[i : i + BATCH] for i in range(0, len(x), BATCH)]


def own_app(to_arrays):
    """An app whose training only moves the first kernel, by what the participant's data are."""
    app = ClientApp(mods=[participant_mod])

    @app.train()
    def train(message, context):
        model, batches = new_model(), load_data(context)
        set_arrays(model, {name: a.numpy() for name, a in message.content["arrays"].items()})
        kernel = model.get_layer("before").kernel
        kernel.assign(kernel + 0.1 * batches[0].std())
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": to_arrays(model), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def co_learn(app, initial, roles=None):
    strategy = CoLearn(
        3,
        local_epochs=1,
        learning_rate=0.05,
        fraction_evaluate=0.0,
        normalization=Recalibrated(),
        recovery=Recovery(max_restarts=0),
        roles=roles,
    )
    result = strategy.start(InProcessGrid(app, 3), initial, num_rounds=2)
    return {name: array.numpy() for name, array in result.arrays.items()}, strategy.history


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_statistics_are_those_of_all_data_under_the_average(naming):
    to_arrays, (mean_name, kernel_name), roles = NAMINGS[naming]
    app = own_app(to_arrays)

    @recalibrate(app)
    def model_and_batches(context):
        return new_model(), load_data(context)

    initial = to_arrays(new_model())
    found, history = co_learn(app, initial, roles)
    assert not np.array_equal(found[kernel_name], initial[kernel_name].numpy())
    # Uniform weights; the example that is alone in its batch is left out. The bias is zero.
    context = type("Context", (), {})
    values = []
    for context.node_config in ({"partition-id": k} for k in range(3)):
        parts = [part for part in load_data(context) if len(part) > 1]
        values.append(np.concatenate(parts) @ found[kernel_name])
    mean = np.mean([v.mean(0) for v in values], 0)
    variance = np.mean([(v**2).mean(0) for v in values], 0) - mean**2
    variance_name = "5" if mean_name == "4" else mean_name.replace("mean", "variance")
    np.testing.assert_allclose(found[mean_name], mean, rtol=1e-9)
    np.testing.assert_allclose(found[variance_name], variance, rtol=1e-9)
    assert not any(record.refusals for record in history)


def test_another_model_is_refused():
    to_arrays, *_ = NAMINGS["types and order"]
    app = own_app(to_arrays)
    recalibrate(app)(lambda context: (keras.Sequential([keras.Input((4,)), layers.Dense(1)]), []))
    with pytest.raises(ColearnError, match="expected those of this participant's Keras model"):
        co_learn(app, to_arrays(new_model()))
