"""Which normalization scheme holds when participants' labels are skewed, and what it costs.

    python -m simulations.study normalization digits --seeds 3

Every cell (training, partition, scheme, seed) is a unit: written as it ends, skipped by a re-run.
``--minutes`` starts no further unit after so many; what is missing is "not run" in the table.
"""

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from tabulate import tabulate
from torch.utils.data import TensorDataset
from tqdm import tqdm

from clients.client_app import make_client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer, server_trainer, shards
from clients.torch.normalization import convert
from clients.torch.trainer import TorchTrainer, roles_of
from clients.trainer import NDArray
from flwr_colearn import (
    CoLearn,
    ColearnError,
    ExponentialRate,
    History,
    InProcessGrid,
    Normalization,
    NormalizedFedAvg,
    SideBySideGrid,
    SynchronousSGD,
)
from flwr_colearn.errors import NOT_FINITE
from flwr_colearn.normalization import SCHEMES, scheme_named
from simulations.arms import ARMS, schedules
from simulations.server_app import to_record
from simulations.settings import CONF, RunSettings, check_keys, read_config
from simulations.study.units import kept, unit_config

TRAININGS = {
    "synchronous": "synchronous SGD",
    "colearn": "co-learning (CLR+ILE)",
    "fedavg": "federated averaging",
}
PARTITIONS = {"iid": "IID", "dirichlet": "Dirichlet 0.5", "classes": "two classes each"}


@dataclass(frozen=True)
class Unit:
    """The result of one cell with one seed.

    Attributes
    ----------
    training, partition, scheme : str
        Keys of `TRAININGS`, `PARTITIONS`, `SCHEMES`.
    seed : int
        Of partition, initial model and training.
    shared_accuracy : float or None
        Of the shared model on the common test set; None where part of it is local.
    sites_accuracy : float
        Of the participants' own models on the common test set, their mean; where nothing is local
        they all are the shared model.
    local_accuracy : float
        Of the participants' own models on test data with the labels of their own data, their mean:
        accuracy by class on the common test set, weighted by the participant's shares of classes.
    rounds : int
        Exchanges of models, or of gradients.
    bytes : int
        Of arrays, up and down, over all participants, the scheme's own exchanges included.
    scheme_bytes : int
        What the scheme cost over exchanging the whole model; below 0: saved.
    seconds : float
        Wall time.
    config : dict
        The settings that gave it.
    diverged : bool
        Whether a participant's numbers ceased to be finite; then there is no accuracy.
    """

    training: str
    partition: str
    scheme: str
    seed: int
    shared_accuracy: float | None
    sites_accuracy: float | None
    local_accuracy: float | None
    rounds: int
    bytes: int
    scheme_bytes: int
    seconds: float
    config: dict[str, object]
    diverged: bool = False


