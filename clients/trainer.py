"""The Trainer protocol and the training of a LocalPlan, independent of any framework."""

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flwr_colearn import ColearnError, Epoch, LocalPlan, Role, track
from flwr_colearn.errors import whole_number

NDArray = npt.NDArray[Any]

_MOST_PASSES = 20
"""The number of passes over data after which a loss scale of 2^16 that is halved in each is below
1, even where a pass has one batch only."""


@dataclass(frozen=True)
class EpochResult:
    """The result of one local epoch.

    Attributes
    ----------
    loss : float
        The mean training loss.
    num_examples : int
        The number of examples seen.
    steps, skipped : int, optional
        With loss scaling, the number of steps that changed the weights, and of those that were
        skipped because the scaled gradients overflowed; ``None`` where no step can be skipped.
    """

    loss: float
    num_examples: int
    steps: int | None = None
    skipped: int | None = None


class Trainer(Protocol):
    """A model with its participant's data: the interface that every framework implements."""

    def get_weights(self) -> dict[str, NDArray]:
        """Return the model's arrays by name, statistics and counters included."""

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Load these arrays, which may be read-only, and start with a new optimizer."""

    def roles(self) -> dict[str, Role]:
        """Return the role of every array by the type of its layer, for ``CoLearn(roles=...)``."""

    def train_epoch(self, learning_rate: float, seed: int, steps: int | None = None) -> EpochResult:
        """Train one pass over the local data.

        Parameters
        ----------
        learning_rate : float
            The learning rate of every step of the epoch.
        seed : int
            The seed of the order of the data, augmentation and dropout: the same seed and the same
            initial weights give the same trained weights.
        steps : int, optional
            The number of mini-batches after which the pass ends; by default all of them. Only plans
            with steps in place of local epochs have it.
        """

    def batches_per_epoch(self) -> int:
        """Return the number of mini-batches of a full pass, for plans that ask for steps."""

    def evaluate(self) -> dict[str, float]:
        """Return ``num-examples``, ``loss`` and the task's metrics on the evaluation data."""

    def predict(self) -> tuple[NDArray, NDArray]:
        """Return the model's outputs (float32) and the targets on the evaluation data, in order."""

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return the optimizer's state as arrays, for participants that store it."""

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Load an optimizer state that was returned earlier; call it after `set_weights`."""


def follow(
    plan: LocalPlan,
    trainer: Trainer,
    seed: int,
    state_dir: str | None = None,
    name: str = "participant",
) -> dict[str, float]:
    """Train the local epochs of a plan.

    Parameters
    ----------
    plan : LocalPlan
        The local epochs of the round and their learning rates.
    trainer : Trainer
        The trainer, whose weights are trained in place.
    seed : int
        The participant's seed. Every epoch of the run has a seed of its own, drawn from this one
        and the epoch's number in the run, so a repeated round gives exactly the same weights.
    state_dir : str, optional
        The folder in which the last finished epoch is saved, from which an interrupted round goes
        on; see `flwr_colearn.LocalPlan.resumable`. A trainer with loss scaling has the methods
        ``get_loss_scale() -> arrays`` and ``set_loss_scale(arrays)`` for it.
    name : str
        The participant's name, for the name of the file.

    Returns
    -------
    dict
        ``num-examples`` of an epoch (the largest, if the last one is shorter), and the last epoch's
        ``train-loss`` and ``learning-rate``; with loss scaling also ``skipped-steps`` of the round.

    Raises
    ------
    ColearnError
        If an epoch made no step, because all of its gradients overflowed.
    """
    skipped: list[int] = []
    examples: list[int] = []
    by_steps = plan.local_steps is not None
    if by_steps:
        plan = plan.over(trainer.batches_per_epoch())

    def save() -> dict[str, NDArray]:
        # The seed decides the epochs that follow, so it is a part of what identifies the round.
        own = {
            "seed": np.array(str(seed)),
            "skipped": np.array(skipped, np.int64),
            "examples": np.array(examples, np.int64),
        }
        return {**own, **state_of(trainer)}

    def load(state: Mapping[str, NDArray]) -> None:
        restore(trainer, state)
        skipped[:], examples[:] = state["skipped"].tolist(), state["examples"].tolist()

    # At least the last epoch is trained, so that `result` and `epoch` are defined after the loop.
    epochs = plan.resumable(state_dir, save, load, name)
    for epoch in track(epochs, f"round {plan.round}", plan.local_epochs):
        # The server counts local epochs of its own in `epochs_done`, not this site's passes.
        number = (plan.round, epoch.index) if by_steps else (plan.epochs_done + epoch.index,)
        result = _trained(trainer, epoch, derive_seed(seed, *number), skipped)
        examples.append(result.num_examples)
    metrics: dict[str, float] = {
        "num-examples": max(examples),
        "train-loss": result.loss,
        "learning-rate": epoch.learning_rate,
    }
    return {**metrics, "skipped-steps": sum(skipped)} if skipped else metrics


def state_of(trainer: Trainer) -> dict[str, NDArray]:
    """Return all arrays that a trainer's next epoch depends on, weights as ``weights/NAME``."""
    return {
        f"{part}/{name}": array
        for part, (get, _) in _PARTS.items()
        for name, array in getattr(trainer, get, dict)().items()
    }


