"""The participant of this repository's Flower app: ``clients.app:app`` in pyproject.toml."""

from collections.abc import Callable
from functools import lru_cache
from typing import cast

from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord

from clients.alone import COMMON, OWN, CompareAlone, Tests
from clients.client_app import make_client_app
from clients.settings import ParticipantSettings
from clients.tasks.own_data import class_counts
from clients.tasks.registry import (
    agreement,
    common_trainer,
    own_task,
    participant_trainer,
    site_trainer,
)
from clients.tasks.sources import imported_task
from clients.trainer import Trainer
from flwr_colearn import ColearnError

AGREEMENT = "task-agreement"
"""The key of the train config with the digest of what the sites' tasks must have alike."""


def build(context: Context) -> Trainer:
    """Return the trainer that a participant's run config and node config describe.

    A node config with ``partition-id`` and ``num-partitions`` is that of a simulation, in which all
    participants have the whole data set and each trains on its part. Without them the site trains
    on all of its own data, in the node config's ``data-dir``.

    Raises
    ------
    ColearnError
        If the node config has a ``data-dir`` beside a ``partition-id``, or one of
        ``partition-id`` and ``num-partitions`` without the other.
    """
    _refuse_both(context)
    settings = _settings(context)
    number, of = (context.node_config.get(key) for key in ("partition-id", "num-partitions"))
    if number is None and of is None:
        return _site_trainer(settings)
    if number is None or of is None:
        raise ColearnError(
            "node config: expected 'partition-id' and 'num-partitions' together, as in a "
            "simulation, or neither, for a site with data of its own in 'data-dir'; found one: "
            f"{dict(context.node_config)}"
        )
    return _trainer(settings, int(number), int(of))


def _refuse_both(context: Context) -> None:
    """Raise a ColearnError if the node config describes a simulation and own data at once.

    A site with a ``partition-id`` would train on one shard of its folder only.
    """
    if "data-dir" in context.node_config and "partition-id" in context.node_config:
        raise ColearnError(
            "node config: expected either 'data-dir' or 'partition-id', found both. A site with a "
            "'partition-id' trains on its share of one data set that all sites have, here one of "
            f"{context.node_config.get('num-partitions', 'several')} parts of "
            f"{context.node_config['data-dir']}. To train on all of a site's own data, start its "
            "SuperNode without 'partition-id' and 'num-partitions': --node-config "
            f'\'name="..." data-dir="{context.node_config["data-dir"]}"\'. For a share of common '
            "data, leave 'data-dir' out, and name the folder in the run config: "
            "flwr run . LINK --run-config 'data-dir=\"...\"'"
        )


def _settings(context: Context) -> ParticipantSettings:
    # A site's node config (devices, workers) takes precedence over the run config, since only the
    # site knows its hardware. The folder of the run config is never a site's own: without one in
    # its node config the site would train on whatever lies there.
    settings = ParticipantSettings.from_config({**context.run_config, **context.node_config})
    if "partition-id" not in context.node_config and "data-dir" not in context.node_config:
        raise ColearnError(
            "node config: expected 'data-dir', the folder of this site's own data, or, in a "
            "simulation, 'partition-id' and 'num-partitions'; found neither among "
            f"{', '.join(context.node_config) or 'no keys'}. For example --node-config "
            '\'name="utrecht" data-dir="/srv/data"\''
        )
    return settings


def check_agreement(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Refuse to train where a file that the sites must have alike differs from the server's.

    Raises
    ------
    ColearnError
        If the digests differ. The shapes of the models would agree, and the average of models
        over differently numbered words would be useless.
    """
    config = message.content.get("config")
    wanted = (
        str(config[AGREEMENT]) if isinstance(config, ConfigRecord) and AGREEMENT in config else None
    )
    if wanted is not None and wanted != (found := agreement(_settings(context))):
        raise ColearnError(
            "run config 'vectors' or 'vocabulary-file': expected the server's file (digest "
            f"{wanted}), found another (digest {found}); copy the server's file to this site"
        )
    return call_next(message, context)


def report_class_counts(
    message: Message, context: Context, call_next: Callable[[Message, Context], Message]
) -> Message:
    """Add the numbers of training examples by class to the evaluation's metrics, if permitted.

    Only the site's node config gives the permission, ``class-counts=true``; the run config cannot.
    """
    reply = call_next(message, context)
    wanted = message.metadata.message_type == MessageType.EVALUATE and reply.has_content()
    if wanted and context.node_config.get("class-counts") is True:
        settings = _settings(context)
        metrics = cast(MetricRecord, reply.content["metrics"])
        metrics.update(class_counts(_own_task(settings), settings))
    return reply


def compared_on(context: Context) -> Tests:
    """Return the trainers on the test sets on which a site compares the shared model and its own.

    A participant of a simulation holds nothing out, and so does a site with `held_out` 0: on
    examples that it has trained on, a model alone would always be the better one.
    """
    settings, simulated = _settings(context), "partition-id" in context.node_config
    tests = {COMMON: _common_trainer(settings, simulated)}
    if not simulated:
        task = _own_task(settings)
        holds_out = task.test_set is not task.train_set
        tests = {OWN: build(context) if holds_out else None, **tests}
    return {name: trainer for name, trainer in tests.items() if trainer is not None}


def compare(context: Context) -> CompareAlone | None:
    """Return the comparison that the run config asks for, if it does."""
    return CompareAlone(compared_on) if _settings(context).compare_alone else None


# A process that handles many messages (simulation, in process) prepares each shard once. Every
# `set_weights` reinitialises the trainer's optimizer, so no state leaks from one round to the next.
_trainer = lru_cache(maxsize=64)(participant_trainer)
_own_task = lru_cache(maxsize=8)(own_task)
_common_trainer = lru_cache(maxsize=8)(common_trainer)


@lru_cache(maxsize=8)
def _site_trainer(settings: ParticipantSettings) -> Trainer:
    return site_trainer(settings, _own_task(settings))


def forget_trainers() -> None:
    """Free the models and data that this process caches for its participants."""
    _trainer.cache_clear()
    _site_trainer.cache_clear()
    _own_task.cache_clear()
    _common_trainer.cache_clear()
    imported_task.cache_clear()


app = make_client_app(
    build,
    seed=lambda context: _settings(context).seed,
    keep_optimizer=lambda context: _settings(context).keep_optimizer,
    mods=[check_agreement, report_class_counts],
    compare=compare,
)
