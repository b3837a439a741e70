"""A task for deployments whose participants suffer faults: a site's own digits, and a small net."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from clients.data import Task
from clients.tasks import digits

torch.set_num_threads(1)


def task(settings):
    """Return the site's digits; the net gets the folder, in which there are orders for faults."""
    options = {"folder": settings.data_dir}
    if not settings.data_dir:
        return Task(model_options=options)
    train_set = digits.read(settings, Path(settings.data_dir), "train")
    return Task(train_set, model_options=options)


class Net(nn.Sequential):
    """A net that knows the round: its counter travels with it, and every round adds one."""

    def __init__(self, folder):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 10))
        self.register_buffer("rounds", torch.tensor(0))
        self.folder, self.begun = folder, False

    def forward(self, inputs):
        # Every message has a process, and so a net, of its own.
        if not self.begun:
            self.begun = True
            self.rounds += self.training
            kind = "round" if self.training else "evaluation"
            fault = suffer_fault(Path(self.folder) / "faults" / f"{kind}-{self.rounds}")
            if fault == "poison":
                with torch.no_grad():
                    self[1].weight.fill_(1e6)  # batch norm makes it trainable
        return super().forward(inputs)


def net(folder):
    return Net(folder)


def suffer_fault(order):
    """Do what a file says, once, and return it."""
    if not order.exists():
        return None
    fault = order.read_text()
    order.rename(order.with_suffix(".done"))
    if fault == "raise":
        raise RuntimeError("injected fault")
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault in ("hang", "wait"):  # "wait": until the test has done something to the SuperNode
        time.sleep(600)
    return fault