def restore(trainer: Trainer, state: Mapping[str, NDArray]) -> None:
    """Load what `state_of` returned."""
    parts: dict[str, dict[str, NDArray]] = {part: {} for part in _PARTS}
    for key, array in state.items():
        part, _, name = key.partition("/")
        if name:
            parts[part][name] = array
    # The weights come first, since with them a trainer begins with a new optimizer and loss scale.
    for part, (_, put) in _PARTS.items():
        if hasattr(trainer, put):
            getattr(trainer, put)(parts[part])


_PARTS = {
    "weights": ("get_weights", "set_weights"),
    "optimizer": ("get_optimizer_state", "set_optimizer_state"),
    "loss-scale": ("get_loss_scale", "set_loss_scale"),
}


def _trained(trainer: Trainer, epoch: Epoch, seed: int, skipped: list[int]) -> EpochResult:
    """Train one epoch; repeat it while every step of it is skipped, since it then trained nothing.

    The number of skipped steps of each pass is appended to `skipped`.
    """
    for _ in range(_MOST_PASSES):
        # A trainer without `steps` serves every plan but those that ask for steps.
        steps = () if epoch.steps is None else (epoch.steps,)
        result = trainer.train_epoch(epoch.learning_rate, seed, *steps)
        if result.skipped is not None:
            skipped.append(result.skipped)
        if result.steps != 0:
            return result
        # A smaller loss scale helps against overflow only.
        if not math.isfinite(result.loss):
            break
    raise ColearnError(
        f"local epoch in float16: expected at least one step, found all {result.skipped} skipped "
        f"because gradients were not finite (loss {result.loss:.4g}); check this site's data and "
        "the learning rate, or set precision to bfloat16 or float32"
    )


def check_settings(train_set: Sized, batch_size: int, precision: str = "float32") -> None:
    """Raise a ColearnError unless a trainer can train with these settings.

    Parameters
    ----------
    train_set : sized
        The training examples, at least one.
    batch_size : int
        A whole number of at least 1.
    precision : str, default "float32"
        "float32", "bfloat16" or "float16".
    """
    if len(train_set) == 0:
        raise ColearnError("train_set: expected at least one example, found none")
    whole_number("batch_size", batch_size, least=1)
    if precision not in ("float32", "bfloat16", "float16"):
        raise ColearnError(f"precision: expected float32, bfloat16 or float16, found {precision!r}")


def check_trained(parameters: int) -> None:
    """Raise a ColearnError unless a model has parameters to train."""
    if not parameters:
        raise ColearnError(
            "model: expected at least one parameter that is trained, found none; are all layers "
            "frozen?"
        )


def one_example(batch: int, examples: int) -> ColearnError:
    """Return the error for a batch that is too small for a model's normalization layers."""
    return ColearnError(
        f"normalization: expected more than one value of each channel in a training batch, found "
        f"a batch of {batch} of this site's {examples} examples; give the site more examples, a "
        "larger batch_size, or the model layers without batch statistics (the schemes GroupNorm "
        "and LayerNorm)"
    )


def accuracy(outputs: NDArray, targets: NDArray) -> float:
    """Return the share of examples [N] whose target has the largest output [N, classes]."""
    return float((outputs.argmax(1) == targets).mean())


def derive_seed(*numbers: int) -> int:
    """Return a 32-bit seed drawn from whole numbers of at least 0."""
    # SeedSequence hashes its numbers: sums such as seed + index would collide between runs.
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
