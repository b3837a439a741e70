"""The folder of a run on the server: where history, checkpoints, model and summary go."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from flwr_colearn import ColearnError
from simulations.settings import RunSettings


def run_name(config: Mapping[str, Any]) -> str:
    """Return the name of the run: the run config's, else one made of its settings.

    The same settings give the same name, so that a run that is started again, after a crash of the
    server, finds its checkpoints; other settings are another run.
    """
    if config.get("run-name"):
        return str(config["run-name"])
    digest = hashlib.sha256(json.dumps(sorted(config.items())).encode()).hexdigest()[:8]
    task = str(config.get("task", "run")).rpartition(":")[2]
    return f"{task}-{config.get('arm', 'run')}-{digest}"


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, against which the relative paths of its run config are resolved.

    A ServerApp's working directory is the folder in which the SuperLink was started, perhaps by
    another app, and the app's own folder changes with its version: neither can hold results.

    Attributes
    ----------
    path : Path
        The run config's ``output-dir`` if that is absolute; else that below
        ``$FLWR_HOME/colearn/<run-name>``, where FLWR_HOME is ``~/.flwr`` by default.
    name : str
        The name of the run.
    config : mapping
        The run config.
    """

    path: Path
    name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, settings: RunSettings, config: Mapping[str, Any]) -> "RunFolder":
        """Return the folder of a run config, which exists and is writable then.

        Raises
        ------
        ColearnError
            If it cannot be written.
        """
        home = Path(os.environ.get("FLWR_HOME") or Path.home() / ".flwr").absolute()
        name = run_name(config)
        if Path(name).name != name or name in (".", ".."):
            raise ColearnError(f"run config 'run-name': expected a file name, found {name!r}")
        path = home / "colearn" / name / settings.output_dir
        try:
            path.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=path):
                pass
        except OSError as error:
            # Found now, not after the first round: a round may take a day.
            raise ColearnError(
                f"run config 'output-dir': expected a folder that the ServerApp can write, found "
                f"{error}; set FLWR_HOME of the SuperLink, or 'output-dir', to another one"
            ) from error
        return cls(path, name, config)

    def resolve(self, path: str) -> Path | None:
        """Return a path of the run config, relative ones in this folder; None for an empty one."""
        return self.path / path if path else None
