"""Compare operators of model averaging, in process: cumulative loss against cumulative bytes.

    python -m simulations.study dynamic mnist --data-dir data
    python -m simulations.study dynamic drift

Every learner trains on a stream of its own, one mini-batch a step. Each (operator, seed) is a unit:
its result is written as it ends, and a re-run skips what is there.
"""

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from clients.partition import equal_shards
from clients.tasks import cifar10, mnist
from clients.torch.models.small import mnist_cnn, resnet8
from clients.torch.online import dump, load, make_online_app
from clients.torch.streams import Drifting, Interleaved, Passes, Stream, random_drifts
from clients.torch.tasks import tensors_of
from clients.torch.transforms import normalise
from clients.trainer import derive_seed
from flwr_colearn import ColearnError, InProcessGrid, ModelAveraging
from flwr_colearn.dynamic import (
    Dynamic,
    FractionAveraging,
    Never,
    Operator,
    Periodic,
    Serial,
)
from simulations.study.dynamic_figures import save_over_time, save_tradeoff
from simulations.study.units import load_or_run

FEATURES, HIDDEN = 100, 64
TEST_EXAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """What all operators of a study have in common.

    Attributes
    ----------
    task : str
        "mnist", "drift" or "cifar10".
    learners : int
        m.
    steps : int
        Mini-batches of every learner.
    batch_size : int
        Examples in each.
    learning_rate : float
        Of plain SGD.
    examples : int
        Training examples used, all learners together; 0 for all. The graphical models of "drift"
        never run out.
    drifts : int
        How often the data changes, in "drift".
    seed : int
        Of data, initial model and the operator's choices.
    """

    task: str
    learners: int
    steps: int
    batch_size: int
    learning_rate: float
    examples: int = 0
    drifts: int = 0
    seed: int = 0

    @property
    def drift_times(self) -> tuple[int, ...]:
        """Steps at which the data changes."""
        return random_drifts(self.steps, self.drifts, self.seed)


@dataclass(frozen=True)
class Study:
    """A setting and the operators to compare in it."""

    setting: Setting
    operators: tuple[str, ...]


