import numpy as np
import pytest

from flwr_colearn import ColearnError, Role, RunningMean
from flwr_colearn.roles import pair_statistics

keras = pytest.importorskip("keras")
network = pytest.importorskip("tests.flwr_colearn.keras.network").network
flwr_colearn_keras = pytest.importorskip("flwr_colearn.keras")
get_arrays, set_arrays = flwr_colearn_keras.get_arrays, flwr_colearn_keras.set_arrays
named_variables, roles_of = flwr_colearn_keras.named_variables, flwr_colearn_keras.roles
layers = keras.layers


# Names


class Twins(layers.Layer):
    """A layer whose weights and sublayers have no names, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.first = self.add_weight(shape=(4,))
        self.second = self.add_weight(shape=(4,))
        self.branches = [layers.Dense(4), layers.Dense(4)]
        self.again = self.branches[0]
        self.noise = layers.GaussianDropout(0.5)

    def build(self, shape):
        for branch in self.branches:
            branch.build(shape)

    def call(self, inputs, training=False):
        total = self.branches[0](inputs) + self.branches[1](inputs) + self.again(inputs)
        return self.noise(total * self.first + self.second, training=training)


def nested():
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dropout(0.5)])
    sequence = layers.Reshape((2, 2))(inner(Twins()(inputs)))
    outputs = layers.Dense(3, name="head")(layers.Bidirectional(layers.LSTM(2))(sequence))
    return keras.Model(inputs, outputs)


NESTED = [
    "twins/variable",
    "twins/variable_1",
    "twins/dense/kernel",
    "twins/dense/bias",
    "twins/dense_1/kernel",
    "twins/dense_1/bias",
    "sequential/dense/kernel",
    "sequential/dense/bias",
    *(
        f"bidirectional/lstm{number}/lstm_cell/{name}"
        for number in ("", "_1")
        for name in ("kernel", "recurrent_kernel", "bias")
    ),
    "dense/kernel",
    "dense/bias",
]


def test_names_come_from_the_structure_however_many_models_a_process_has_made():
    for _ in range(2):
        model = nested()
        assert [name for name, _, _ in named_variables(model)] == NESTED
        assert len({id(variable) for _, variable, _ in named_variables(model)}) == len(NESTED)
        assert {id(v) for _, v, _ in named_variables(model)} == {id(v) for v in model.weights}


def test_a_layer_of_two_parents_is_named_once():
    shared = layers.Dense(4)
    first, second = (keras.Sequential([keras.Input((4,)), shared]) for _ in range(2))
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Add()([first(inputs), second(inputs)]))
    names = [name for name, _, _ in named_variables(model)]
    assert names == ["sequential/dense/kernel", "sequential/dense/bias"]


def test_seeds_of_random_layers_are_no_weights():
    model = nested()
    states = [v for v in model.variables if "seed" in v.path]
    assert len(states) >= 2  # Twins's noise and the dropout, at least
    named = {id(variable) for _, variable, _ in named_variables(model)}
    assert not named & {id(state) for state in states}


NAMINGS = {
    "types and order": get_arrays,
    "paths": lambda model: {v.path: v.numpy() for v in model.weights},
    "paths, with the states of random layers": lambda model: {
        v.path: v.numpy() for v in model.variables
    },
    "numbers": lambda model: {str(i): array for i, array in enumerate(model.get_weights())},
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_arrays_are_loaded_by_the_names_of_any_of_the_three_kinds(naming):
    keras.backend.clear_session()
    sent = NAMINGS[naming](network(seed=1, dropout=0.5))
    keras.backend.clear_session()
    model = network(seed=2, dropout=0.5)
    set_arrays(model, sent)
    assert all(map(np.array_equal, model.get_weights(), network(seed=1, dropout=0.5).get_weights()))


def test_arrays_of_another_model_are_refused():
    with pytest.raises(ColearnError, match=r"Keras model.*6 unknown \['batch_norm"):
        set_arrays(keras.Sequential([keras.Input((4,)), layers.Dense(6)]), get_arrays(network()))


# Roles


class Misleading(layers.Layer):
    """Weights whose names say one thing and whose types another."""

    def build(self, shape):
        self.mean = self.add_weight(shape=(4,), name="moving_mean")
        self.spread = self.add_weight(shape=(4,), name="moving_variance", trainable=False)
        self.steps = self.add_weight(shape=(), name="steps", dtype="int64", trainable=False)
        self.norm = layers.BatchNormalization(name="plain")
        self.norm.build(shape)

    def call(self, inputs, training=False):
        return self.norm(inputs, training=training) + self.mean


class OwnNorm(layers.BatchNormalization):
    pass


def test_layer_types_decide_the_roles_not_names():
    model = keras.Sequential([keras.Input((4,)), Misleading(), OwnNorm(scale=False)])
    roles = roles_of(model)
    assert roles == {
        "misleading/moving_mean": Role.TRAINABLE,
        "misleading/moving_variance": Role.BUFFER,
        "misleading/steps": Role.COUNTER,
        "misleading/batch_normalization/gamma": Role.TRAINABLE,
        "misleading/batch_normalization/beta": Role.TRAINABLE,
        "misleading/batch_normalization/moving_mean": Role.MEAN,
        "misleading/batch_normalization/moving_variance": Role.VARIANCE,
        "own_norm/beta": Role.TRAINABLE,
        "own_norm/moving_mean": Role.MEAN,
        "own_norm/moving_variance": Role.VARIANCE,
    }
    assert pair_statistics(get_arrays(model), roles) == [
        (f"{layer}/moving_mean", f"{layer}/moving_variance")
        for layer in ("misleading/batch_normalization", "own_norm")
    ]


def test_frozen_weights_do_not_count_and_statistics_of_a_frozen_layer_still_pair():
    model = network()
    model.layers[0].trainable = model.layers[1].trainable = False
    roles = roles_of(model)
    assert roles["dense/kernel"] is roles["batch_normalization/gamma"] is Role.BUFFER
    assert roles["batch_normalization/moving_variance"] is Role.VARIANCE
    assert roles["dense_1/kernel"] is Role.TRAINABLE


@pytest.mark.parametrize("by", ["type", "name"])
def test_the_shared_vector_of_spectral_normalization_has_length_one(by):
    def site(seed):
        keras.utils.set_random_seed(seed)
        norm = layers.SpectralNormalization(layers.Dense(5, use_bias=False))
        return keras.Sequential([keras.Input((6,)), norm])

    sites = [site(seed) for seed in range(4)]
    for each in sites:
        for _ in range(5):
            each(np.ones((3, 6), np.float32), training=True)
    arrays = [get_arrays(each) for each in sites]
    mean = RunningMean(arrays[0], roles_of(sites[0]) if by == "type" else None)
    for each in arrays:
        mean.add(each)
    [vector] = [array for name, array in mean.mean().items() if name.endswith("vector_u")]
    assert np.linalg.norm(vector) == pytest.approx(1)


# Layers that compute from their variables


class Doubling(layers.Layer):
    """A user's layer with a tensor that is derived from its variable."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", trainable=False)
        self.finalize_state()

    def finalize_state(self):
        self.doubled = 2 * keras.ops.convert_to_tensor(self.scale)

    def call(self, inputs):
        return self.doubled * inputs


def derived(seed):
    rng = np.random.default_rng(seed)
    normalise, double = layers.Normalization(), Doubling()
    model = keras.Sequential([keras.Input((4,)), normalise, double])
    normalise.adapt(rng.normal(seed, 1 + seed, (50, 4)))
    double.scale.assign(1.0 + seed)
    double.finalize_state()
    model.compile(loss="mse")
    return model


@pytest.mark.parametrize("ways", ["call", "predict", "evaluate"])
def test_equal_arrays_give_equal_predictions_before_and_after_tracing(ways):
    inputs = np.random.default_rng(0).normal(size=(5, 4)).astype("f4")

    def outputs(model):
        if ways == "call":
            return model(inputs).numpy()
        if ways == "predict":
            return model.predict(inputs, verbose=0)
        return model.evaluate(inputs, inputs, verbose=0)

    own = derived(0)
    for seed in (1, 2):
        outputs(own)  # traces a function
        other = derived(seed)
        set_arrays(own, get_arrays(other))
        np.testing.assert_allclose(outputs(own), outputs(other), rtol=1e-6)
