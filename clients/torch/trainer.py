"""TorchTrainer, the trainer of any ``nn.Module``."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset
from tqdm import tqdm

from clients.objective import CLASSES, Objective
from clients.torch.transforms import Transform
from clients.trainer import (
    EpochResult,
    NDArray,
    check_settings,
    check_trained,
    derive_seed,
    one_example,
)
from flwr_colearn import ColearnError, Role
from flwr_colearn.normalization import UsableBatches
from flwr_colearn.torch import (
    check_state,
    get_arrays,
    normalised,
    recalibrated,
    roles,
    set_arrays,
    to_array,
)


class TorchTrainer:
    """The trainer of an ``nn.Module`` on one participant's data, with SGD.

    Parameters
    ----------
    model : nn.Module
        Any module that maps a batch of inputs to outputs for `loss`.
    train_set : Dataset
        The training examples (input, target). A ``TensorDataset`` is indexed a batch at a time, on
        the device if it takes no more than half of the memory that is free there. A data set that
        draws random numbers has a method ``seeded(seed)``, which returns the data set of one epoch.
    test_set : Dataset, optional
        The examples of `evaluate` and `predict`.
    batch_size : int, default 32
        The batch size. The last batch of an epoch may be smaller; a last batch of a single example
        is left out of that epoch, because batch norm cannot train on it.
    momentum, weight_decay : float, default 0.9 and 0
        The parameters of SGD.
    objective : Objective, default one class for every example
        The loss and the metrics.
    loss : callable, optional
        ``(outputs, targets) -> scalar`` mean loss; by default the objective's.
    transform : callable, optional
        ``(inputs, training) -> inputs`` on the device: normalisation, augmentation.
    device : str or torch.device, optional
        The device; by default ``cuda`` if there is one, else ``cpu``.
    precision : {"float32", "bfloat16", "float16"}, default "float32"
        The precision; the latter two train under autocast, float16 with loss scaling. A model with
        parameters of bfloat16 always computes in bfloat16.
    channels_last : bool, default False
        Whether the model and its 4-d inputs are channels-last: faster convolutions on recent GPUs.
        By default inputs have the format that `transform` returns.
    jit_compile : bool, default False
        Whether to train through ``torch.compile``.
    clip_norm : float, optional
        The L2 norm to which the gradient is clipped.
    workers : int, default 0
        The number of processes that load data which is not on the device.

    Raises
    ------
    ColearnError
        If there is nothing to train on, the model has no parameter to train, lazy ones or a state
        that is no tensor, or an argument is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset[Any],
        test_set: Dataset[Any] | None = None,
        *,
        batch_size: int = 32,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        objective: Objective = CLASSES,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        transform: Transform | None = None,
        device: str | torch.device | None = None,
        precision: str = "float32",
        channels_last: bool = False,
        jit_compile: bool = False,
        clip_norm: float | None = None,
        workers: int = 0,
    ) -> None:
        check_settings(train_set, batch_size, precision)  # type: ignore[arg-type]
        check_state(model)
        check_trained(sum(p.requires_grad for p in model.parameters()))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.channels_last = channels_last
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model: nn.Module = model.to(  # type: ignore[call-overload]  # torch takes both at once
            self.device, memory_format=memory_format
        )
        # Training calls `network`, which may wrap the model (torch.compile, data parallel). The
        # state dict is always the model's own, whose names have no prefix of a wrapper.
        self.network: Callable[..., Any] = torch.compile(self.model) if jit_compile else self.model
        self.train_set, self.test_set = train_set, test_set
        self.batch_size = batch_size
        self.objective = objective
        self.loss = (
            loss or (nn.BCEWithLogitsLoss if objective.multi_label else nn.CrossEntropyLoss)()
        )
        self.transform = transform or (lambda inputs, training: inputs)
        # A bfloat16 layer takes no float32 inputs; under autocast it gets them converted.
        self._in_bfloat16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
        self.precision = "bfloat16" if self._in_bfloat16 else precision
        self.clip_norm = clip_norm
        self.workers = workers
        self._resident: WeakKeyDictionary[TensorDataset, tuple[Tensor, ...] | None]
        self._resident = WeakKeyDictionary()
        self._sgd = {"momentum": momentum, "weight_decay": weight_decay}
        self._renew_optimizer()

    def get_weights(self) -> dict[str, NDArray]:
        """Return the state dict as numpy arrays."""
        return get_arrays(self.model)

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Load the state dict and reinitialise the optimizer.

        Raises
        ------
        ColearnError
            If names or shapes differ from the model's.
        """
        set_arrays(self.model, weights)
        self._renew_optimizer()

    def roles(self) -> dict[str, Role]:
        """Return the role of every array of the state dict, by module type."""
        return roles(self.model)

    def train_epoch(self, learning_rate: float, seed: int, steps: int | None = None) -> EpochResult:
        """Train one pass over the local data; see `Trainer.train_epoch`."""
        self._seed(self.own_seed(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.model.train()
        scaler, stepped, skipped = self._scaler, 0, 0
        # The sum stays on the device: reading it in every step would wait for the GPU.
        total, count = torch.zeros((), device=self.device), 0
        # disable=None: tqdm shows no bar unless stderr is a terminal.
        for inputs, targets in tqdm(
            self._train_batches(seed, steps), desc="local epoch", disable=None, leave=False
        ):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._forward(inputs, targets)
            scaler.scale(loss).backward()
            if self.clip_norm is not None:
                # The norm is that of the true gradients, so they are unscaled before.
                scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            if self._stepped():
                stepped += 1
            else:
                skipped += 1
            total += loss.detach() * len(targets)
            count += len(targets)
        scaled = scaler.is_enabled()
        return EpochResult(
            float(total) / count, count, stepped if scaled else None, skipped if scaled else None
        )

    def batches_per_epoch(self) -> int:
        """Return the number of mini-batches of a full pass."""
        return sum(1 for _ in self.own_part(self._sampler(seed=0)))

    def _stepped(self) -> bool:
        """Make the optimizer's step; return False if loss scaling skipped it."""
        before = self._scaler.get_scale()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        # The scaler decreases the scale where it has skipped the step, and only there; a scale
        # that has reached 0, where every step has overflowed, cannot decrease.
        return self._scaler.get_scale() >= before > 0

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
            The state dict after the forward pass (which updates running statistics), with the
            gradients under `names`.
        result : EpochResult
            The loss and the size of the batch.
        """
        self.model.train()
        inputs, targets = self._batch(step, seed)
        self._seed(derive_seed(seed, 0, step))
        self.model.zero_grad(set_to_none=True)
        loss = self._forward(inputs, targets)
        loss.backward()
        arrays, wanted = self.get_weights(), set(names)
        # Tied parameters have several names in the state dict, and each gets the gradient.
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in wanted:
                gradient = parameter.grad
                arrays[name] = (
                    np.zeros_like(arrays[name]) if gradient is None else to_array(gradient, name)
                )
        self.model.zero_grad(set_to_none=True)
        return arrays, EpochResult(float(loss.detach()), len(targets))

    def recalibrated(self) -> tuple[dict[str, NDArray], int]:
        """Return the statistics of the whole local data under the weights, without augmentation.

        Returns
        -------
        arrays : dict
            The running means and variances by name, see `flwr_colearn.torch.recalibrated`.
        examples : int
            The number of examples.
        """
        size = max(self.batch_size, 256)
        order = range(len(self.train_set))  # type: ignore[arg-type]
        loader = self._loader(self.train_set, BatchSampler(order, size, drop_last=False))
        usable = UsableBatches(inputs for inputs, _ in loader)
        batches = (self._prepare(inputs, training=False) for inputs in usable)
        with self._autocast() if self._in_bfloat16 else nullcontext():
            return recalibrated(self.model, batches), usable.examples

    def normalised(self, config: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Return a context manager that applies the server's normalization scheme."""
        return normalised(self.model, config)

    def evaluate(self) -> dict[str, float]:
        """Return ``num-examples``, mean ``loss`` and the objective's metrics on the test set."""
        outputs, targets = self.predict()
        loss = self.loss(torch.from_numpy(outputs), torch.from_numpy(targets))
        return {
            "num-examples": len(targets),
            "loss": float(loss),
            **self.objective.metrics(outputs, targets),
        }

    @torch.no_grad()
    def predict(self) -> tuple[NDArray, NDArray]:
        """Return the model's outputs (float32) and the targets on the test set, in its order."""
        if self.test_set is None:
            raise ColearnError("test_set: expected a data set to evaluate on, found None")
        self.model.eval()
        outputs, targets = [], []
        for inputs, target in self._test_batches(self.test_set):
            with self._autocast():
                outputs.append(self.model(self._prepare(inputs, training=False)).float().cpu())
            targets.append(target.cpu())
        return torch.cat(outputs).numpy(), torch.cat(targets).numpy()

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return SGD's buffers by ``parameter index/name``."""
        # By index, since torch's optimizers do not know the parameters' names.
        state = self.optimizer.state_dict()["state"]
        return {
            f"{index}/{name}": to_array(value, name)
            for index, values in state.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Load buffers that `get_optimizer_state` returned."""
        buffers: dict[int, dict[str, Tensor]] = {}
        for key, array in state.items():
            index, _, name = key.partition("/")
            buffers.setdefault(int(index), {})[name] = torch.from_numpy(np.array(array))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": buffers, "param_groups": groups})

    def get_loss_scale(self) -> dict[str, NDArray]:
        """Return the loss scale and what decides when it changes; empty without loss scaling."""
        return {name: np.array(value) for name, value in self._scaler.state_dict().items()}

    def set_loss_scale(self, state: Mapping[str, NDArray]) -> None:
        """Load what `get_loss_scale` returned; call it after `set_weights`."""
        self._scaler.load_state_dict({name: array.item() for name, array in state.items()})

    def _renew_optimizer(self) -> None:
        self.optimizer = self._new_optimizer()
        # The scale lives through all epochs of a round: it begins so large that the first steps
        # overflow, which with few batches may be all steps of an epoch. Not enabled, the scaler
        # passes losses and steps through unchanged.
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "float16")

    def _new_optimizer(self) -> torch.optim.Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=0.0, **self._sgd)  # type: ignore[arg-type]

    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self._autocast():
            try:
                outputs = self.network(self._prepare(inputs, training=True))
            except ValueError as error:
                # The text of torch's batch norm, instance norm and BatchRenormLayer.
                if "Expected more than 1" in str(error):
                    raise one_example(len(targets), len(self.train_set)) from error  # type: ignore[arg-type]
                raise
            return self.loss(outputs, targets.to(self.device, non_blocking=True))

    def _prepare(self, inputs: Tensor, training: bool) -> Tensor:
        inputs = self.transform(inputs.to(self.device, non_blocking=True), training)
        if self.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs  # in the transform's format: a copy in another may slow convolutions down

    def _autocast(self) -> Any:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.precision))

    def _seed(self, seed: int) -> None:
        """Seed the random numbers of the CPU, and of the device if it is another.

        ``torch.manual_seed`` seeds every kind of device. For one that was never used it records a
        stack trace, which takes longer than a small model's training step.
        """
        seed_all = torch.default_generator if self.device.type == "cpu" else torch
        seed_all.manual_seed(seed)

    def own_seed(self, seed: int) -> int:
        """Return the seed of this trainer's random numbers, by default the epoch's own."""
        return seed

    def own_part(self, batches: BatchSampler) -> Iterable[list[int]]:
        """Return the part of every batch that this trainer trains on, by default all of it."""
        return batches

    def _train_batches(self, seed: int, steps: int | None) -> Iterable[Any]:
        batches = self.own_part(self._sampler(seed))
        if steps is not None:
            batches = list(islice(batches, steps))
        return self._loader(self._train_set(seed), batches)

    def _train_set(self, seed: int) -> Dataset[Any]:
        """Return the training set of the epoch with this seed.

        The data set has a seed of its own, because loader processes have other random states.
        """
        return self.train_set.seeded(seed) if hasattr(self.train_set, "seeded") else self.train_set

    def _sampler(self, seed: int) -> BatchSampler:
        # A generator of its own: all devices of a `ParallelTrainer` need the same order, while
        # their augmentation and dropout draw from different seeds.
        generator = torch.Generator().manual_seed(seed)
        order = RandomSampler(self.train_set, generator=generator)  # type: ignore[arg-type]
        one_left = len(order) % self.batch_size == 1 and len(order) > 1
        return BatchSampler(order, self.batch_size, drop_last=one_left)

    def _batch(self, step: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step, in the order that `train_epoch` has within a pass."""
        done, place = divmod(step - 1, len(self._sampler(seed)))
        pass_seed = derive_seed(seed, done + 1)
        batches = list(self._sampler(pass_seed))
        (batch,) = self._loader(self._train_set(pass_seed), [batches[place]])
        inputs, targets = batch
        return inputs, targets

    def _test_batches(self, dataset: Dataset[Any]) -> Iterable[Any]:
        order = range(len(dataset))  # type: ignore[arg-type]
        return self._loader(dataset, BatchSampler(order, max(self.batch_size, 256), False))

    def _loader(self, dataset: Dataset[Any], batches: Iterable[list[int]]) -> Iterable[Any]:
        common: dict[str, Any] = {
            "num_workers": self.workers,
            "pin_memory": self.device.type == "cuda",
        }
        if isinstance(dataset, TensorDataset):
            tensors = self._on_device(dataset)
            if tensors is not None:
                return IndexedBatches(tensors, list(batches))
            # Lists of indices as the sampler: tensors are indexed once for a whole batch.
            return DataLoader(dataset, sampler=batches, batch_size=None, **common)
        return DataLoader(dataset, batch_sampler=batches, **common)

    def _on_device(self, dataset: TensorDataset) -> tuple[Tensor, ...] | None:
        """Return the data set's tensors on the device, or None if they take over half its memory.

        The decision is cached, since the free memory changes as soon as training begins.
        """
        if self.device.type != "cuda":
            return dataset.tensors
        if dataset not in self._resident:
            size = sum(tensor.nbytes for tensor in dataset.tensors)
            fits = size <= torch.cuda.mem_get_info(self.device)[0] // 2
            moved = tuple(tensor.to(self.device) for tensor in dataset.tensors) if fits else None
            self._resident[dataset] = moved
        return self._resident[dataset]


@dataclass(frozen=True)
class IndexedBatches:
    """Batches that are indexed from tensors on the tensors' own device."""

    tensors: tuple[Tensor, ...]
    indices: list[list[int]]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for batch in self.indices:
            index = torch.tensor(batch).to(self.tensors[0].device, non_blocking=True)
            yield [tensor[index] for tensor in self.tensors]
