"""Units of a study: each result is written as it ends, and read back instead of running again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from clients.data import Task
from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError
from simulations.settings import RunSettings

Curves = dict[str, list[float]]
"""Values by metric, after each round."""


class Unit(Protocol):
    """The result of one run: a dataclass of what JSON can hold."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings that gave it."""


U = TypeVar("U", bound=Unit)


def load_or_run(path: Path, kind: type[U], config: Mapping[str, Any], run: Callable[[], U]) -> U:
    """Return the unit that `path` holds; if there is none, run it and write it there.

    Raises
    ------
    ColearnError
        If `path` holds a unit of another config.
    """
    if path.exists():
        return read_unit(path, kind, config)
    unit = run()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(asdict(unit)) + "\n")
    scratch.replace(path)
    return unit


def read_unit(path: Path, kind: type[U], config: Mapping[str, Any]) -> U:
    """Return a unit written earlier.

    Raises
    ------
    ColearnError
        If it is damaged, or was written with another config. A setting that did not exist at the
        time had what is its default now.
    """
    try:
        unit = kind(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ColearnError(
            f"{path}: expected a {kind.__name__} as JSON, found {error}; remove it"
        ) from None
    then = {**_DEFAULTS, **unit.config}
    different = sorted(key for key in config if _as_json(config[key]) != then.get(key))
    if different:
        raise ColearnError(
            f"{path}: expected a result of the same config, found another {', '.join(different)}; "
            "use another --output or remove it"
        )
    return unit


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def unit_config(participants: ParticipantSettings, settings: RunSettings) -> dict[str, Any]:
    """Return the settings that a result depends on; not those of the machine it came from."""
    config = {**participants.to_config(), **settings.to_config()}
    # Studies evaluate at the server, whatever the share of participants that would.
    apart = ("data-dir", "devices", "workers", "output-dir", "wait-for-participants", "arm")
    for key in (*apart, "fraction-evaluate"):
        del config[key]
    config["vectors"] = Path(participants.vectors).name  # in a folder of each machine's own
    return config


def data_digest(task: Task) -> str:
    """Return eight characters that differ between data sets: by their sizes and labels."""
    content = hashlib.sha256()
    for part in (task.train_set, task.test_set):
        content.update(f"{len(part)} {part.labels.dtype.str} {part.labels.shape}".encode())
        content.update(np.ascontiguousarray(part.labels).tobytes())
    return content.hexdigest()[:8]


def check_same_data(found: Mapping[str, str]) -> None:
    """Raise a ColearnError if units of one config were trained on different data.

    Parameters
    ----------
    found : mapping
        By the `data_digest` of the units' data, the name of one of them.
    """
    if len(found) > 1:
        raise ColearnError(
            f"units: expected results of one data set, found other data in "
            f"{'; '.join(found.values())}; use another --output or remove the wrong ones"
        )


def checkpoint_beside(path: Path, config: Mapping[str, Any], data: str) -> Path:
    """Return the folder of the checkpoint of the unit whose result is `path`.

    It is named after config and data, so that a unit never goes on from others.
    """
    return path.with_suffix(f".{digest({**config, 'data': data})}.checkpoint")


def digest(config: Mapping[str, Any]) -> str:
    """Return eight characters that differ between configs."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


_DEFAULTS = unit_config(ParticipantSettings(), RunSettings())
