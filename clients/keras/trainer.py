"""KerasTrainer, the trainer of any Keras 3 model on TensorFlow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from tqdm import tqdm

from clients.data import Examples, batches_in, shuffled_batches
from clients.objective import CLASSES, Objective
from clients.tensorflow.setup import check_device, forget_kernels, keras, tf
from clients.tensorflow.transforms import Transform, no_transform
from clients.trainer import (
    EpochResult,
    NDArray,
    check_settings,
    check_trained,
    derive_seed,
    one_example,
)
from flwr_colearn import ColearnError, Role
from flwr_colearn.keras import (
    as_array,
    assign_all,
    load,
    named_variables,
    normalised,
    recalibrated,
    roles,
)
from flwr_colearn.normalization import UsableBatches

FIRST_LOSS_SCALE = 2.0**15

STEPS_TO_GROW = 2000
"""The number of steps without an overflow after which the loss scale is doubled, as in torch."""


class KerasTrainer:
    """The trainer of a ``keras.Model`` on one participant's data, with SGD.

    The step is PyTorch's, not that of ``keras.optimizers.SGD``: ``g += weight_decay * w``,
    ``v = momentum * v + g``, ``w -= rate * v``. Keras multiplies by the learning rate before it
    adds the gradient to the momentum, so that a rate which changes from epoch to epoch would also
    affect later epochs, and it applies weight decay outside of momentum.

    Parameters
    ----------
    model : keras.Model
        A built model (with a ``keras.Input``) that maps a batch of inputs to outputs for `loss`.
    train_set : Examples
        The training inputs and labels.
    test_set : Examples, optional
        The examples of `evaluate` and `predict`.
    batch_size : int, default 32
        The batch size. The last batch of an epoch may be smaller; a last batch of a single example
        is left out of that epoch, because batch norm cannot train on it.
    momentum, weight_decay : float, default 0.9 and 0
        The parameters of SGD.
    objective : Objective, default one class for every example
        The loss and the metrics.
    loss : callable, optional
        ``(targets, outputs) -> scalar`` mean loss, such as a ``keras.losses.Loss``; by default
        the objective's. The model's own losses (regularizers) are added in training.
    transform : callable, optional
        ``(inputs, training, seed) -> inputs`` in TensorFlow: normalisation, augmentation. See
        `clients.tensorflow.transforms`.
    device : str, optional
        The device, for example ``"cpu"`` or ``"GPU:0"``; by default a GPU if there is one.
    precision : {"float32", "bfloat16", "float16"}, default "float32"
        The precision; the latter two give every layer Keras's mixed precision policy, with float32
        weights, and float16 has loss scaling.
    jit_compile : bool, default False
        Whether to compile the training step with XLA, once for each batch size.
    clip_norm : float, optional
        The L2 norm to which the gradient is clipped.

    Notes
    -----
    Random layers (dropout) must draw from a ``keras.random.SeedGenerator`` of their own, as Keras's
    layers do. The trainer sets its state for every epoch; the state is no array of the model.

    Raises
    ------
    ColearnError
        If there is nothing to train on, the model is not built or has no weights to train, Keras
        has another backend, or an argument is unknown.
    """

    def __init__(
        self,
        model: keras.Model,
        train_set: Examples,
        test_set: Examples | None = None,
        *,
        batch_size: int = 32,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        objective: Objective = CLASSES,
        loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
        transform: Transform = no_transform,
        device: str | None = None,
        precision: str = "float32",
        jit_compile: bool = False,
        clip_norm: float | None = None,
    ) -> None:
        check_settings(train_set, batch_size, precision)
        # A ClientApp builds a model and a trainer for every message.
        forget_kernels()
        self.model = model
        self.train_set, self.test_set = train_set, test_set
        self.batch_size = batch_size
        self.momentum, self.weight_decay, self.clip_norm = momentum, weight_decay, clip_norm
        self.objective = objective
        self.loss = loss or _loss_of(objective)
        self.transform = transform
        self.device = check_device(device) if device else None
        self.precision = precision
        # Each layer's policy, since the model is already built; Keras's global policy applies to
        # layers made later.
        if precision != "float32":
            for layer in model._flatten_layers():
                layer.dtype_policy = f"mixed_{precision}"
        self._variables = {name: variable for name, variable, _ in named_variables(model)}
        if not self._variables:
            raise ColearnError(
                "model: expected a built one with weights, found none; start it with keras.Input"
            )
        # By identity, because Keras's variables overload == and have no hash.
        trained = {id(variable) for variable in model.trainable_variables}
        self._trained = {n: v for n, v in self._variables.items() if id(v) in trained}
        check_trained(len(self._trained))
        # Whether batch norm uses the statistics of this participant's batch, see `normalised`.
        self._uses_own_batch = True
        self._seeds = [g for layer in model._flatten_layers() for g in layer._seed_generators]
        with self._on_device():
            self._velocities = {
                name: tf.Variable(tf.zeros(variable.shape, variable.dtype), trainable=False)
                for name, variable in self._trained.items()
                if momentum
            }
            self._loss_scale = tf.Variable(1.0, trainable=False)
            # Steps since the last change of the scale, and skipped steps of the epoch.
            # As floats, since TensorFlow places int32 variables on the CPU, where XLA's compiled
            # step on a GPU cannot use them.
            self._good_steps = tf.Variable(0.0, trainable=False)
            self._skipped = tf.Variable(0.0, trainable=False)
        self._renew_loss_scale()
        self._jit_compile = jit_compile
        self._gradients: Callable[..., Any]
        self._trace()

    def get_weights(self) -> dict[str, NDArray]:
        """Return the model's arrays by the names of `flwr_colearn.keras.get_arrays`."""
        return {name: as_array(variable) for name, variable in self._variables.items()}

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Load the arrays and reinitialise the optimizer.

        Raises
        ------
        ColearnError
            If names, shapes or types differ from the model's.
        """
        what = f"Keras model '{self.model.name}'"
        if load(self.model, self._variables, weights, what):
            self._trace()
        for velocity in self._velocities.values():
            velocity.assign(tf.zeros_like(velocity))
        self._renew_loss_scale()

    def roles(self) -> dict[str, Role]:
        """Return the role of every array, by layer type."""
        return roles(self.model)

    def train_epoch(self, learning_rate: float, seed: int, steps: int | None = None) -> EpochResult:
        """Train one pass over the local data; see `Trainer.train_epoch`."""
        self._check_batch(min(self.batch_size, len(self.train_set)))
        self._seed_layers(seed)
        self._skipped.assign(0.0)
        total, count = 0.0, 0
        batches = shuffled_batches(len(self.train_set), self.batch_size, seed)[:steps]
        with self._on_device():
            # disable=None: tqdm shows no bar unless stderr is a terminal.
            for number, indices in enumerate(
                tqdm(batches, desc="local epoch", disable=None, leave=False)
            ):
                batch = self.train_set.take(indices)
                step_seed = np.array([derive_seed(seed, 0), number])
                loss = self._train_step(
                    batch.inputs, batch.labels, np.float32(learning_rate), step_seed
                )
                total += loss * len(batch)
                count += len(batch)
        if self.precision != "float16":
            return EpochResult(float(total) / count, count)
        skipped = int(self._skipped.numpy())
        return EpochResult(float(total) / count, count, len(batches) - skipped, skipped)

    def batches_per_epoch(self) -> int:
        """Return the number of mini-batches of a full pass."""
        return batches_in(len(self.train_set), self.batch_size)

    def gradients(
        self, names: Sequence[str], step: int, seed: int
    ) -> tuple[dict[str, NDArray], EpochResult]:
        """Return the gradients of one batch's mean loss, for synchronous SGD.

        Parameters
        ----------
        names : sequence of str
            The names of the arrays to differentiate by; an unused one has gradient zero.
        step : int
            The number of the step, from 1. A pass takes its batches in turn, in its own order.
        seed : int
            The participant's seed.

        Returns
        -------
        arrays : dict
            The model's arrays after the forward pass (which updates moving statistics), with the
            gradients under `names`.
        result : EpochResult
            The loss and the size of the batch.
        """
        batch, own_seed = self._batch(step, seed), derive_seed(seed, 0, step)
        self._check_batch(len(batch))
        self._seed_layers(own_seed)
        scale = float(self._loss_scale.numpy())
        self._loss_scale.assign(1.0)
        with self._on_device():
            step_seed = np.array([derive_seed(own_seed, 0), 0])
            given = (batch.inputs, batch.labels, step_seed)
            # Tensors, because under `Synchronised` the function runs eagerly, without the signature
            # that converts arrays.
            loss, found = self._gradients(*(tf.constant(each) for each in given))
        self._loss_scale.assign(scale)
        arrays = self.get_weights()
        for name in names:
            gradient = found.get(name)
            arrays[name] = np.zeros_like(arrays[name]) if gradient is None else as_array(gradient)
        return arrays, EpochResult(float(loss), len(batch))

    def recalibrated(self) -> tuple[dict[str, NDArray], int]:
        """Return the statistics of the whole local data under the weights, without augmentation.

        Returns
        -------
        arrays : dict
            The moving means and variances by name, see `flwr_colearn.keras.recalibrated`.
        examples : int
            The number of examples; a last batch of a single one is left out, as in training.
        """
        chunks = self.train_set.chunks(max(self.batch_size, 256))
        usable = UsableBatches(chunk.inputs for chunk in chunks)
        no_seed = tf.zeros(2, tf.int64)  # nothing is drawn without augmentation
        with self._on_device():
            batches = (self.transform(tf.constant(inputs), False, no_seed) for inputs in usable)
            return recalibrated(self.model, batches), usable.examples

    @contextmanager
    def normalised(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Apply the server's normalization scheme within the block.

        Under `Synchronised`, `gradients` computes eagerly in it, see
        `flwr_colearn.keras.normalised`.
        """
        compiled = self._gradients
        synchronised = config.get("normalization") == "synchronised"
        if synchronised:
            self._gradients = self._loss_and_gradients
        self._uses_own_batch = not (synchronised or config.get("normalization-frozen"))
        try:
            with normalised(self.model, config):
                yield
        finally:
            self._gradients = compiled
            self._uses_own_batch = True

    def evaluate(self) -> dict[str, float]:
        """Return ``num-examples``, mean ``loss`` and the objective's metrics on the test set."""
        outputs, targets = self.predict()
        return {
            "num-examples": len(targets),
            "loss": float(self.loss(tf.constant(targets), tf.constant(outputs))),
            **self.objective.metrics(outputs, targets),
        }

    def predict(self) -> tuple[NDArray, NDArray]:
        """Return the model's outputs (float32) and the targets on the test set, in its order."""
        if self.test_set is None:
            raise ColearnError("test_set: expected a data set to evaluate on, found None")
        chunks = self.test_set.chunks(max(self.batch_size, 256))
        with self._on_device():
            outputs = [self._predict_batch(chunk.inputs).numpy() for chunk in chunks]
        return np.concatenate(outputs), self.test_set.labels

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return the momentum of every trained array by the array's name."""
        return {name: as_array(velocity) for name, velocity in self._velocities.items()}

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Load momentum that `get_optimizer_state` returned."""
        assign_all(self._velocities, state, f"momentum of Keras model '{self.model.name}'")

    def get_loss_scale(self) -> dict[str, NDArray]:
        """Return the loss scale and the number of steps since its last change."""
        return {name: as_array(variable) for name, variable in self._scaling.items()}

    def set_loss_scale(self, state: Mapping[str, NDArray]) -> None:
        """Load what `get_loss_scale` returned; call it after `set_weights`."""
        assign_all(self._scaling, state, f"loss scale of Keras model '{self.model.name}'")

    @property
    def _scaling(self) -> dict[str, tf.Variable]:
        return {"scale": self._loss_scale, "good-steps": self._good_steps}

    def _step(
        self, inputs: tf.Tensor, targets: tf.Tensor, rate: tf.Tensor, seed: tf.Tensor
    ) -> tf.Tensor:
        """Make one step of SGD; return the loss."""
        loss, gradients = self._loss_and_gradients(inputs, targets, seed)
        # Loss scaling: a step whose gradients overflow float16 is skipped and the scale halved.
        if self.precision == "float16":
            finite = tf.reduce_all(
                [tf.reduce_all(tf.math.is_finite(g)) for g in gradients.values()]
            )
            tf.cond(finite, lambda: self._apply_scaled(gradients, rate), self._skip)
        else:
            self._apply(gradients, rate)
        return loss

    def _loss_and_gradients(
        self, inputs: tf.Tensor, targets: tf.Tensor, seed: tf.Tensor
    ) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
        """Return the loss in training, and its gradients by name."""
        with tf.GradientTape() as tape:
            outputs = self.model(self.transform(inputs, True, seed), training=True)
            losses = [self.loss(targets, tf.cast(outputs, tf.float32)), *self.model.losses]
            loss = tf.add_n([tf.cast(each, tf.float32) for each in losses])
            scaled = loss * self._loss_scale
        names = list(self._trained)
        found = tape.gradient(scaled, [self._trained[name].value for name in names])
        return loss, {
            name: tf.convert_to_tensor(gradient) / tf.cast(self._loss_scale, gradient.dtype)
            for name, gradient in zip(names, found, strict=True)
            if gradient is not None  # the loss does not depend on these weights
        }

    def _apply(self, gradients: dict[str, tf.Tensor], rate: tf.Tensor) -> None:
        if self.clip_norm is not None:
            clipped, _ = tf.clip_by_global_norm(list(gradients.values()), self.clip_norm)
            gradients = dict(zip(gradients, clipped, strict=True))
        for name, gradient in gradients.items():
            variable = self._trained[name]
            step = gradient + self.weight_decay * variable.value
            if self.momentum:
                velocity = self._velocities[name]
                step = velocity.assign(self.momentum * velocity + step)
            variable.assign_sub(tf.cast(rate, step.dtype) * step)
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))

    def _apply_scaled(self, gradients: dict[str, tf.Tensor], rate: tf.Tensor) -> None:
        """Make a step with finite gradients; double the scale after many of them."""
        self._apply(gradients, rate)
        grows = self._good_steps.assign_add(1.0) >= STEPS_TO_GROW
        self._loss_scale.assign(tf.where(grows, self._loss_scale * 2, self._loss_scale))
        self._good_steps.assign(tf.where(grows, 0.0, self._good_steps))

    def _skip(self) -> None:
        """Skip a step whose gradients overflowed, and halve the scale."""
        self._skipped.assign_add(1.0)
        self._good_steps.assign(0.0)
        self._loss_scale.assign(self._loss_scale / 2)

    def _trace(self) -> None:
        """Compile the functions of a step anew, at their next call."""
        # With an open batch size a smaller last batch does not trace the step again.
        batch, labels = (
            tf.TensorSpec((None, *array.shape[1:]), array.dtype)
            for array in (self.train_set.inputs, self.train_set.labels)
        )
        rate, seed = tf.TensorSpec((), tf.float32), tf.TensorSpec((2,), tf.int64)
        jit = {"jit_compile": self._jit_compile}
        self._train_step = tf.function(
            self._step, input_signature=[batch, labels, rate, seed], **jit
        )
        self._gradients = tf.function(
            self._loss_and_gradients, input_signature=[batch, labels, seed], **jit
        )
        self._predict_batch = tf.function(self._outputs, input_signature=[batch])

    def _renew_loss_scale(self) -> None:
        """Set the first loss scale of a round; it lives through all epochs of the round.

        The first steps may overflow, which with few batches may be all steps of an epoch.
        """
        self._loss_scale.assign(FIRST_LOSS_SCALE if self.precision == "float16" else 1.0)
        self._good_steps.assign(0.0)

    def _outputs(self, inputs: tf.Tensor) -> tf.Tensor:
        no_seed = tf.zeros(2, tf.int64)  # nothing is drawn in evaluation
        outputs = self.model(self.transform(inputs, False, no_seed), training=False)
        return tf.cast(outputs, tf.float32)

    def _batch(self, step: int, seed: int) -> Examples:
        """Return the batch of a step, in the order that `train_epoch` has within a pass."""
        count = len(self.train_set)
        done, place = divmod(step - 1, len(shuffled_batches(count, self.batch_size, 0)))
        batches = shuffled_batches(count, self.batch_size, derive_seed(seed, done + 1))
        return self.train_set.take(batches[place])

    def _check_batch(self, size: int) -> None:
        """Raise a ColearnError if a batch has one example and batch norm one value a channel.

        Keras would compute with a variance of zero: outputs without any signal, and a moving
        variance that decays.
        """
        layers = self.model._flatten_layers()
        if size == 1 and self._uses_own_batch and any(map(_needs_two, layers)):
            raise one_example(size, len(self.train_set))

    def _seed_layers(self, seed: int) -> None:
        """Set the state of random layers (dropout) from a seed."""
        for index, generator in enumerate(self._seeds):
            generator.state.assign([derive_seed(seed, 1, index), 0])

    def _on_device(self) -> Any:
        return tf.device(self.device) if self.device else nullcontext()


def _needs_two(layer: keras.Layer) -> bool:
    """Return whether a layer computes statistics over nothing but the examples of a batch."""
    return (
        isinstance(layer, keras.layers.BatchNormalization)
        # Group and layer norm, to which a scheme converts, have none.
        and layer.moving_mean is not None
        # Keras's batch norm uses its moving statistics where it is not trained.
        and layer.trainable
        and layer.input_spec.ndim == 2
    )


def _loss_of(objective: Objective) -> keras.losses.Loss:
    if objective.multi_label:
        return keras.losses.BinaryCrossentropy(from_logits=True)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
