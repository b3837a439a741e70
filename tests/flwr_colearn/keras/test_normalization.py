import threading

import numpy as np
import pytest

from flwr_colearn import (
    BatchRenorm,
    ColearnError,
    Frozen,
    GroupNorm,
    LayerNorm,
    Pooled,
    RunningMean,
)
from flwr_colearn.grids import GROUP, RANK, AllReduceGroup
from flwr_colearn.grids.all_reduce import _groups
from flwr_colearn.normalization import layer_arrays
from flwr_colearn.roles import assign_roles

tf = pytest.importorskip("tensorflow")
keras = pytest.importorskip("keras")
normalization = pytest.importorskip("flwr_colearn.keras")
batch_norms, convert = normalization.batch_norms, normalization.convert
normalised, recalibrated = normalization.normalised, normalization.recalibrated


@pytest.fixture(autouse=True, scope="module")
def _float64():
    for dtype in ("float64", "float32"):
        keras.config.set_floatx(dtype)
        keras.config.set_dtype_policy(dtype)  # once asked for, it no longer follows floatx
        if dtype == "float64":
            yield


class Block(keras.layers.Layer):
    """A layer with a batch norm inside, that no clone of the model around it would find."""

    def __init__(self):
        super().__init__()
        self.conv, self.inner = keras.layers.Conv2D(4, 2), keras.layers.BatchNormalization()

    def build(self, shape):
        self.conv.build(shape)
        self.inner.build(self.conv.compute_output_shape(shape))

    def call(self, x, training=None):
        return self.inner(self.conv(x), training=training)


