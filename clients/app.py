"""The participant of this repository's Flower app: ``clients.app:app`` in pyproject.toml."""

from functools import lru_cache

from flwr.app import Context

from clients.client_app import make_client_app
from clients.settings import ParticipantSettings
from clients.tasks.registry import participant_trainer
from clients.trainer import Trainer
from flwr_colearn import ColearnError


def build(context: Context) -> Trainer:
    """Return the trainer that a participant's run config and node config describe.

    Raises
    ------
    ColearnError
        If the node config has a ``data-dir`` beside a ``partition-id``.
    """
    _refuse_own_data(context)
    settings = _settings(context)
    return _trainer(
        settings,
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
    )


def _refuse_own_data(context: Context) -> None:
    """Raise a ColearnError if the node config names a data folder of the site's own.

    A site with a ``partition-id`` would train on one shard of that folder only.
    """
    if {"data-dir", "partition-id"} <= set(context.node_config):
        raise ColearnError(
            "node config: expected either 'data-dir' or 'partition-id', found both. A site with a "
            "'partition-id' trains on its share of one data set that all sites have, here one of "
            f"{context.node_config.get('num-partitions', 'several')} parts of "
            f"{context.node_config['data-dir']}; training on all of a site's own data is not "
            "supported yet. Leave 'data-dir' out of --node-config, and name the folder of the "
            "common data in the run config: flwr run . LINK --run-config 'data-dir=\"...\"'"
        )


def _settings(context: Context) -> ParticipantSettings:
    # A site's node config (devices, workers) takes precedence over the run config, since only the
    # site knows its hardware.
    return ParticipantSettings.from_config({**context.run_config, **context.node_config})


# A process that handles many messages (simulation, in process) prepares each shard once. Every
# `set_weights` reinitialises the trainer's optimizer, so no state leaks from one round to the next.
_trainer = lru_cache(maxsize=64)(participant_trainer)


def forget_trainers() -> None:
    """Free the models and data that this process caches for its participants."""
    _trainer.cache_clear()


app = make_client_app(
    build,
    seed=lambda context: _settings(context).seed,
    keep_optimizer=lambda context: _settings(context).keep_optimizer,
)
