"""Compare operators of model averaging, in process: cumulative loss against cumulative bytes.

    python -m simulations.study dynamic mnist --data-dir data
    python -m simulations.study dynamic drift

Every learner trains on a stream of its own, one mini-batch a step. Each (operator, seed) is a unit:
its result is written as it ends, and a re-run skips what is there.
"""

import argparse
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.clientapp import ClientApp
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from clients.torch.online import dump, load, make_online_app
from clients.torch.streams import Interleaved, Stream
from flwr_colearn import InProcessGrid, ModelAveraging
from flwr_colearn.dynamic import Serial
from simulations.study.arguments import add_processes_argument
from simulations.study.dynamic_figures import save_over_time, save_tradeoff
from simulations.study.dynamic_operators import operator_named
from simulations.study.dynamic_tasks import Setting, build_model, build_streams, held_out
from simulations.study.units import load_or_run

PROBE_EVERY, PROBE_EXAMPLES = 50, 500


@dataclass(frozen=True)
class Study:
    """A setting and the operators to compare in it."""

    setting: Setting
    operators: tuple[str, ...]


SPEECH = Setting("speech", learners=5, steps=600, batch_size=10, learning_rate=0.1, drifts=1)
DIGITS = Setting("mnist", learners=5, steps=400, batch_size=10, learning_rate=0.1, drifts=1)