def network():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((5, 5, 3)),
            keras.layers.Conv2D(6, 2, name="first"),
            keras.layers.BatchNormalization(name="odd_name"),
            keras.layers.Activation("tanh"),
            Block(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    rng = np.random.default_rng(0)
    for layer in batch_norms(model):
        for variable in layer.weights:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return model


def data(*sizes):
    rng = np.random.default_rng(1)
    return [rng.normal(3 * k, k + 1, (n, 5, 5, 3)) for k, n in enumerate(sizes)]


def arrays_of(model):
    return {variable.path: variable.numpy() for variable in model.weights}


def test_layers_at_any_depth_are_found_by_type_and_their_arrays_by_their_statistics():
    model = network()
    assert len(list(batch_norms(model))) == 2
    arrays = arrays_of(model)
    wanted = [v.path for layer in batch_norms(model) for v in layer.weights]
    found = layer_arrays(arrays, assign_roles(arrays))
    assert sorted(found) == sorted(wanted)
    assert len(found) == 8


def reference_moments(model, x):
    """Moments of what reaches the first batch norm: before it there is none."""
    values = model.get_layer("first")(x).numpy().reshape(-1, 6)
    return values.mean(0), values.var(0)


def test_recalibrated_and_pooled_are_the_moments_of_the_joint_data():
    model, parts = network(), data(4, 6, 11)
    before = arrays_of(model)
    each = [recalibrated(model, np.array_split(x, 2), lambda v: v.path) for x in parts]
    path = model.get_layer("odd_name").moving_mean.path.rpartition("/")[0]
    names = [f"{path}/moving_mean", f"{path}/moving_variance"]
    assert set(names) < set(each[0])
    assert len(each[0]) == 4
    mean = RunningMean({name: each[0][name] for name in names})
    for x, found in zip(parts, each, strict=True):
        mean.add({name: found[name] for name in names}, len(x))
    wanted = reference_moments(model, np.concatenate(parts))
    for name, value in zip(names, wanted, strict=True):
        np.testing.assert_allclose(mean.mean()[name], value, rtol=1e-10)
    after = arrays_of(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert not any("call" in vars(layer) for layer in batch_norms(model))


def test_recalibration_without_data_is_refused():
    with pytest.raises(ColearnError, match="at least one batch"):
        recalibrated(network(), [])


@pytest.mark.parametrize("scheme", [GroupNorm(2), LayerNorm()])
def test_group_and_layer_norm_keep_gamma_and_beta_and_have_no_statistics(scheme):
    model, (x,) = network(), data(3)
    before = arrays_of(model)
    assert convert(model, scheme) is model
    after = arrays_of(model)
    assert [name for name in before if name not in after] == [n for n in before if "moving" in n]
    assert all(np.array_equal(before[name], after[name]) for name in after)
    layer = model.get_layer("odd_name")
    inside = model.get_layer("first")(x)
    groups = 2 if isinstance(scheme, GroupNorm) else 1
    reference = keras.layers.GroupNormalization(groups, epsilon=layer.epsilon)
    reference.build(inside.shape)
    reference.gamma.assign(layer.gamma)
    reference.beta.assign(layer.beta)
    for training in (True, False):
        np.testing.assert_allclose(
            layer(inside, training=training), reference(inside), rtol=1e-10, atol=1e-12
        )
    # In a traced step too, with gradients for all that is trained.
    step = tf.function(lambda batch: tape_gradients(model, batch))
    assert all(np.abs(gradient).sum() > 0 for gradient in step(x)[:-1])


def tape_gradients(model, x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(x, training=True) ** 2)
    return tape.gradient(loss, [variable.value for variable in model.trainable_variables])


def test_batch_renorm_with_r_1_and_d_0_is_batch_norm_forward_and_backward():
    plain, model, (x,) = network(), network(), data(6)
    convert(model, BatchRenorm(warmup=10**6))
    np.testing.assert_allclose(model(x, training=False), plain(x, training=False), rtol=1e-12)
    found, wanted = (tf.function(lambda b, m=m: tape_gradients(m, b))(x) for m in (model, plain))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10)
    for a, b in zip(batch_norms(model), batch_norms(plain), strict=True):
        np.testing.assert_allclose(a.moving_mean, b.moving_mean, rtol=1e-10)
        np.testing.assert_allclose(a.moving_variance, b.moving_variance, rtol=1e-10)
        assert int(a.steps) == 1
    arrays = arrays_of(model)
    roles = assign_roles(arrays)
    assert sorted(str(roles[n]) for n in arrays if n.endswith("steps")) == ["counter"] * 2


def test_batch_renorm_with_open_limits_is_the_moving_statistics():
    plain, model, (x,) = network(), network(), data(6)
    convert(model, BatchRenorm(r_max=1e9, d_max=1e9, warmup=0))
    layer, reference = model.get_layer("odd_name"), plain.get_layer("odd_name")
    np.testing.assert_allclose(
        layer(plain.get_layer("first")(x), training=True),
        reference(plain.get_layer("first")(x), training=False),
        rtol=1e-9,
    )


def test_batch_renorm_opens_its_limits_as_the_scheme_says():
    model = convert(network(), BatchRenorm(warmup=10))
    layer = model.get_layer("odd_name")
    for step in (0, 10, 15, 20, 99):
        layer.steps.assign(step)
        assert tuple(map(float, layer._limits("float64"))) == pytest.approx(
            layer.scheme.limits(step)
        )


def test_frozen_layers_train_with_their_moving_statistics_in_a_traced_step():
    model, (x,) = convert(network(), Frozen(1)), data(6)
    step = tf.function(lambda batch: tape_gradients(model, batch))
    step(x)
    before, wanted = arrays_of(model), model(x, training=False)
    with normalised(model, {"normalization": "frozen", "normalization-frozen": True}):
        np.testing.assert_allclose(model(x, training=True), wanted, rtol=1e-12)
        gradients = step(x)
    after = arrays_of(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(np.abs(gradient).sum() > 0 for gradient in gradients)
    step(x)
    moved = arrays_of(model)
    assert [n for n in before if not np.array_equal(moved[n], before[n])] == [
        name for name in before if "moving" in name
    ]


def test_what_keras_cannot_have_is_refused():
    config = {"normalization": "frozen", "normalization-frozen": True}
    with (
        pytest.raises(ColearnError, match=r"convert\(model, Frozen"),
        normalised(network(), config),
    ):
        pass
    with (
        pytest.raises(ColearnError, match="in threads of one process"),
        normalised(network(), {"normalization": "synchronised"}),
    ):
        pass


def test_a_layer_that_does_more_than_batch_norm_is_not_converted_in_silence():
    class Activated(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return keras.ops.relu(super().call(inputs, training=training, mask=mask))

    model = keras.Sequential([keras.Input((3,)), Activated()])
    for scheme in (GroupNorm(2), BatchRenorm(), Frozen(1)):
        with pytest.raises(ColearnError, match=r"expected Keras's own.*Activated"):
            convert(model, scheme)
    assert convert(model, Pooled()) is model
    for layer in (Activated(), BatchNorm(renorm=True)):
        model = keras.Sequential([keras.Input((3,)), layer])
        with pytest.raises(ColearnError, match=r"expected Keras's own"):
            in_threads([model] * 2, [np.ones((2, 3))] * 2, tape_gradients)
        with pytest.raises(ColearnError, match=r"expected Keras's own"):
            convert(model, Frozen(1))
    renormed = convert(network(), BatchRenorm())  # would train as plain batch norm
    with pytest.raises(ColearnError, match=r"BatchRenormalization.*something else"):
        in_threads([renormed], data(4), tape_gradients)


def test_other_schemes_change_nothing():
    model, (x,) = network(), data(3)
    wanted = model(x)
    assert np.array_equal(convert(model, Pooled())(x), wanted)
    with normalised(model, {"normalization": "pooled"}):
        assert {type(layer) for layer in batch_norms(model)} == {keras.layers.BatchNormalization}


# Synchronised ------------------------------------------------------------------------------------

BatchNorm = keras.layers.BatchNormalization


def in_threads(models, data, work):
    """Run ``work(model_k, data_k)`` for every participant, in a group of threads."""
    group, results, errors = AllReduceGroup(len(data)), [None] * len(data), []
    _groups[999] = group

    def run(rank):
        config = {"normalization": "synchronised", GROUP: 999, RANK: rank}
        try:
            with normalised(models[rank], config):
                results[rank] = work(models[rank], data[rank])
        except Exception as error:
            errors.append(error)
            group.leave()

    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)
    del _groups[999]
    assert not any("call" in vars(layer) for model in models for layer in batch_norms(model))
    if errors:
        raise errors[0]
    return results, group


def step(model, x):
    """Return outputs, and the gradients of a mean loss by the weights and by the inputs."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = model(x, training=True)
        loss = tf.reduce_mean(y**2 + y)
    weights = [variable.value for variable in model.trainable_variables]
    *found, by_inputs = tape.gradient(loss, [*weights, x])
    return y.numpy(), [gradient.numpy() for gradient in found], by_inputs.numpy()


def other_axis():
    """Layers without gamma or beta over another axis, in front of all that is trained."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5, 5, 3)),
            BatchNorm(axis=1, center=False, epsilon=1e-2),
            keras.layers.Activation("tanh"),
            BatchNorm(axis=2, scale=False, momentum=0.6),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )


def assert_close(found, wanted, rtol=1e-9, atol=1e-12):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def weighted_mean(parts, sizes):
    return [
        sum(n * each for n, each in zip(sizes, values, strict=True)) / sum(sizes)
        for values in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(("make", "widths"), [(network, 6 + 4), (other_axis, 5 + 5)])
def test_synchronised_equals_one_batch_norm_over_the_joint_batch(make, widths):
    sizes = (4, 6, 11)
    models, parts = [make() for _ in sizes], data(*sizes)
    found, group = in_threads(models, parts, step)
    alone = make()
    outputs, gradients, by_inputs = step(alone, np.concatenate(parts))
    assert_close(np.concatenate([y for y, _, _ in found]), outputs)
    # Each by the mean loss of its own batch.
    assert_close(weighted_mean([g for _, g, _ in found], sizes), gradients)
    shares = [n / sum(sizes) * g for n, (_, _, g) in zip(sizes, found, strict=True)]
    assert_close(np.concatenate(shares), by_inputs)
    for model in models:
        assert_close(model.non_trainable_variables, alone.non_trainable_variables)
    # A layer moves, each way: sums, count and examples; squares; two sums of gradients.
    assert group.bytes == 2 * 3 * 8 * (4 * widths + 2 * 2)


def test_synchronised_weights_after_steps_with_momentum_are_those_of_the_joint_batch():
    sizes = (4, 6, 11)
    models, parts, alone = [network() for _ in sizes], data(*sizes), network()

    def descend(model, gradients, velocity):
        for variable, gradient, speed in zip(
            model.trainable_variables, gradients, velocity, strict=True
        ):
            speed *= 0.9
            speed += gradient
            variable.assign(variable - 0.05 * speed)

    velocities = [
        [np.zeros(variable.shape) for variable in model.trainable_variables]
        for model in (alone, *models)
    ]
    start = [variable.numpy() for variable in alone.trainable_variables]
    for _ in range(4):
        found, _ = in_threads(models, parts, step)
        mean = weighted_mean([gradients for _, gradients, _ in found], sizes)
        for model, velocity in zip(models, velocities[1:], strict=True):
            descend(model, mean, velocity)
        descend(alone, step(alone, np.concatenate(parts))[1], velocities[0])
    for model in models:
        assert_close(model.variables, alone.variables, rtol=1e-8, atol=1e-10)
    moved = [np.abs(a - b).max() for a, b in zip(start, alone.trainable_variables, strict=True)]
    # Biases before a batch norm have none.
    assert sorted(moved)[2] > 1e-3


class Branches(keras.Model):
    """Two branches of equal shape, called in one order and added in another."""

    def __init__(self, last_first):
        super().__init__()
        self.convs = [keras.layers.Conv2D(4, 2) for _ in range(2)]
        self.norms = [BatchNorm(), BatchNorm()]
        self.last_first = last_first

    def call(self, x, training=None):
        pairs = zip(self.convs, self.norms, strict=True)
        first, last = [norm(conv(x), training=training) for conv, norm in pairs]
        first, last = tf.tanh(first), tf.square(last)
        return last + first if self.last_first else first + last


def test_synchronised_sums_are_of_the_same_layer_in_whatever_order_gradients_flow():
    # TensorFlow's backward pass goes through branches by the order of the addition.
    def branches(last_first=False):
        keras.utils.set_random_seed(0)
        model = Branches(last_first)
        model(parts[0])
        return model

    sizes = (4, 6)
    parts = data(*sizes)
    found, _ = in_threads([branches(), branches(last_first=True)], parts, step)
    _, gradients, _ = step(branches(), np.concatenate(parts))
    assert_close(weighted_mean([g for _, g, _ in found], sizes), gradients)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_synchronised_ends_for_all_when_a_participant_leaves(phase):
    def work(model, x):
        if len(x) == 6 and phase == "forward":
            raise RuntimeError("the power is out")
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True))
        if len(x) == 6:
            raise RuntimeError("the power is out")
        try:
            tape.gradient(loss, model.trainable_variables[0].value)
        except ColearnError as error:
            left.append(str(error))
            raise

    left = []
    with pytest.raises((ColearnError, RuntimeError), match=r"one has left|power is out"):
        in_threads([network() for _ in range(3)], data(4, 6, 11), work)
    assert len(left) == (2 if phase == "backward" else 0)
    assert all("one has left" in reason for reason in left)


