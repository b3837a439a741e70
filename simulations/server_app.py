"""The server of this repository's Flower app: co-learning from a run config."""

import json
from collections.abc import Callable
from logging import INFO
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from clients.app import AGREEMENT
from clients.settings import ParticipantSettings
from clients.tasks.registry import server_task, server_trainer
from clients.trainer import Trainer
from clients.weights import read_weights
from flwr_colearn import (
    CoLearn,
    ColearnError,
    History,
    Normalization,
    Pooled,
    RunResult,
    Sink,
)
from flwr_colearn.compression import Compression, codec_named
from flwr_colearn.reporting import Run, TensorBoard, curve, save_figure, save_report
from simulations.arms import arm_named, schedules
from simulations.run_folder import RunFolder
from simulations.settings import RunSettings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train with co-learning; write history, model, figure and summary to the run's folder."""
    # Flower merges the app's defaults and the user's overrides into one run config, from which each
    # side reads its own keys.
    participants = ParticipantSettings.from_config(context.run_config)
    settings = RunSettings.from_config(context.run_config)
    folder = RunFolder.of(settings, context.run_config)
    log(INFO, "History, checkpoints and model are in %s", folder.path)
    task = server_task(participants)
    trainer = server_trainer(participants, task)
    if settings.initial_weights:
        trainer.set_weights(read_weights(settings.initial_weights))
    has_test_set = len(task.test_set) > 0
    if not has_test_set:
        log(INFO, "The server has no test set: the sites evaluate the shared model on their own")
    settings = settings.with_evaluation(has_test_set, participants.compare_alone)
    strategy = make_strategy(
        settings,
        trainer,
        History(folder.resolve(settings.history), trackers(settings, folder)),
        folder.resolve(settings.checkpoints),
        normalization=participants.scheme,
    )
    try:
        result = strategy.start(
            settings.transport.connect(grid),
            to_record(trainer),
            num_rounds=settings.num_server_rounds or None,
            timeout=settings.timeout or float("inf"),
            train_config=ConfigRecord({AGREEMENT: task.agreement} if task.agreement else {}),
            evaluate_fn=evaluate_with(trainer) if has_test_set else None,
            resume=settings.resume,  # type: ignore[arg-type]  # start checks it
            best=settings.best,
        )
    except ColearnError as error:
        # A run that fails in a later round has a usable model of the round before.
        if error.result is not None and len(strategy.history):
            save_model(error.result, folder.path)
            save_best(error.result, folder.path)
            log(INFO, "The model of the last completed round is in %s", folder.path)
            illustrate(strategy.history, settings, folder, task.objective.headline)
        raise
    save_model(result, folder.path)
    save_best(result, folder.path)
    summarise(result, strategy.history, settings, folder.path, task.objective.headline)
    illustrate(strategy.history, settings, folder, task.objective.headline)
    log(INFO, "History, model and summary are in %s", folder.path)


def trackers(settings: RunSettings, folder: RunFolder) -> list[Sink]:
    """Return the sinks of the history that the settings name.

    Raises
    ------
    ColearnError
        If the tracker is unknown, or not installed.
    """
    if settings.tracker not in ("", "tensorboard"):
        raise ColearnError(
            "run config 'tracker': expected 'tensorboard', or '' for none, found "
            f"{settings.tracker!r}"
        )
    return [TensorBoard(folder.path / settings.tracker)] if settings.tracker else []


def make_strategy(
    settings: RunSettings,
    trainer: Trainer,
    history: str | Path | History | None,
    checkpoints: str | Path | None = None,
    normalization: Normalization = Pooled(),  # noqa: B008  (an immutable value)
) -> CoLearn:
    """Return the strategy of the arm that the settings name.

    The normalization scheme must be that of the participants' settings, because participants
    convert their models to it.
    """
    arm = arm_named(settings.arm)
    if arm.alone:
        raise ColearnError(
            f"run config 'arm': expected one whose participants exchange models, found "
            f"{settings.arm!r}; python -m simulations.study runs it"
        )
    return CoLearn(
        len(settings.participant_names or ()) or settings.num_participants,
        **schedules(arm, settings),
        weighting=settings.weighting,  # type: ignore[arg-type]  # CoLearn checks it
        roles=trainer.roles(),
        history=history,
        checkpoints=checkpoints,
        compression=Compression(
            codec_named(settings.compression_up), codec_named(settings.compression_down)
        ),
        fraction_evaluate=max(settings.fraction_evaluate, 0.0),
        wait_for_participants=settings.wait_for_participants,
        recovery=settings.recovery,
        normalization=normalization,
    )


def to_record(trainer: Trainer) -> ArrayRecord:
    """Return a trainer's weights as an ArrayRecord."""
    return ArrayRecord({name: Array(array) for name, array in trainer.get_weights().items()})


def evaluate_with(trainer: Trainer) -> Callable[[int, ArrayRecord], MetricRecord]:
    """Return an `evaluate_fn` that evaluates on the trainer's test set."""

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        trainer.set_weights({name: array.numpy() for name, array in arrays.items()})
        return MetricRecord({**trainer.evaluate()})

    return evaluate


def save_model(result: RunResult, output: Path) -> None:
    """Write the model's arrays by name to ``model.npz``."""
    save_arrays(result.arrays, output / "model.npz")


def save_best(result: RunResult, output: Path) -> None:
    """Write the best model's arrays by name to ``best.npz``, if there is one."""
    if result.best is not None:
        save_arrays(result.best.arrays, output / "best.npz")


def save_arrays(record: ArrayRecord, path: Path) -> None:
    """Write a model's arrays by name to a file, whose folder is created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: array.numpy() for name, array in record.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def summarise(
    result: RunResult, history: History, settings: RunSettings, output: Path, headline: str
) -> None:
    """Write ``summary.json``, and log the summary."""
    last = history.records[-1]
    metrics = last.server_metrics or last.evaluate_metrics
    summary = {
        **({headline: metrics[headline]} if headline in metrics else {}),
        **({"sites": last.site_metrics} if last.site_metrics else {}),
        "rounds": len(history),
        "local-epochs": last.epochs_done,
        "epochs-path": history.epochs_path,
        "bytes": history.bytes_total,
        # For comparison: federated averaging has a round every T0 local epochs (rounded up), each
        # with as many bytes as a round of this run.
        "fedavg-rounds": -(-last.epochs_done // settings.initial_epochs),
    }
    summary["fedavg-bytes"] = summary["fedavg-rounds"] * summary["bytes"] // summary["rounds"]
    if result.best is not None:
        best = result.best
        summary["best"] = {"metric": best.metric, "value": best.value, "round": best.round}
    if result.stopped:
        summary["stopped"] = result.stopped
    if "shared-model" in last.normalization:
        summary["shared-model"] = last.normalization["shared-model"]
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    for key, value in summary.items():
        log(INFO, "%s: %s", key, value)


def illustrate(history: History, settings: RunSettings, folder: RunFolder, headline: str) -> None:
    """Write ``report.html`` and a figure of the headline metric.

    matplotlib is optional (extra ``report``): without it a finished run must not fail.
    """
    arm, output = arm_named(settings.arm), folder.path
    threshold = settings.epsilon if arm.increasing else None
    epsilon = None if isinstance(threshold, str) else threshold
    run = Run(arm.title, history.records, epsilon, folder.config)
    try:
        log(INFO, "Report: %s", save_report([run], output / "report.html", folder.name))
        curves = [curve(history, arm.title, headline)]
        save_figure(curves, output / f"{headline}.png", arm.title, headline)
    except ColearnError as error:
        log(INFO, "No figure: %s", error)