STUDIES = {
    "speech": Study(
        SPEECH,
        (
            "none", "periodic-10", "periodic-30",
            "dynamic-1%@10", "dynamic-3%@10", "full-1%@10", "dynamic-auto@10",
        ),
    ),
    "speech-by-speaker": Study(replace(SPEECH, by_speaker=True), ("none", "periodic-10")),
    # 20,000 examples are trained: each once, or 2,350, as many as speech has, 8.5 times each.
    "mnist-once": Study(
        DIGITS, ("none", "periodic-10", "periodic-30", "dynamic-3%@10", "dynamic-auto@10")
    ),
    "mnist-repeated": Study(replace(DIGITS, examples=2350), ("none", "periodic-10")),
    "drift": Study(
        Setting("drift", learners=5, steps=400, batch_size=10, learning_rate=0.1, drifts=1),
        ("none", "periodic-8", "periodic-32", "dynamic-0.2@8", "dynamic-auto@8"),
    ),
    "cifar10": Study(
        Setting(
            "cifar10", learners=5, steps=128, batch_size=10, learning_rate=0.05, examples=10_000
        ),
        ("none", "periodic-1", "periodic-8", "dynamic-0.3", "dynamic-1", "serial"),
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
    held_out : float or None
        The loss of the learners' own models on examples that no learner trains on: the mean over
        learners, examples and the times of measurement, every `PROBE_EVERY` steps; None in a run
        that is too short to have one.
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
    held_out: float | None
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Probing:
    """A stream that measures the learner's model on held-out examples as it goes.

    The learner asks for a mini-batch when its model is the one that it has before the step, so
    models of all operators are measured at the same steps.

    Attributes
    ----------
    stream : Stream
        The stream.
    measure : callable
        ``step -> loss`` of the model as it is.
    losses : list of float
        The results.
    """

    stream: Stream
    measure: Callable[[int], float]
    losses: list[float]

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mini-batch number `index`."""
        if index % PROBE_EVERY == PROBE_EVERY // 2:
            self.losses.append(self.measure(index))
        return self.stream.batch(index)


def learners_app(setting: Setting, data_dir: str, serial: bool, threads: int) -> ClientApp:
    """Return the ClientApp of all learners, or of one that has the streams of all, if serial.

    In a worker process too PyTorch has so many threads.
    """
    torch.set_num_threads(threads)
    model, streams = _initial_model(setting), build_streams(setting, data_dir)

    def measure(step: int) -> float:
        inputs, targets = held_out(setting, data_dir, step)
        return _score(model, inputs[:PROBE_EXAMPLES], targets[:PROBE_EXAMPLES])[0]

    def build(context: Context) -> tuple[nn.Module, Stream]:
        losses = _measured(context)
        probing: list[Stream] = [Probing(stream, measure, losses) for stream in streams]
        index = int(context.node_config["partition-id"])
        return model, Interleaved(tuple(probing)) if serial else probing[index]

    return make_online_app(build, setting.learning_rate)


def _initial_model(setting: Setting) -> nn.Module:
    torch.manual_seed(setting.seed)
    return build_model(setting)


def _measured(context: Context) -> list[float]:
    """Return the list of held-out losses in a learner's state, which comes back to the server."""
    record = context.state.setdefault("held-out", MetricRecord({"losses": []}))
    return cast(list[float], record["losses"])


def run_unit(name: str, setting: Setting, data_dir: str, processes: int = 1) -> DynamicUnit:
    """Train with one operator, the learners in so many processes."""
    operator = operator_named(name, setting.learners)
    model, serial = _initial_model(setting), isinstance(operator, Serial)
    serial_steps, learners = (setting.learners, 1) if serial else (1, setting.learners)
    rounds = setting.steps * serial_steps // operator.check_every

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        if server_round < rounds:
            return None
        load(model, arrays)
        accuracy = _score(model, *held_out(setting, data_dir, setting.steps))[1]
        return MetricRecord({"accuracy": accuracy})

    strategy = ModelAveraging(operator, learners, seed=setting.seed)
    app = partial(learners_app, setting, data_dir, serial, torch.get_num_threads())
    started = time.perf_counter()
    with InProcessGrid(app, learners, processes=processes) as grid:
        strategy.start(grid, dump(model), num_rounds=rounds, evaluate_fn=evaluate)
        probes = [loss for context in grid.contexts.values() for loss in _measured(context)]
    history, moved = strategy.history.records, strategy.history.transfers
    return DynamicUnit(
        name,
        asdict(setting),
        [record.mini_batches // serial_steps for record in history],
        [round(record.cumulative_loss or 0.0, 1) for record in history],
        [record.cumulative_bytes for record in history],
        moved.models_down + moved.models_up,
        moved.control_down + moved.control_up,
        round(statistics.mean(probes), 4) if probes else None,
        float(history[-1].server_metrics["accuracy"]),
        round(time.perf_counter() - started, 1),
    )


@torch.no_grad()
def _score(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return mean loss and accuracy of a model on examples; the model is in training mode after."""
    model.eval()
    outputs = model(inputs)
    model.train()
    right = (outputs.argmax(1) == targets).float().mean()
    return float(nn.functional.cross_entropy(outputs, targets)), float(right)


def run_study(
    operators: Sequence[str],
    setting: Setting,
    seeds: int,
    data_dir: str,
    output: Path,
    processes: int = 1,
) -> list[DynamicUnit]:
    """Run the units that `output` does not hold yet, in so many processes, and return all of them.

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
        run = partial(run_unit, name, seeded, data_dir, processes)
        units.append(load_or_run(path, DynamicUnit, asdict(seeded), run))
    return units


def write_report(units: Sequence[DynamicUnit], setting: Setting, output: Path, title: str) -> str:
    """Write table.md, tradeoff.png and over-time.png (of the first seed); return the table."""
    names = dict.fromkeys(unit.operator for unit in units)
    runs = [[unit for unit in units if unit.operator == name] for name in names]
    alone = {unit.config["seed"]: unit.losses[-1] for unit in units if unit.operator == "none"}
    table: str = tabulate(
        [_row(own, alone) for own in runs], headers="keys", tablefmt="github", disable_numparse=True
    )
    (output / "table.md").write_text(table + "\n")
    save_tradeoff(
        [
            (
                own[0].operator,
                statistics.mean(unit.bytes[-1] for unit in own),
                statistics.mean(unit.losses[-1] for unit in own),
            )
            for own in runs
        ],
        output / "tradeoff.png",
        title,
    )
    save_over_time(
        [(own[0].operator, own[0].steps, own[0].losses, own[0].bytes) for own in runs],
        setting.drift_times,
        output / "over-time.png",
        title,
    )
    return table


def _row(runs: Sequence[DynamicUnit], alone: Mapping[object, float]) -> dict[str, object]:
    """Return a row of the table; `alone` is the loss without averaging, by seed."""
    pairs = [(run.losses[-1], alone.get(run.config["seed"])) for run in runs]
    probed = [run.held_out for run in runs if run.held_out is not None]
    return {
        "operator": runs[0].operator,
        "cumulative loss": _spelled([run.losses[-1] for run in runs], ",.0f"),
        "less than none": _spelled([none - own for own, none in pairs if none is not None], ",.0f"),
        "held-out loss": _spelled(probed, ".3f"),
        "MB up+down": f"{statistics.mean(run.bytes[-1] for run in runs) / 1e6:,.2f}",
        "of it control": f"{statistics.mean(run.control for run in runs) / 1e6:,.2f}",
        "models moved": f"{statistics.mean(run.models for run in runs):,.0f}",
        "accuracy %": _spelled([100 * run.accuracy for run in runs], ".1f"),
    }


def _spelled(values: Sequence[float], form: str) -> str:
    """Return the mean over seeds, with its standard error if there are several."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values) / math.sqrt(len(values)), form)}"


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
    parser.add_argument("--data-dir", default="data", help="of all tasks but drift (default data)")
    parser.add_argument("--output", type=Path, help="default outputs/dynamic-STUDY")
    for name, kind in (("learners", int), ("steps", int), ("learning-rate", float)):
        parser.add_argument(f"--{name}", type=kind, help="instead of the study's")
    add_processes_argument(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # one progress bar says it all
    study = STUDIES[options.study]
    given = {name: getattr(options, name) for name in ("learners", "steps", "learning_rate")}
    setting = replace(study.setting, **{k: v for k, v in given.items() if v is not None})
    operators = options.operators or study.operators
    for name in operators:
        operator_named(name, setting.learners)
    output = options.output or Path("outputs") / f"dynamic-{options.study}"
    units = run_study(
        operators, setting, options.seeds, options.data_dir, output, options.processes
    )
    print(write_report(units, setting, output, f"{options.study}, m = {setting.learners}"))
    print(f"\nResults, table and pictures are in {output}")


if __name__ == "__main__":
    main()
