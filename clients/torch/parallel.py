"""ParallelTrainer, the trainer of one participant with several GPUs.

The paper's sites have four GPUs each and synchronize batch norm over them.
"""

import copy
import tempfile
import traceback
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import ERROR
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from flwr.common import log
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Dataset

from clients.torch.trainer import TorchTrainer
from clients.trainer import EpochResult, NDArray, derive_seed
from flwr_colearn import ColearnError, Role
from flwr_colearn.torch import BatchRenormLayer, holds_activation, roles, timm_layers


class ParallelTrainer:
    """A Trainer over N devices: every step's batch is split over them, gradients are averaged.

    Every device has a process (``DistributedDataParallel``). Batch norm is synchronised over the
    devices, so the result is that of one device with the same `batch_size`, to float precision. An
    epoch leaves out up to N-1 examples of a batch that do not split evenly.

    Parameters
    ----------
    model, train_set, test_set
        The arguments of `TorchTrainer`; they are pickled to the processes.
    devices : sequence of str
        The devices, for example ``["cuda:0", "cuda:1"]``. CPUs are for tests, with networks without
        batch norm.
    batch_size : int, default 32
        The batch size of a step, over all devices together; at least N.
    **options
        Further arguments of `TorchTrainer`.

    Raises
    ------
    ColearnError
        If the batch cannot be split, or the network has batch norm and the devices are CPUs, on
        which torch cannot synchronise it.
    """

    def __init__(
        self,
        model: nn.Module,
        train_set: Dataset[Any],
        test_set: Dataset[Any] | None = None,
        *,
        devices: Sequence[str],
        batch_size: int = 32,
        **options: Any,
    ) -> None:
        world = len(devices)
        if batch_size < world:
            raise ColearnError(f"batch_size: expected at least {world} devices, found {batch_size}")
        if len(train_set) < world:  # type: ignore[arg-type]
            raise ColearnError(
                f"train_set: expected an example for each of {world} devices, found "
                f"{len(train_set)}"  # type: ignore[arg-type]
            )
        if any(isinstance(module, BatchRenormLayer) for module in model.modules()):
            raise ColearnError(
                "devices: expected one device for a network with batch renorm, which torch cannot "
                f"synchronise over several, found {list(devices)}"
            )
        kinds = {torch.device(name).type for name in devices}
        if kinds != {"cuda"} and _has_batch_norm(model):
            raise ColearnError(
                "devices: expected CUDA devices for a network with batch norm, which torch "
                f"synchronises on them only, found {list(devices)}"
            )
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                holds_activation(module)  # raises for a layer that the conversion would truncate
        self.model = model
        # The processes find each other by a file, which needs no free port.
        self._folder = tempfile.TemporaryDirectory()
        meeting_point = Path(self._folder.name, "rendezvous").as_uri()
        # "spawn", because CUDA does not work in a forked process.
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        processes = []
        for rank, device in enumerate(devices):
            ours, theirs = context.Pipe()
            job = (model, train_set, test_set, {**options, "batch_size": batch_size})
            process = context.Process(
                target=_serve,
                args=(theirs, rank, world, device, meeting_point, mp.get_start_method(), job),
                daemon=True,
            )
            process.start()
            theirs.close()  # with a copy of it here, recv() would not notice the process's end
            self._pipes.append(ours)
            processes.append(process)
        # Not __del__: a finalizer also runs at the interpreter's exit.
        weakref.finalize(self, _dismiss, self._pipes, processes)

    def get_weights(self) -> dict[str, NDArray]:
        """Return the state dict as numpy arrays."""
        return self._ask("get_weights", only_first=True)  # type: ignore[no-any-return]

    def set_weights(self, weights: Mapping[str, NDArray]) -> None:
        """Load the state dict on every device and reinitialise the optimizers."""
        self._ask("set_weights", dict(weights))

    def roles(self) -> dict[str, Role]:
        """Return the role of every array of the state dict, by module type."""
        return roles(self.model)

    def train_epoch(self, learning_rate: float, seed: int, steps: int | None = None) -> EpochResult:
        """Train one pass over the local data; each device trains its part of every batch."""
        results = self._ask("train_epoch", learning_rate, seed, steps)
        examples = sum(result.num_examples for result in results)
        loss = sum(result.loss * result.num_examples for result in results) / examples
        # Gradients are averaged before a step, so that all devices make or skip the same steps.
        return EpochResult(loss, examples, results[0].steps, results[0].skipped)

    def batches_per_epoch(self) -> int:
        """Return the number of mini-batches of a full pass, each shared by all devices."""
        return self._ask("batches_per_epoch", only_first=True)  # type: ignore[no-any-return]

    def evaluate(self) -> dict[str, float]:
        """Evaluate on the first device."""
        return self._ask("evaluate", only_first=True)  # type: ignore[no-any-return]

    def predict(self) -> tuple[NDArray, NDArray]:
        """Return outputs and targets on the test set, from the first device."""
        return self._ask("predict", only_first=True)  # type: ignore[no-any-return]

    def get_optimizer_state(self) -> dict[str, NDArray]:
        """Return SGD's buffers, which are the same on every device."""
        return self._ask("get_optimizer_state", only_first=True)  # type: ignore[no-any-return]

    def set_optimizer_state(self, state: Mapping[str, NDArray]) -> None:
        """Load buffers that `get_optimizer_state` returned, on every device."""
        self._ask("set_optimizer_state", dict(state))

    def get_loss_scale(self) -> dict[str, NDArray]:
        """Return the loss scale, which is the same on every device."""
        return self._ask("get_loss_scale", only_first=True)  # type: ignore[no-any-return]

    def set_loss_scale(self, state: Mapping[str, NDArray]) -> None:
        """Load what `get_loss_scale` returned, on every device."""
        self._ask("set_loss_scale", dict(state))

    def _ask(self, method: str, *arguments: Any, only_first: bool = False) -> Any:
        """Call a method of every replica (or of the first) and return what they return."""
        pipes = self._pipes[:1] if only_first else self._pipes
        for pipe in pipes:
            pipe.send((method, arguments))
        # All replies are received before an error is raised: a reply that is left in a pipe would
        # be taken for that of the next call.
        replies = [_receive(pipe) for pipe in pipes]
        for rank, (failure, _) in enumerate(replies):
            if failure:
                log(ERROR, "Device %s: %s raised\n%s", rank, method, failure.traceback)
                raise ColearnError(
                    f"device {rank}: expected {method} to succeed, found {failure.reason}"
                )
        answers = [answer for _, answer in replies]
        return answers[0] if only_first else answers


