"""The normalization schemes in Keras; layers are found by type, never by name.

Layers are converted in place. This works for models of any kind (functional, subclassed, with
custom blocks), and the remaining arrays keep their values.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from ..errors import ColearnError
from ..grids import AllReduceGroup, group_of
from ..normalization import BatchRenorm, Frozen, GroupNorm, LayerNorm, Normalization
from ..roles import NDArray
from .arrays import as_array, named_variables

ops = keras.ops
BatchNorm: TypeAlias = keras.layers.BatchNormalization


class FreezableBatchNormalization(BatchNorm):
    """Batch norm with a switch to train with its moving statistics, also in a compiled step."""

    frozen: tf.Variable

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise; a frozen layer does so as in evaluation, with gradients for gamma and beta."""
        if not training or not self.trainable:
            return super().call(inputs, training=training, mask=mask)
        # tf.cond on a variable, because a compiled step would keep the value of a Python attribute.
        return tf.cond(
            self.frozen,
            lambda: BatchNorm.call(self, inputs, training=False, mask=mask),
            lambda: BatchNorm.call(self, inputs, training=True, mask=mask),
        )


class BatchRenormalization(BatchNorm):
    """Batch renormalization (Ioffe, 2017) with batch norm's arrays and ``steps``, a counter."""

    scheme: BatchRenorm
    steps: Any

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise over all axes but the layer's own."""
        if not training or not self.trainable:
            return super().call(inputs, training=training, mask=mask)
        if mask is not None:
            raise ColearnError("BatchRenormalization: expected inputs without a mask, found one")
        # Ioffe (2017), algorithm 1: r and d are constants in the backward pass, and use the moving
        # statistics from before this batch.
        inputs = _wide(inputs)
        axes, shape = _axes(self, inputs)
        mean, variance = ops.moments(inputs, axes)
        r_max, d_max = self._limits(inputs.dtype)
        sigma = ops.sqrt(variance + self.epsilon)
        moving_sigma = ops.sqrt(self.moving_variance + self.epsilon)
        r = ops.stop_gradient(ops.clip(sigma / moving_sigma, 1.0 / r_max, r_max))
        d = ops.stop_gradient(ops.clip((mean - self.moving_mean) / moving_sigma, -d_max, d_max))
        _track(self, mean, variance)
        self.steps.assign_add(1)
        normal = (inputs - ops.reshape(mean, shape)) / ops.reshape(sigma, shape)
        return _affine(self, normal * ops.reshape(r, shape) + ops.reshape(d, shape), shape)

    def _limits(self, dtype: Any) -> tuple[Any, Any]:
        """Return r_max and d_max after the batches so far, as the scheme's `limits` does."""
        # As tensors, since the number of steps is a variable of the compiled step.
        scheme = self.scheme
        opened = ops.cast(ops.ones(()), dtype)
        if scheme.warmup:
            share = ops.cast(self.steps, dtype) / scheme.warmup
            opened = ops.clip(share - 1.0, 0.0, 1.0)
        return 1.0 + opened * (scheme.r_max - 1.0), opened * scheme.d_max