@dataclass(frozen=True)
class Cell:
    """One cell of the study with one seed, and the settings of both sides.

    Attributes
    ----------
    training, scheme : str
        Keys of `TRAININGS` and `SCHEMES`.
    participants, settings
        Of both sides; the partition and the seed are the participants'.
    test_examples : int
        Evaluate on so many examples of the test set, the first ones; 0 for all.
    """

    training: str
    scheme: str
    participants: ParticipantSettings
    settings: RunSettings
    test_examples: int = 0

    @property
    def possible(self) -> bool:
        """Whether there is such a thing: layers are synchronised at every step or not at all."""
        return self.scheme != "synchronised" or self.training == "synchronous"

    @property
    def rounds(self) -> int:
        """Steps, or rounds of one local epoch; co-learning has fewer."""
        if self.training != "synchronous":
            return self.settings.total_epochs
        k = self.settings.num_participants
        sizes = [len(shard) for shard in shards(self.participants, k)]
        # As many steps as a participant of average size takes in its local epochs.
        steps = -(-sum(sizes) // (k * self.participants.batch_size))
        return steps * self.settings.total_epochs

    def normalization(self) -> Normalization:
        """Return the scheme, its parameters as the study has them."""
        half = 4 if self.training == "colearn" else self.rounds // 2
        every = self.rounds if self.training == "synchronous" else 1
        parameters = {
            "recalibrated": {"every": every},
            "frozen": {"after": half},
            "batch-renorm": {"warmup": 50},
        }
        return scheme_named(self.scheme, **parameters.get(self.scheme, {}))


def run_cell(cell: Cell) -> Unit:
    """Train and evaluate one cell."""
    started = time.perf_counter()
    scheme, settings, participants = cell.normalization(), cell.settings, cell.participants
    judge = converted(server_trainer(participants), scheme, participants)
    if cell.test_examples:
        assert isinstance(judge.test_set, TensorDataset)
        judge.test_set = TensorDataset(*(t[: cell.test_examples] for t in judge.test_set.tensors))
    kind = SideBySideGrid if scheme.side_by_side else InProcessGrid
    k = settings.num_participants
    grid = kind(client_app(participants, scheme, k), k)
    strategy = strategy_of(cell, scheme, judge)
    shared = train(cell, strategy, grid, to_record(judge))
    history: History = strategy.history
    overall = local = whole = None
    if shared is not None:
        sites, locals_ = evaluate(judge, shared, grid, participants, scheme.is_local)
        overall, local = statistics.mean(sites), statistics.mean(locals_)
        whole = None if scheme.is_local else sites[0]
    return Unit(
        cell.training,
        participants.partition,
        cell.scheme,
        participants.seed,
        whole,
        overall,
        local,
        len(history),
        history.bytes_total,
        sum(record.normalization.get("bytes", 0) for record in history),
        round(time.perf_counter() - started, 1),
        config_of(cell),
        diverged=shared is None,
    )


def train(
    cell: Cell, strategy: CoLearn | NormalizedFedAvg, grid: InProcessGrid, initial: ArrayRecord
) -> dict[str, NDArray] | None:
    """Return the model that a cell's training ends with, or None if it diverges.

    One participant that diverges is enough: whatever is averaged without it is another experiment.
    """
    config = ConfigRecord()
    if cell.training == "fedavg":
        rate = cell.settings.learning_rate
        config = ConfigRecord({"local-epochs": 1, "learning-rate": rate})
    rounds = None if cell.training == "colearn" else cell.rounds
    try:
        result = strategy.start(grid, initial, rounds, train_config=config)
    except ColearnError as error:
        if NOT_FINITE in str(error):
            return None
        raise
    history: History = strategy.history
    refusals = [entry["reason"] for record in history for entry in record.refusals]
    shared = {name: array.numpy() for name, array in result.arrays.items()}
    finite = all(np.isfinite(array).all() for array in shared.values())
    return shared if finite and not any(NOT_FINITE in reason for reason in refusals) else None


def strategy_of(
    cell: Cell, scheme: Normalization, judge: TorchTrainer
) -> CoLearn | NormalizedFedAvg:
    """Return the strategy of a cell, which evaluates nothing itself."""
    k, settings, roles = cell.settings.num_participants, cell.settings, roles_of(judge.model)
    if cell.training == "colearn":
        return CoLearn(
            k,
            **schedules(ARMS["clr-ile"], settings),
            roles=roles,
            normalization=scheme,
            fraction_evaluate=0.0,
        )
    if cell.training == "synchronous":
        return SynchronousSGD(
            k,
            learning_rate=ExponentialRate(settings.learning_rate, settings.decay, cell.rounds),
            momentum=cell.participants.momentum,
            roles=roles,
            normalization=scheme,
        )
    nodes = {"min_train_nodes": k, "min_available_nodes": k}
    return NormalizedFedAvg(scheme, roles=roles, fraction_evaluate=0.0, **nodes)


def client_app(participants: ParticipantSettings, scheme: Normalization, k: int) -> ClientApp:
    """Return a ClientApp of participants whose models are converted as the scheme asks."""

    @lru_cache
    def trainer(index: int) -> TorchTrainer:
        plain = participant_trainer(participants, index, k)
        assert isinstance(plain, TorchTrainer)
        return converted(plain, scheme, participants)

    for index in range(k):  # before there are threads: models are drawn from one generator
        trainer(index)
    return make_client_app(
        lambda context: trainer(int(context.node_config["partition-id"])),
        seed=lambda context: participants.seed,
        mods=[count_epochs],
    )


def count_epochs(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Say which epoch it is where the server does not, so that every one has its own order."""
    config = message.content.config_records.get("config")
    if config is not None and "learning-rate-schedule" not in config:
        config["epochs-done"] = int(config["server-round"]) - 1  # type: ignore[arg-type]
    return call_next(message, context)


def converted(
    trainer: TorchTrainer, scheme: Normalization, participants: ParticipantSettings
) -> TorchTrainer:
    """Return a trainer of the same data whose model is converted as the scheme asks."""
    return TorchTrainer(
        convert(trainer.model, scheme),
        trainer.train_set,
        trainer.test_set,
        batch_size=participants.batch_size,
        momentum=participants.momentum,
        weight_decay=participants.weight_decay,
        transform=trainer.transform,
        objective=trainer.objective,
        precision=participants.precision,
        clip_norm=participants.clip_norm or None,
        channels_last=participants.channels_last,
    )


def evaluate(
    judge: TorchTrainer,
    shared: dict[str, NDArray],
    grid: InProcessGrid,
    participants: ParticipantSettings,
    is_local: bool,
) -> tuple[list[float], list[float]]:
    """Return every participant's accuracy, on the common test set and on labels like its own."""
    overall, local = [], []
    by_class: NDArray | None = None
    labels = _labels(participants)
    for index, shard in enumerate(shards(participants, len(grid.contexts))):
        if by_class is None or is_local:
            own = dict(shared)
            if is_local:
                kept = grid.contexts[index + 1].state["normalization.after"]
                own.update({n: a.numpy() for n, a in kept.items() if n in own})
            judge.set_weights(own)
            outputs, targets = judge.predict()
            right = outputs.argmax(1) == targets
            by_class = np.array([right[targets == c].mean() for c in range(targets.max() + 1)])
        overall.append(float(right.mean()))
        shares = np.bincount(labels[shard], minlength=len(by_class)) / len(shard)
        local.append(float(shares @ by_class))
    return overall, local


def _labels(participants: ParticipantSettings) -> NDArray:
    from clients.tasks.registry import load_task

    return load_task(participants).train_set.labels


def config_of(cell: Cell) -> dict[str, object]:
    """Return the settings that a cell's result depends on."""
    config = unit_config(cell.participants, cell.settings)
    scheme = str(cell.normalization())
    return {**config, "normalization": scheme, "test-examples": cell.test_examples}


def cells(
    trainings: Sequence[str],
    partitions: Sequence[str],
    schemes: Sequence[str],
    seeds: Iterable[int],
    participants: ParticipantSettings,
    settings: RunSettings,
    test_examples: int = 0,
) -> Iterator[Cell]:
    """Yield the cells that there are, the most skewed partition first."""
    for seed in seeds:
        for partition in partitions:
            for training in trainings:
                for scheme in schemes:
                    # Every cell converts the plain model by itself.
                    seeded = replace(
                        participants, partition=partition, seed=seed, normalization="pooled"
                    )
                    cell = Cell(training, scheme, seeded, settings, test_examples)
                    if cell.possible:
                        yield cell


def run_study(plan: Sequence[Cell], output: Path, minutes: float) -> list[Unit]:
    """Run the units that `output` does not hold yet, as far as the time allows."""
    units, started = [], time.monotonic()
    for cell in tqdm(plan, desc="cells"):
        name = f"{cell.training}-{cell.participants.partition}-{cell.scheme}"
        path = output / "units" / f"{name}-{cell.participants.seed}.json"
        if path.exists() or time.monotonic() - started < 60 * minutes:
            units.append(kept(path, Unit, config_of(cell), partial(run_cell, cell)))
    return units


def rows(units: Sequence[Unit], plan: Sequence[Cell]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table: training and scheme, and for each partition the accuracies."""
    wanted = {(cell.training, cell.scheme): None for cell in plan}
    partitions = list(dict.fromkeys(cell.participants.partition for cell in plan))
    for training, scheme in wanted:
        row = {"training": TRAININGS[training], "scheme": scheme}
        for partition in partitions:
            runs = [
                unit
                for unit in units
                if (unit.training, unit.scheme, unit.partition) == (training, scheme, partition)
            ]
            title = PARTITIONS[partition]
            row[f"{title}: global"] = _percent([u.shared_accuracy for u in runs], runs)
            row[f"{title}: local"] = _percent([u.local_accuracy for u in runs], runs)
        same = [u for u in units if (u.training, u.scheme) == (training, scheme) and not u.diverged]
        row["MB"] = f"{statistics.mean(u.bytes for u in same) / 1e6:.1f}" if same else ""
        row["of which scheme"] = (
            f"{statistics.mean(u.scheme_bytes for u in same) / 1e6:+.2f}" if same else ""
        )
        yield row


def _percent(values: Sequence[float | None], runs: Sequence[Unit]) -> str:
    """Return mean and spread in percent; the sites' own models' mean in parentheses if local."""
    if not values:
        return "not run"
    if diverged := sum(u.diverged for u in runs):
        return "diverged" if len(runs) == 1 else f"{diverged} of {len(runs)} diverged"
    if values[0] is None:
        return f"({100 * statistics.mean(u.sites_accuracy for u in runs):.1f})"
    numbers = [100 * value for value in values if value is not None]
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"


def write_report(units: Sequence[Unit], plan: Sequence[Cell], output: Path, title: str) -> str:
    """Write results.json, table.md and accuracy.png; return the table."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps([asdict(u) for u in units], indent=1) + "\n")
    table = tabulate(
        list(rows(units, plan)), headers="keys", tablefmt="github", disable_numparse=True
    )
    (output / "table.md").write_text(table + "\n")
    if units:
        save_figure(units, output / "accuracy.png", title)
    return table


def save_figure(units: Sequence[Unit], path: Path, title: str) -> None:
    """Draw global (filled) and local (hollow) accuracy by scheme, one panel a training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    trainings = [t for t in TRAININGS if any(u.training == t for u in units)]
    figure, axes = plt.subplots(
        1, len(trainings), figsize=(5 * len(trainings), 4.5), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, training in zip(axes[0], trainings, strict=True):
        for offset, (partition, colour) in enumerate(
            zip(PARTITIONS, ("tab:blue", "tab:orange", "tab:red"), strict=True)
        ):
            for x, scheme in enumerate(SCHEMES):
                runs = [
                    u
                    for u in units
                    if (u.training, u.partition, u.scheme) == (training, partition, scheme)
                    and not u.diverged
                ]
                if not runs:
                    continue
                place = x + 0.25 * (offset - 1)
                whole = [u.sites_accuracy for u in runs]
                is_local = runs[0].shared_accuracy is None
                axis.plot([place] * len(whole), [100 * v for v in whole], linestyle="none",
                          marker="D" if is_local else "o", color=colour, markersize=4)  # fmt: skip
                local = [100 * u.local_accuracy for u in runs]
                axis.plot([place] * len(local), local, linestyle="none", marker="o",
                          markerfacecolor="none", color=colour, markersize=6)  # fmt: skip
        axis.set_title(TRAININGS[training])
        axis.set_xticks(range(len(SCHEMES)), SCHEMES, rotation=60, ha="right")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy %")
    for partition, colour in zip(PARTITIONS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
        axes[0][0].plot([], [], "o", color=colour, label=PARTITIONS[partition])
    axes[0][0].plot([], [], "o", color="grey", label="shared model, common test set")
    axes[0][0].plot([], [], "D", color="grey", label="sites' own models, common test set")
    axes[0][0].plot([], [], "o", color="grey", markerfacecolor="none", label="local labels")
    figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.study normalization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help="digits, cifar10, or a path to a config")
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 .. N-1 (default 1)")
    for name, choices in (
        ("trainings", list(TRAININGS)),
        ("partitions", list(PARTITIONS)[::-1]),
        ("schemes", list(SCHEMES)),
    ):
        parser.add_argument(
            f"--{name}", nargs="+", choices=choices, default=choices, metavar=name[:-1].upper()
        )
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--output", type=Path, help="default outputs/study-normalization-TASK")
    parser.add_argument("--data-dir", help="overrides the config's data-dir")
    parser.add_argument("--examples", type=int, help="overrides the config's examples")
    parser.add_argument("--test-examples", type=int, default=0, help="default 0: all")
    parser.add_argument("--total-epochs", type=int, help="overrides the config's total-epochs")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """Run the study from the command line."""
    options = parse_arguments(arguments)
    logging.getLogger("flwr").setLevel(logging.ERROR)  # one progress bar says it all
    torch.set_num_threads(1)  # networks this small gain nothing from more
    path = Path(options.task)
    if path.suffix != ".toml":
        path = CONF / f"normalization-{options.task}.toml"
    config = read_config(path)
    for name in ("data_dir", "examples", "total_epochs"):
        if getattr(options, name) is not None:
            config[name.replace("_", "-")] = getattr(options, name)
    check_keys(config, str(path))
    task = path.stem.removeprefix("normalization-")
    output = options.output or Path("outputs") / f"study-normalization-{task}"
    plan = list(
        cells(
            options.trainings,
            options.partitions,
            options.schemes,
            range(options.seeds),
            ParticipantSettings.from_config(config),
            RunSettings.from_config(config),
            options.test_examples,
        )
    )
    units = run_study(plan, output, options.minutes)
    print(write_report(units, plan, output, f"{task}: normalization schemes"))
    print(f"\n{len(units)} of {len(plan)} units; results, table and picture are in {output}")