def test_synchronised_layers_that_are_not_trained_use_their_statistics():
    models, (x,) = [network(), network()], data(4)
    wanted = models[0](x, training=False)
    for model in models:
        for layer in batch_norms(model):
            layer.trainable = False
    found, group = in_threads(models, [x, x], lambda model, x: model(x, training=True))
    assert_close(found, [wanted, wanted])
    assert group.bytes == 0


def test_synchronised_in_a_compiled_step_is_refused():
    compiled = tf.function(lambda x: model(x, training=True))
    model, (x,) = network(), data(4)
    with pytest.raises(ColearnError, match="expected gradients computed eagerly"):
        in_threads([model], [x], lambda _, x: compiled(x))
    compiled(x)
    with pytest.raises(ColearnError, match="no layer was called there"):
        in_threads([model], [x], lambda _, x: compiled(x))


def test_synchronised_with_a_mask_is_refused():
    model = keras.Sequential([keras.Input((2, 3)), keras.layers.Masking(), BatchNorm()])
    with pytest.raises(ColearnError, match="without a mask"):
        in_threads([model], [np.ones((4, 2, 3))], lambda model, x: model(x, training=True))


def test_synchronised_in_mixed_precision_rounds_once_as_keras_does():
    def layer():
        model = keras.Sequential([keras.Input((3,)), BatchNorm(dtype="mixed_bfloat16")])
        model.layers[0].gamma.assign([0.3, 1.7, 5.1])
        model.layers[0].beta.assign([0.1, 0.7, -3.3])
        return model

    rng = np.random.default_rng(2)
    parts = [tf.cast(rng.normal(k, k + 1, (200, 3)), tf.bfloat16) for k in range(2)]
    models = [layer(), layer()]
    found, _ = in_threads(models, parts, lambda model, x: model(x, training=True))
    found, wanted = tf.concat(found, 0), layer()(tf.concat(parts, 0), training=True)
    assert found.dtype == wanted.dtype == tf.bfloat16
    # But for ties that the last bit of float32 decides.
    assert np.mean(found.numpy() == wanted.numpy()) > 0.98