class SampleNormalization(BatchNorm):
    """Group norm that replaces a batch norm and has its gamma and beta; layer norm is one group."""

    groups: int

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalise every sample over its positions and the channels of a group."""
        inputs = _wide(inputs)
        axis = self.axis % len(inputs.shape)
        moved = ops.moveaxis(inputs, axis, -1)
        shape = ops.shape(moved)
        split = ops.reshape(moved, (shape[0], -1, self.groups, shape[-1] // self.groups))
        mean, variance = ops.moments(split, (1, 3), keepdims=True)
        normal = ops.reshape((split - mean) / ops.sqrt(variance + self.epsilon), shape)
        _, affine = _axes(self, inputs)
        return _affine(self, ops.moveaxis(normal, -1, axis), affine)


def convert(model: keras.Model, scheme: Normalization) -> keras.Model:
    """Convert a built model's batch-norm layers to the scheme's layers in place; return the model.

    `GroupNorm` and `LayerNorm` keep gamma and beta and drop the moving statistics; `BatchRenorm`
    keeps all arrays and adds a counter of steps; `Frozen` adds a switch and changes no array. Other
    schemes change no layer. Convert a model before it is compiled, traced or trained. The
    remaining arrays keep their names in `flwr_colearn.keras.get_arrays`.

    Parameters
    ----------
    model : keras.Model
        A built model.
    scheme : Normalization
        The scheme of the server's strategy.

    Raises
    ------
    ColearnError
        If a layer that would be converted computes more than batch norm.
    """
    for layer in batch_norms(model):
        if isinstance(scheme, GroupNorm | LayerNorm | BatchRenorm | Frozen):
            _check_plain(layer)
            # `named_variables` names the arrays after this type, not after the new one.
            layer.converted_from = getattr(layer, "converted_from", type(layer))
        if isinstance(scheme, GroupNorm | LayerNorm):
            channels = layer.moving_mean.shape[0]
            # Changing the class keeps the layer's place in the model's graph and its variables.
            layer.__class__ = SampleNormalization
            layer.groups = scheme.groups_of(channels) if isinstance(scheme, GroupNorm) else 1
            for variable in (layer.moving_mean, layer.moving_variance):
                layer._untrack_variable(variable)
            layer.moving_mean = layer.moving_variance = None
        elif isinstance(scheme, BatchRenorm):
            # Keras locks a built layer against new variables.
            layer._tracker.unlock()
            layer.steps = layer.add_weight(
                shape=(), initializer="zeros", dtype="int32", trainable=False, name="steps"
            )
            layer._tracker.lock()
            layer.__class__, layer.scheme = BatchRenormalization, scheme
        elif isinstance(scheme, Frozen):
            layer.__class__ = FreezableBatchNormalization
            # A tf.Variable, which Keras does not track: the switch is none of the model's arrays.
            layer.frozen = tf.Variable(False, trainable=False)
    return model


@contextmanager
def normalised(model: keras.Model, config: Mapping[str, Any]) -> Iterator[None]:
    """Apply the server's normalization scheme to a model's batch-norm layers, within the block.

    See `flwr_colearn.torch.normalised`. For `Frozen` the model must be converted. For
    `Synchronised` gradients must be computed eagerly, with no ``tf.function`` around the model.

    Raises
    ------
    ColearnError
        If the scheme is not possible with this model; the message has the reason.
    """
    if config.get("normalization") == "synchronised":
        with _synchronised(list(batch_norms(model)), config):
            yield
        return
    frozen = bool(config.get("normalization-frozen"))
    layers = list(batch_norms(model)) if frozen else []
    for layer in layers:
        if not isinstance(layer, FreezableBatchNormalization):
            raise ColearnError(
                f"normalization frozen: expected layers that can be frozen, found "
                f"{type(layer).__name__}; flwr_colearn.keras.convert(model, Frozen(...)) "
                "makes them"
            )
    for layer in layers:
        layer.frozen.assign(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.frozen.assign(False)


def recalibrated(
    model: keras.Model,
    batches: Iterable[Any],
    name_of: Callable[[Any], str] | None = None,
) -> dict[str, NDArray]:
    """Return the statistics of all data under the model's weights.

    As in `flwr_colearn.torch.recalibrated`, every layer normalises with its batch, and the
    mean and the variance are taken over all batches together.

    Parameters
    ----------
    model : keras.Model
        The model, which is not changed.
    batches : iterable of arrays
        The inputs, without labels.
    name_of : callable, optional
        The function from a variable to its array's name; by default the names are those of
        `flwr_colearn.keras.get_arrays`.
    """
    layers = list(batch_norms(model))
    moments = [_Moments() for _ in layers]
    for layer, seen in zip(layers, moments, strict=True):
        layer.call = _watched(layer, seen)
    try:
        for inputs in batches:
            model(inputs, training=False)  # without dropout, which would change the statistics
    finally:
        for layer in layers:
            del layer.call
    if not moments or not moments[0].count:
        raise ColearnError(
            "recalibration: expected batch-norm layers and at least one batch of data, found none"
        )
    ours = {id(variable): name for name, variable, _ in named_variables(model)}
    name_of = name_of or (lambda variable: ours[id(variable)])
    arrays = {}
    for layer, seen in zip(layers, moments, strict=True):
        values = ((layer.moving_mean, seen.mean), (layer.moving_variance, seen.variance))
        for variable, value in values:
            arrays[name_of(variable)] = np.asarray(value, as_array(variable).dtype)
    return arrays


def _check_plain(
    layer: Any,
    known: tuple[Any, ...] = (BatchNorm, FreezableBatchNormalization, BatchRenormalization),
) -> None:
    """Raise a ColearnError for a layer that computes more than batch norm.

    A conversion would leave the rest out.
    """
    if type(layer).call not in [each.call for each in known] or getattr(layer, "renorm", False):
        raise ColearnError(
            "normalization: expected Keras's own batch-norm layers without renorm, found "
            f"{type(layer).__module__}.{type(layer).__name__}, whose call does something else "
            "besides; use a scheme that leaves layers as they are, or another model"
        )


def batch_norms(model: keras.Model) -> Iterator[Any]:
    """Yield the batch-norm layers that have statistics, at any depth."""
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and layer.moving_mean is not None:
            yield layer


@contextmanager
def _synchronised(layers: list[Any], config: Mapping[str, Any]) -> Iterator[None]:
    """Make layers normalise with the batches of all participants, within the block."""
    joint = _JointBatch(*group_of(config))
    # All layers are checked before the first is changed.
    for layer in layers:
        _check_plain(layer, (BatchNorm, FreezableBatchNormalization))
    for layer in layers:
        layer.call = partial(joint.call, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.call
    if not joint.used and any(layer.trainable for layer in layers):
        raise ColearnError(
            "synchronised normalization: expected gradients to be computed eagerly in the block, "
            "found that no layer was called there; a step compiled before it (tf.function, "
            "model.fit) does not call them"
        )


class _JointBatch:
    """One participant's batch norm over the batches of all participants in a group.

    Parameters
    ----------
    group : AllReduceGroup
        The group of participants, which call the same layers in the same order.
    rank : int
        The participant's rank in the group.

    Notes
    -----
    TensorFlow guarantees no order of the backward pass, but all participants must exchange the sums
    of the same layer at a time. Therefore every layer passes a number, its turn, to the next layer:
    the gradient of the layer depends on the gradient of that number, which exists only after the
    next layer's gradient.
    """

    def __init__(self, group: AllReduceGroup, rank: int) -> None:
        self.used = False
        self._group, self._rank = group, rank
        self._turn = tf.zeros(())

    def call(self, layer: Any, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Replace a layer's ``call``."""
        if not training or not layer.trainable:
            return type(layer).call(layer, inputs, training=training, mask=mask)
        if mask is not None:
            raise ColearnError(
                "synchronised normalization: expected inputs without a mask, found one"
            )
        if not tf.executing_eagerly():
            raise ColearnError(
                "synchronised normalization: expected gradients computed eagerly, since layers "
                "that wait for other participants would block TensorFlow's threads, found a "
                "compiled step (tf.function, model.fit)"
            )
        self.used = True
        inputs = _wide(inputs)
        normal, self._turn = self._normalise(layer, inputs)
        return _affine(layer, normal, _axes(layer, inputs)[1])

    def _normalise(self, layer: Any, inputs: Any) -> Any:
        """Return the normalised inputs and the next layer's turn."""

        @tf.custom_gradient
        def normalise(inputs: Any, turn: Any) -> Any:
            normal, *saved = self._forward(layer, inputs)

            # `next_turn`, the gradient of the turn, orders the layers; its value is not used.
            def backward(gradient: Any, next_turn: Any) -> Any:
                return self._backward(layer, gradient, normal, *saved), next_turn

            return (ops.cast(normal, inputs.dtype), turn), backward

        return normalise(inputs, self._turn)

    def _forward(self, layer: Any, inputs: Any) -> tuple[Any, Any, float, float]:
        """Return normalised inputs, sigma, the joint number of values, the share of examples."""
        # Two exchanges: the mean first, then the squared deviations from it. One exchange of sums
        # and sums of squares would lose digits.
        axes, shape = _axes(layer, inputs)
        wide = ops.cast(inputs, "float64")
        numbers = np.prod([inputs.shape[axis] for axis in axes]), inputs.shape[0]
        own = np.append(ops.sum(wide, axes).numpy(), numbers)
        *sums, total, examples = self._group.sum(self._rank, own)
        mean = np.array(sums) / total
        centered = wide - ops.reshape(mean, shape)
        squares = ops.sum(ops.square(centered), axes).numpy()
        variance = self._group.sum(self._rank, squares) / total
        _track(layer, mean, variance)  # biased, as in Keras
        sigma = ops.reshape(np.sqrt(variance + layer.epsilon), shape)
        return centered / sigma, sigma, total, inputs.shape[0] / examples

    def _backward(
        self, layer: Any, gradient: Any, normal: Any, sigma: Any, total: float, share: float
    ) -> Any:
        """Return the gradient by the inputs."""
        axes, shape = _axes(layer, gradient)
        wide = ops.cast(gradient, "float64")
        # Every participant differentiates the mean loss of its own batch. The joint loss is their
        # mean weighted by the shares of examples, by which the server averages the gradients.
        own = np.stack([ops.sum(wide, axes).numpy(), ops.sum(wide * normal, axes).numpy()]) * share
        sums = self._group.sum(self._rank, own) / (total * share)
        through = ops.reshape(sums[0], shape) + normal * ops.reshape(sums[1], shape)
        return ops.cast((wide - through) / sigma, gradient.dtype)