class _Replica(TorchTrainer):
    """The trainer of one device, which trains a part of every batch and averages gradients."""

    def __init__(self, rank: int, world: int, model: nn.Module, *args: Any, **options: Any) -> None:
        # A pickled model's tensors lie in memory that the processes share; each replica needs its
        # own.
        model = copy.deepcopy(model)
        if torch.device(options["device"]).type == "cuda":
            model = convert_sync_batchnorm(model)
        super().__init__(model, *args, **options)
        self.rank, self.world = rank, world
        device_ids = [self.device] if self.device.type == "cuda" else None
        # No broadcast: synchronised statistics and constants are equal on all devices.
        self.network = DistributedDataParallel(
            self.network, device_ids=device_ids, broadcast_buffers=False
        )

    def own_seed(self, seed: int) -> int:
        """Return a seed of this device, so that devices augment their parts differently."""
        return derive_seed(seed, self.rank)

    def own_part(self, batches: BatchSampler) -> Iterator[list[int]]:
        """Yield every world-th example of each batch, equally many on every device."""
        # Equal parts: gradients are averaged without weights, and a device without a part would
        # block the others in the gradients' exchange.
        for batch in batches:
            usable = len(batch) // self.world * self.world
            if usable:
                yield batch[self.rank : usable : self.world]


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Return a model whose batch-norm layers are synchronised over all devices.

    timm's layers may include an activation, which torch's own conversion would drop.
    """
    convert = (timm_layers() or nn.SyncBatchNorm).convert_sync_batchnorm
    return convert(model)  # type: ignore[no-any-return]


def _serve(
    pipe: Connection,
    rank: int,
    world: int,
    device: str,
    meeting_point: str,
    start_method: str,
    job: tuple[Any, ...],
) -> None:
    """Answer calls in a device's process until the other end of the pipe is closed."""
    # A DataLoader's processes must start as on a single device. A daemon may not start any. And a
    # spawned process would spawn its own by default, which import every module in every epoch.
    mp.current_process().daemon = False
    mp.set_start_method(start_method, force=True)
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=meeting_point, rank=rank, world_size=world)
    model, train_set, test_set, options = job
    replica = _Replica(rank, world, model, train_set, test_set, device=device, **options)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            pipe.send((None, getattr(replica, method)(*arguments)))
        # Every error goes to the participant's process, which waits for a reply.
        except Exception as error:
            pipe.send((Failure.of(error), None))


@dataclass(frozen=True)
class Failure:
    """A failure of a device's process.

    Attributes
    ----------
    reason : str
        The message of an error of this plugin, else the type of the exception only: the reason
        leaves the site, and a foreign text may hold a value of its data.
    traceback : str
        The traceback with the text, for the site's log.
    """

    reason: str
    traceback: str

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """Return the failure of an exception that is being handled."""
        ours = isinstance(error, ColearnError)
        reason = f"{error}" if ours else f"{type(error).__name__}; this site's log has its text"
        return cls(reason, traceback.format_exc())


def _receive(pipe: Connection) -> tuple[Failure | None, Any]:
    try:
        return pipe.recv()  # type: ignore[no-any-return]
    except (EOFError, ConnectionResetError):
        return Failure("that its process ended", "no traceback"), None


def _dismiss(pipes: list[Connection], processes: list[Any]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(timeout=10)


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
