"""SlimTrainer, the trainer of a TF-slim model function, in graph mode with a session."""

from collections.abc import Callable, Iterable, Mapping
from logging import WARNING
from typing import Any

import numpy as np
from flwr.common import log
from tqdm import tqdm

from clients.data import Examples, batches_in, shuffled_batches
from clients.objective import CLASSES, Objective
from clients.slim.compat import slim, tf
from clients.tensorflow.setup import check_device
from clients.tensorflow.transforms import Transform, no_transform
from clients.trainer import EpochResult, NDArray, check_settings, derive_seed
from flwr_colearn import ColearnError, Role
from flwr_colearn.aggregation import check_weights

tf1 = tf.compat.v1

ModelFunction = Callable[[tf.Tensor, bool], tf.Tensor]
"""``(inputs, is_training) -> outputs``, which calls slim's layers under its own arg_scopes."""

_STATELESS = {
    "RandomUniform": tf.random.stateless_uniform,
    "RandomStandardNormal": tf.random.stateless_normal,
    "TruncatedNormal": tf.random.stateless_truncated_normal,
}

_STATISTICS = {"moving_mean": Role.MEAN, "moving_variance": Role.VARIANCE}


class SlimTrainer:
    """The trainer of a TF-slim model function on one participant's data, with SGD.

    The function is called twice in a graph of the trainer's own: for training, and, with the same
    variables, for evaluation. The step is ``slim``'s ``create_train_op`` with TensorFlow's momentum
    optimizer, which is PyTorch's SGD; the learning rate is a placeholder.

    Parameters
    ----------
    model : callable
        ``(inputs, is_training) -> outputs`` for `loss`.
    train_set : Examples
        The training inputs and labels.
    test_set : Examples, optional
        The examples of `evaluate` and `predict`.
    seed : int, default 0
        The seed of the initial weights.
    batch_size : int, default 32
        The batch size. The last batch of an epoch may be smaller; a last batch of a single example
        is left out of that epoch, because batch norm cannot train on it.
    momentum, weight_decay : float, default 0.9 and 0
        The parameters of SGD. Regularizers of the model's arg_scopes are added to weight decay.
    objective : Objective, default one class for every example
        The loss and the metrics.
    loss : callable, optional
        ``(targets, outputs) -> scalar`` mean loss in TensorFlow; by default the objective's. The
        regularization losses are added in training.
    transform : callable, optional
        ``(inputs, training, seed) -> inputs`` in TensorFlow: normalisation, augmentation. See
        `clients.tensorflow.transforms`.
    device : str, optional
        The device, for example ``"cpu"`` or ``"GPU:0"``; by default a GPU if there is one.
    clip_norm : float, optional
        The L2 norm to which the gradient is clipped.

    Notes
    -----
    A graph fixes the seeds of its random operations when it is built. The operations of dropout and
    noise are therefore replaced by stateless ones, which draw from each epoch's seed.

    Raises
    ------
    ColearnError
        If there is nothing to train on, or the model has no variables.
    """

    def __init__(
        self,
        model: ModelFunction,
        train_set: Examples,
        test_set: Examples | None = None,
        *,
        seed: int = 0,
        batch_size: int = 32,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        objective: Objective = CLASSES,
        loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
        transform: Transform = no_transform,
        device: str | None = None,
        clip_norm: float | None = None,
    ) -> None:
        check_settings(train_set, batch_size)
        self.train_set, self.test_set = train_set, test_set
        self.objective = objective
        self.batch_size = batch_size
        self.weight_decay, self.clip_norm = weight_decay, clip_norm
        self.name = getattr(model, "__name__", "network")
        self.graph = tf.Graph()
        with self.graph.as_default(), tf.device(check_device(device) if device else None):
            tf1.set_random_seed(seed)
            self._build(model, transform, loss or _loss_of(objective), momentum)
            initialize = tf1.global_variables_initializer()
            self._forget = tf1.variables_initializer(self._optimizer.variables())
        options = tf1.ConfigProto(allow_soft_placement=True)  # some operations are for CPUs only
        # By default a session takes nearly all of a GPU's memory; participants may share one.
        options.gpu_options.allow_growth = True
        self._session = tf1.Session(graph=self.graph, config=options)
        self._session.run(initialize)

    def get_weights(self) -> dict[str, NDArray]:
        """Return all variables of the model by name, moving averages included."""
        return self._session.run(self._variables)  # type: ignore[no-any-return]

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Load the variables and reinitialise the optimizer.

        Raises
        ------
        ColearnError
            If names, shapes or types differ from the model's.
        """
        self._load(self._variables, weights, f"TF-slim model '{self.name}'")
        self._session.run(self._forget)

    def roles(self) -> dict[str, Role]:
        """Return the role of every variable.

        Slim's layers are functions, so a variable has no layer type. But its batch norm always
        names its untrained moving averages ``moving_mean`` and ``moving_variance``: those are
        statistics. Other untrained variables are ``buffer``, or ``counter`` if they are integers.
        """
        return {name: self._role(name, variable) for name, variable in self._variables.items()}

    def train_epoch(self, learning_rate: float, seed: int, steps: int | None = None) -> EpochResult:
        """Train one pass over the local data; see `Trainer.train_epoch`."""
        total, count = 0.0, 0
        batches = shuffled_batches(len(self.train_set), self.batch_size, seed)[:steps]
        # disable=None: tqdm shows no bar unless stderr is a terminal.
        for number, indices in enumerate(
            tqdm(batches, desc="local epoch", disable=None, leave=False)
        ):
            batch = self.train_set.take(indices)
            feed = {
                self._inputs: batch.inputs,
                self._targets: batch.labels,
                self._rate: learning_rate,
                self._seed: [derive_seed(seed), number],
            }
            total += self._session.run(self._train_op, feed) * len(batch)
            count += len(batch)
        return EpochResult(float(total) / count, count)

    def batches_per_epoch(self) -> int:
        """Return the number of mini-batches of a full pass."""
        return batches_in(len(self.train_set), self.batch_size)

    def evaluate(self) -> dict[str, float]:
        """Return ``num-examples``, mean ``loss`` and the objective's metrics on the test set."""
        outputs, targets = self.predict()
        feed = {self._outputs: outputs, self._targets: targets}
        return {
            "num-examples": len(targets),
            "loss": float(self._session.run(self._loss, feed)),
            **self.objective.metrics(outputs, targets),
        }

    def predict(self) -> tuple[NDArray, NDArray]:
        """Return the model's outputs (float32) and the targets on the test set, in its order."""
        if self.test_set is None:
            raise ColearnError("test_set: expected a data set to evaluate on, found None")
        outputs = [
            self._session.run(self._outputs, {self._inputs: chunk.inputs})
            for chunk in self.test_set.chunks(max(self.batch_size, 256))
        ]
        return np.concatenate(outputs), self.test_set.labels

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return the momentum of every trained variable by the variable's name."""
        return self._session.run(self._velocities)  # type: ignore[no-any-return]

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Load momentum that `get_optimizer_state` returned."""
        self._load(self._velocities, state, f"momentum of TF-slim model '{self.name}'")

    def _build(
        self,
        model: ModelFunction,
        transform: Transform,
        loss: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
        momentum: float,
    ) -> None:
        inputs, labels = self.train_set.inputs, self.train_set.labels
        self._inputs = tf1.placeholder(inputs.dtype, (None, *inputs.shape[1:]))
        self._targets = tf1.placeholder(labels.dtype, (None, *labels.shape[1:]))
        self._rate = tf1.placeholder(tf.float32, ())
        self._seed = tf1.placeholder(tf.int64, (2,))
        # Slim numbers unnamed layers within a variable scope. Entering the scope starts the numbers
        # again, so the second call finds the variables of the first by the same names.
        with tf1.variable_scope(tf1.get_variable_scope()):
            trained = model(transform(self._inputs, True, self._seed), True)
        _draw_from(self._seed, trained)
        with tf1.variable_scope(tf1.get_variable_scope(), reuse=True):
            no_seed = tf.zeros(2, tf.int64)  # nothing is drawn in evaluation
            self._outputs = model(transform(self._inputs, False, no_seed), False)
        self._variables = {v.name.removesuffix(":0"): v for v in tf1.global_variables()}
        if not self._variables:
            raise ColearnError("model: expected a function that makes variables, found none")
        self._loss = loss(self._targets, self._outputs)
        self._optimizer = (
            tf1.train.MomentumOptimizer(self._rate, momentum)
            if momentum
            else tf1.train.GradientDescentOptimizer(self._rate)
        )
        self._train_op = slim.training.create_train_op(
            tf.add_n([loss(self._targets, trained), *tf1.losses.get_regularization_losses()]),
            self._optimizer,
            global_step=None,
            transform_grads_fn=self._clip_and_decay,
            check_numerics=False,  # the server refuses models with NaN and names the participant
        )
        slots = {
            name: self._optimizer.get_slot(variable, "momentum")
            for name, variable in self._variables.items()
        }
        self._velocities = {name: slot for name, slot in slots.items() if slot is not None}

    def _clip_and_decay(
        self, pairs: Iterable[tuple[tf.Tensor, tf.Variable]]
    ) -> list[tuple[tf.Tensor, tf.Variable]]:
        """Return (gradient, variable) pairs with clipping before weight decay, as in PyTorch."""
        gradients, variables = zip(*pairs, strict=True)
        if self.clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm)
        return [
            (gradient + self.weight_decay * variable if self.weight_decay else gradient, variable)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]

    def _load(
        self, variables: Mapping[str, tf.Variable], arrays: Mapping[str, NDArray], what: str
    ) -> None:
        check_weights(arrays, variables, what)
        # The arrays are fed as the initial values: assignments would add operations to the graph
        # in every round.
        feed = {v.initializer.inputs[1]: arrays[name] for name, v in variables.items()}
        self._session.run([v.initializer for v in variables.values()], feed)

    def _role(self, name: str, variable: tf.Variable) -> Role:
        if variable.trainable:
            return Role.TRAINABLE
        if not variable.dtype.is_floating:
            return Role.COUNTER
        layer, _, last = name.rpartition("/")
        prefix = f"{layer}/" if layer else ""
        if last in _STATISTICS and all(prefix + each in self._variables for each in _STATISTICS):
            return _STATISTICS[last]
        return Role.BUFFER


def _loss_of(objective: Objective) -> Callable[[tf.Tensor, tf.Tensor], tf.Tensor]:
    return _binary_cross_entropy if objective.multi_label else _cross_entropy


def _binary_cross_entropy(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=outputs))


def _cross_entropy(targets: tf.Tensor, outputs: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(
        tf.nn.sparse_softmax_cross_entropy_with_logits(labels=targets, logits=outputs)
    )


def _draw_from(seed: tf.Tensor, outputs: tf.Tensor) -> None:
    """Make the random operations that `outputs` depend on draw from `seed`."""
    for number, operation in enumerate(_ancestors(outputs)):
        if operation.type not in _STATELESS:
            if operation.type.startswith("Random"):
                log(
                    WARNING,
                    "'%s' draws with %s, which cannot follow the seed of an epoch: a restarted "
                    "round will not give the same weights.",
                    operation.name,
                    operation.type,
                )
            continue
        [drawn] = operation.outputs
        replacement = _STATELESS[operation.type](
            operation.inputs[0], tf.random.fold_in(seed, number), dtype=drawn.dtype
        )
        # Rewires the graph: TensorFlow has no public function for it.
        for consumer in drawn.consumers():
            for index, tensor in enumerate(consumer.inputs):
                if tensor is drawn:
                    consumer._update_input(index, replacement)


def _ancestors(tensor: tf.Tensor) -> list[Any]:
    """Return the operations that a tensor depends on, in an order that only the graph decides."""
    # A dict, not a set, keeps the order of insertion: an operation's number is part of its seed.
    found: dict[Any, None] = {}
    ahead = [tensor.op]
    while ahead:
        operation = ahead.pop()
        if operation not in found:
            found[operation] = None
            ahead.extend(each.op for each in operation.inputs)
    return list(found)