class _Moments:
    """Count, mean and variance by channel, merged batch by batch in float64.

    The merge is that of Chan, Golub and LeVeque (1979); a mean of squares minus the squared mean
    would cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Any = 0.0
        self.variance: Any = 0.0

    def add(self, values: NDArray) -> None:
        """Add values [N, C]."""
        values = values.astype(np.float64)
        total = self.count + len(values)
        old, new = self.count / total, len(values) / total
        shift = values.mean(0) - self.mean
        self.variance = old * self.variance + new * values.var(0) + old * new * shift**2
        self.mean = self.mean + new * shift
        self.count = total


def _watched(layer: Any, seen: _Moments) -> Callable[..., Any]:
    """Return a ``call`` for a layer that normalises with the batch and records its moments."""

    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        inputs = _wide(inputs)
        axes, shape = _axes(layer, inputs)
        channels_last = np.moveaxis(ops.convert_to_numpy(inputs), layer.axis, -1)
        seen.add(channels_last.reshape(-1, channels_last.shape[-1]))
        mean, variance = ops.moments(inputs, axes)
        sigma = ops.sqrt(variance + layer.epsilon)
        return _affine(
            layer, (inputs - ops.reshape(mean, shape)) / ops.reshape(sigma, shape), shape
        )

    return call


def _axes(layer: Any, inputs: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the axes to normalise over, and the shape in which a vector by channel broadcasts."""
    dims = len(inputs.shape)
    own = layer.axis % dims
    shape = [1] * dims
    shape[own] = -1
    return tuple(axis for axis in range(dims) if axis != own), tuple(shape)


def _wide(inputs: Any) -> Any:
    """Return inputs of half precision as float32, since statistics need it."""
    return ops.cast(inputs, keras.backend.result_type(inputs.dtype, "float32"))


def _track(layer: Any, mean: Any, variance: Any) -> None:
    """Update a layer's moving statistics with those of a batch."""
    for moving, batch in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        batch = ops.cast(batch, moving.dtype)
        moving.assign(moving * layer.momentum + batch * (1.0 - layer.momentum))


def _affine(layer: Any, normal: Any, shape: tuple[int, ...]) -> Any:
    """Apply gamma and beta, if the layer has them; return the layer's type of outputs."""
    if layer.scale:
        normal = normal * ops.reshape(ops.cast(layer.gamma, normal.dtype), shape)
    if layer.center:
        normal = normal + ops.reshape(ops.cast(layer.beta, normal.dtype), shape)
    return ops.cast(normal, layer.compute_dtype)
