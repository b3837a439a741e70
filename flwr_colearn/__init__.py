"""Co-learning across data centers as a Flower strategy: few, long rounds, nothing lost.

On the server ``CoLearn`` takes the place of ``FedAvg``; a participant iterates the ``LocalPlan``
that it finds in its train config. The rest are the values that the two are made of.
"""

from .averaging import RunningMean, relative_change
from .checkpoint import CheckpointFolder
from .colearn import CoLearn
from .errors import ColearnError
from .history import History, RoundRecord
from .inprocess import InProcessGrid
from .participant import introduce, participant_mod
from .plan import Epoch, LocalPlan
from .recovery import Quorum, RecoveringGrid, Recovery
from .roles import Role
from .schedules import (
    ConstantRate,
    CyclicalRate,
    ExponentialRate,
    FixedEpochs,
    IncreasingEpochs,
)
from .wire import BFloat16, Float16, Float32, Int8, Wire, wire_mod

__version__ = "0.1.0"

__all__ = [
    "BFloat16",
    "CheckpointFolder",
    "CoLearn",
    "ColearnError",
    "ConstantRate",
    "CyclicalRate",
    "Epoch",
    "ExponentialRate",
    "FixedEpochs",
    "Float16",
    "Float32",
    "History",
    "InProcessGrid",
    "IncreasingEpochs",
    "Int8",
    "LocalPlan",
    "Quorum",
    "RecoveringGrid",
    "Recovery",
    "Role",
    "RoundRecord",
    "RunningMean",
    "Wire",
    "introduce",
    "participant_mod",
    "relative_change",
    "wire_mod",
]
