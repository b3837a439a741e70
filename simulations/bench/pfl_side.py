"""pfl-research's side of ``peers``, built like its own CIFAR-10 benchmark.

The module runs in pfl's environment, which has neither Flower nor this project's dependencies.
Under ``torchrun`` the processes share the cohort.
"""

from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByUser
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.callback.base import TrainingProcessCallback
from pfl.data import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops.pytorch_ops import distributed
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from simulations.bench.users import SmallCnn, Stopwatch, data, task


class Cnn(SmallCnn):
    """The small CNN with the two methods that pfl calls."""

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the training loss."""
        self.train()
        return torch.nn.functional.cross_entropy(self(images), labels)

    @torch.no_grad()
    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        """Return the mean loss; pfl calls this in the first round only, which is not timed."""
        self.eval()
        loss = torch.nn.functional.cross_entropy(self(images), labels, reduction="sum")
        return {"loss": Weighted(float(loss), len(labels))}


class AtRounds(TrainingProcessCallback):
    """The callback that takes the time at the start of training and at the end of rounds."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_train_begin(self, *, model: Any) -> Metrics:
        """Record the start of training."""
        self.stopwatch.lap()
        return Metrics()

    def after_central_iteration(self, *args: Any, **kwargs: Any) -> tuple[bool, Metrics]:
        """Record the end of a round."""
        self.stopwatch.lap()
        return False, Metrics()


def main() -> None:
    """Train, and write the laps and steps of this process."""
    work, folder = task()
    torch.manual_seed(0)
    np.random.seed(0)
    network = Cnn()
    users = FederatedDataset.from_slices(
        data(work.users, work.examples), get_user_sampler("random", range(work.users))
    )
    stopwatch = Stopwatch()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds + 1,
            evaluation_frequency=work.rounds + 1,  # that is, in the first round only
            train_cohort_size=work.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(users, users, postprocessors=[WeightByUser()]),
        model=PyTorchModel(
            network,
            local_optimizer_create=torch.optim.SGD,
            # Federated averaging: the server applies the mean update as it is.
            central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
        ),
        model_train_params=NNTrainHyperParams(
            local_learning_rate=work.rate, local_num_epochs=1, local_batch_size=work.batch
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=None),
        callbacks=[AtRounds(stopwatch)],
    )
    stopwatch.write(folder, distributed.global_rank, network.batches[work.batch])


if __name__ == "__main__":
    main()
