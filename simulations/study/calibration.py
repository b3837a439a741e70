"""Which epsilon would double T when: the paper gives none."""

from dataclasses import replace

from clients.settings import ParticipantSettings
from flwr_colearn.errors import whole_number
from flwr_colearn.reporting import calibration_of
from simulations.arms import arm_named
from simulations.settings import RunSettings
from simulations.study.training import train_averaged

ARM = "clr-fle"


def calibrate(participants: ParticipantSettings, settings: RunSettings, rounds: int) -> str:
    """Train some rounds of T0 epochs each, and return what ``flwr-colearn calibrate`` prints."""
    whole_number("--calibrate", rounds, least=1)
    short = replace(settings, num_server_rounds=rounds, total_epochs=0)
    return str(calibration_of(train_averaged(ARM, arm_named(ARM), participants, short)))
