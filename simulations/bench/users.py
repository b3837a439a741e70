"""The common work of all sides of the ``peers`` benchmark.

The module imports torch only, since pfl-research's environment has no other dependency of ours.
"""

import dataclasses
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Work:
    """A federated training with the sizes of pfl-research's CIFAR-10 benchmark.

    Attributes
    ----------
    users, cohort : int
        The number of users, and of those that train in every round.
    examples, batch : int
        The number of a user's examples, and the batch size; one local epoch has ``examples /
        batch`` steps.
    rate : float
        The local learning rate of SGD without momentum.
    rounds : int
        The number of timed rounds; one more round before them is a warm-up.
    """

    users: int = 1000
    cohort: int = 50
    examples: int = 50
    batch: int = 10
    rate: float = 0.1
    rounds: int = 5

    @property
    def steps(self) -> int:
        """The number of optimizer steps of the whole run."""
        return (self.rounds + 1) * self.cohort * (self.examples // self.batch)


class SmallCnn(nn.Sequential):
    """pfl-research's small CNN for images [N, 32, 32, 3] (1,626,442 parameters).

    Attributes
    ----------
    batches : Counter
        The number of training batches by batch size.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 14 * 14, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )
        for module in self:
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        self.batches: Counter[int] = Counter()

    def forward(self, images: Tensor) -> Tensor:
        """Map images [N, 32, 32, 3] to logits [N, 10]."""
        if self.training:
            self.batches[len(images)] += 1
        logits: Tensor = super().forward(images.permute(0, 3, 1, 2))  # type: ignore[no-untyped-call]
        return logits


@cache
def data(users: int, examples: int) -> list[tuple[Tensor, Tensor]]:
    """Return the images and labels of every user, which are random, since only time matters."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(users, examples, 32, 32, 3, generator=generator)
    labels = torch.randint(10, (users, examples), generator=generator)
    return list(zip(images, labels, strict=True))


def task() -> tuple[Work, Path]:
    """Return the work and the folder for results from the command line of a side."""
    return Work(**json.loads(sys.argv[1])), Path(sys.argv[2])


class Stopwatch:
    """A recorder of the time and this process's CPU time, at the start and at the rounds' ends."""

    def __init__(self) -> None:
        self.laps: list[tuple[float, float]] = []

    def lap(self) -> None:
        """Record both times."""
        # time.time(), since the benchmark compares the clocks of several processes.
        self.laps.append((time.time(), time.process_time()))

    def write(self, folder: Path, part: int, steps: float) -> None:
        """Write the measurements to the folder in which the benchmark reads them.

        Parameters
        ----------
        folder : Path
            The folder of this side's run.
        part : int
            The number of this process among the side's processes.
        steps : float
            The number of optimizer steps on full batches, including the warm-up.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{part}.json").write_text(json.dumps({"laps": self.laps, "steps": steps}))


def as_json(work: Work) -> str:
    """Return the work as JSON, which `task` reads."""
    return json.dumps(dataclasses.asdict(work))