STUDIES = {
    "mnist": Study(
        Setting("mnist", learners=10, steps=400, batch_size=10, learning_rate=0.1),
        (
            "periodic-1", "periodic-2", "periodic-4", "periodic-8",
            "fedavg-0.3", "fedavg-0.5",
            "dynamic-0.1", "dynamic-0.3", "dynamic-1", "dynamic-3",
            "none", "serial",
        ),
    ),
    "mnist-long": Study(
        Setting("mnist", learners=10, steps=2400, batch_size=10, learning_rate=0.1),
        (
            "periodic-8", "periodic-16", "periodic-32", "periodic-64",
            "dynamic-0.3@8", "dynamic-1@8", "dynamic-3@8", "none",
        ),
    ),
    "mnist-100": Study(
        Setting("mnist", learners=100, steps=320, batch_size=10, learning_rate=0.1),
        (
            "periodic-8", "periodic-16", "periodic-32", "periodic-64",
            "dynamic-0.3@8", "dynamic-1@8", "dynamic-3@8", "none",
        ),
    ),
    "drift": Study(
        Setting("drift", learners=10, steps=800, batch_size=10, learning_rate=0.1, drifts=3),
        (
            "periodic-1", "periodic-8", "dynamic-0.05", "dynamic-0.2", "dynamic-1", "none",
            "serial",
        ),
    ),
    "cifar10": Study(
        Setting(
            "cifar10", learners=5, steps=128, batch_size=10, learning_rate=0.05, examples=10_000
        ),
        ("periodic-1", "periodic-8", "dynamic-0.3", "dynamic-1", "dynamic-3", "none", "serial"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DynamicUnit:
    """The result of one operator with one seed.

    Attributes
    ----------
    operator : str
        As on the command line.
    config : dict
        The `Setting`.
    steps : list of int
        Mini-batches of every learner after each round.
    losses, bytes : list
        Cumulative loss over all examples of all learners, and cumulative bytes in both directions,
        after each round.
    models : int
        Transfers, both directions.
    control : int
        Bytes of configs and metrics among `bytes`.
    accuracy : float
        Of the mean of all models at the end, on test data.
    seconds : float
        Wall time.
    """

    operator: str
    config: dict[str, object]
    steps: list[int]
    losses: list[float]
    bytes: list[int]
    models: int
    control: int
    accuracy: float
    seconds: float


def operator_named(name: str, learners: int) -> Operator:
    """Return the operator: "periodic-B", "fedavg-C@B", "dynamic-DELTA@B", "none" or "serial".

    B, the mini-batches between two opportunities, is 8 for FedAvg and 1 for dynamic averaging
    unless it is given. Serial learning takes the mini-batches of all learners in turn.

    Raises
    ------
    ColearnError
        If there is no such operator.
    """
    kind, _, rest = name.partition("-")
    value, _, every = rest.partition("@")
    try:
        if kind == "periodic":
            return Periodic(int(value))
        if kind == "fedavg":
            return FractionAveraging(float(value), int(every or 8))
        if kind == "dynamic":
            return Dynamic(float(value), int(every or 1))
        if name in ("none", "serial"):
            return Never() if name == "none" else Serial(check_every=learners)
    except ValueError:
        pass
    raise ColearnError(
        "operator: expected periodic-B, fedavg-C@B, dynamic-DELTA@B, none or serial, found "
        + repr(name)
    )


def build_model(task: str) -> nn.Module:
    """Return the task's network."""
    if task == "mnist":
        return mnist_cnn()
    if task == "cifar10":
        return resnet8()
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))


def build_streams(setting: Setting, data_dir: str) -> list[Stream]:
    """Return a stream for each learner."""
    seeds = [derive_seed(setting.seed, 1 + index) for index in range(setting.learners)]
    if setting.task == "drift":
        return [
            Drifting(setting.drift_times, FEATURES, setting.batch_size, setting.seed, seed)
            for seed in seeds
        ]
    inputs, targets = _data(setting.task, data_dir, train=True)
    inputs, targets = inputs[: setting.examples or None], targets[: setting.examples or None]
    shards = equal_shards(len(targets), setting.learners, setting.seed)
    return [
        Passes(inputs[torch.from_numpy(shard)], targets[torch.from_numpy(shard)],
               setting.batch_size, seed)
        for shard, seed in zip(shards, seeds, strict=True)
    ]  # fmt: skip


def held_out(setting: Setting, data_dir: str) -> tuple[Tensor, Tensor]:
    """Return test inputs and targets; of the last concept where the data drifts."""
    if setting.task != "drift":
        inputs, targets = _data(setting.task, data_dir, train=False)
        return inputs[:TEST_EXAMPLES], targets[:TEST_EXAMPLES]
    stream = Drifting(setting.drift_times, FEATURES, TEST_EXAMPLES, setting.seed, seed=2**32)
    return stream.batch(setting.steps)


def run_unit(name: str, setting: Setting, data_dir: str) -> DynamicUnit:
    """Train with one operator."""
    operator, streams = operator_named(name, setting.learners), build_streams(setting, data_dir)
    if isinstance(operator, Serial):
        streams = [Interleaved(tuple(streams))]
    torch.manual_seed(setting.seed)
    model = build_model(setting.task)
    inputs, targets = held_out(setting, data_dir)
    serial_steps = setting.learners if isinstance(operator, Serial) else 1
    rounds = setting.steps * serial_steps // operator.check_every

    def build(context: Context) -> tuple[nn.Module, Stream]:
        return model, streams[int(context.node_config["partition-id"])]

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round < rounds:
            return None
        load(model, arrays)
        model.eval()
        with torch.no_grad():
            right = model(inputs).argmax(1) == targets
        return MetricRecord({"accuracy": float(right.float().mean())})

    strategy = ModelAveraging(operator, len(streams), seed=setting.seed)
    app = make_online_app(build, setting.learning_rate)
    started = time.perf_counter()
    strategy.start(
        InProcessGrid(app, len(streams)), dump(model), num_rounds=rounds, evaluate_fn=evaluate
    )
    history, moved = strategy.history.records, strategy.history.transfers
    return DynamicUnit(
        name,
        asdict(setting),
        [record.mini_batches // serial_steps for record in history],
        [round(record.cumulative_loss or 0.0, 3) for record in history],
        [record.cumulative_bytes for record in history],
        moved.models_down + moved.models_up,
        moved.control_down + moved.control_up,
        float(history[-1].server_metrics["accuracy"]),
        round(time.perf_counter() - started, 1),
    )


def run_study(
    operators: Sequence[str], setting: Setting, seeds: int, data_dir: str, output: Path
) -> list[DynamicUnit]:
    """Run the units that `output` does not hold yet, and return all of them.

    Raises
    ------
    ColearnError
        If it holds one of another setting.
    """
    units = []
    plan = [(name, seed) for seed in range(seeds) for name in operators]
    for name, seed in tqdm(plan, desc="operators x seeds"):
        seeded = replace(setting, seed=seed)
        path = output / "units" / f"{name}-{seed}.json"
        run = partial(run_unit, name, seeded, data_dir)
        units.append(load_or_run(path, DynamicUnit, asdict(seeded), run))
    return units


def write_report(units: Sequence[DynamicUnit], setting: Setting, output: Path, title: str) -> str:
    """Write table.md, tradeoff.png and over-time.png; return the table."""
    rows = [_row([unit for unit in units if unit.operator == name]) for name in
            dict.fromkeys(unit.operator for unit in units)]  # fmt: skip
    table: str = tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
    (output / "table.md").write_text(table + "\n")
    first = [unit for unit in units if unit.config["seed"] == units[0].config["seed"]]
    save_tradeoff(
        [(unit.operator, unit.bytes[-1], unit.losses[-1]) for unit in first],
        output / "tradeoff.png",
        title,
    )
    save_over_time(
        [(unit.operator, unit.steps, unit.losses, unit.bytes) for unit in first],
        setting.drift_times,
        output / "over-time.png",
        title,
    )
    return table


def _row(runs: Sequence[DynamicUnit]) -> dict[str, object]:
    losses = [run.losses[-1] for run in runs]
    row: dict[str, object] = {
        "operator": runs[0].operator,
        "cumulative loss": f"{statistics.mean(losses):,.0f}",
        "MB up+down": f"{statistics.mean(run.bytes[-1] for run in runs) / 1e6:,.2f}",
        "of it control": f"{statistics.mean(run.control for run in runs) / 1e6:,.2f}",
        "models moved": f"{statistics.mean(run.models for run in runs):,.0f}",
        "accuracy %": f"{100 * statistics.mean(run.accuracy for run in runs):.1f}",
        "seconds": f"{statistics.mean(run.seconds for run in runs):.0f}",
    }
    if len(runs) > 1:
        row["loss spread"] = f"{statistics.stdev(losses):,.0f}"
    return row


def _data(task: str, data_dir: str, train: bool) -> tuple[Tensor, Tensor]:
    loaded = (mnist if task == "mnist" else cifar10).load(data_dir)
    inputs, targets = tensors_of(loaded.train_set if train else loaded.test_set).tensors
    return (inputs if task == "mnist" else normalise(inputs, False)), targets


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study dynamic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. N-1 (default 1)")
    parser.add_argument("--operators", nargs="+", metavar="OPERATOR", help="instead of the study's")
    parser.add_argument("--data-dir", default="data", help="of MNIST and CIFAR-10 (default data)")
    parser.add_argument("--output", type=Path, help="default outputs/dynamic-STUDY")
    for name, kind in (("learners", int), ("steps", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the study's")
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # one progress bar says it all
    study = STUDIES[options.study]
    given = {name: getattr(options, name) for name in ("learners", "steps", "learning_rate")}
    setting = replace(study.setting, **{k: v for k, v in given.items() if v is not None})
    operators = options.operators or study.operators
    for name in operators:
        operator_named(name, setting.learners)
    output = options.output or Path("outputs") / f"dynamic-{options.study}"
    units = run_study(operators, setting, options.seeds, options.data_dir, output)
    print(write_report(units, setting, output, f"{options.study}, m = {setting.learners}"))
    print(f"\nResults, table and pictures are in {output}")


if __name__ == "__main__":
    main()
