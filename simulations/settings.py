"""What a run's config says to the server, and reading config files."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.settings import FromConfig, ParticipantSettings
from flwr_colearn import ColearnError

CONF = Path(__file__).parent / "conf"
"""Folder of the run configs."""


@dataclass(frozen=True)
class RunSettings(FromConfig):
    """The server's side of a run; each field is a run-config key.

    Attributes
    ----------
    arm : str
        "clr-ile" (co-learning), "clr-fle", "elr-ile" or "elr-fle" (federated averaging).
    num_participants : int
        K.
    num_server_rounds : int
        Most rounds to run; 0 for as many as `total_epochs` allows.
    total_epochs : int
        Budget of local epochs per participant, and E of the exponential rate; 0 for none.
    initial_epochs : int
        T0 (the fixed T of the "fle" arms).
    epsilon : float
        Of eq. 4.
    max_local_epochs : int
        T never grows beyond it; 0 for no limit.
    learning_rate, decay : float
        eta and r.
    weighting : str
        "uniform" or "weighted".
    compression_up, compression_down : str
        How models travel from and to the participants: "float32" (as they are), "float16",
        "bfloat16"; up also "int8", with a scale for each array, "int8-first-axis" or
        "int8-last-axis", with one for each channel.
    fraction_evaluate : float
        Share of participants that evaluate the shared model on their own data after each round;
        the server evaluates on the common test set in any case.
    wait_for_participants : float
        Seconds to wait for K participants to connect.
    output_dir : str
        Where history, model, figure and summary go; empty for a new folder under ``outputs``.
    """

    arm: str = "clr-ile"
    num_participants: int = 5
    num_server_rounds: int = 0
    total_epochs: int = 60
    initial_epochs: int = 1
    epsilon: float = 0.05
    max_local_epochs: int = 0
    learning_rate: float = 0.05
    decay: float = 0.25
    weighting: str = "uniform"
    compression_up: str = "float32"
    compression_down: str = "float32"
    fraction_evaluate: float = 0.0
    wait_for_participants: float = 60.0
    output_dir: str = ""


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a run config file, as ``flwr run --run-config FILE`` does.

    Raises
    ------
    ColearnError
        If the file is missing or has a key that no setting knows.
    """
    try:
        config = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ColearnError(f"config: expected a readable TOML file, found {error}") from error
    check_keys(config, str(path))
    return config


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise a ColearnError if `config` has a key that no setting knows."""
    known = {**ParticipantSettings().to_config(), **RunSettings().to_config()}
    for key in config:
        if key not in known:
            raise ColearnError(f"{where}: expected keys among {sorted(known)}, found '{key}'")
