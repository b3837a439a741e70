"""Co-learning across data centers as a Flower strategy: few, long rounds, nothing lost.

On the server ``CoLearn`` takes the place of ``FedAvg``; a participant iterates the ``LocalPlan``
that it finds in its train config. The rest are the values that the two are made of.
"""

from .averaging import RunningMean, relative_change
from .checkpoint import CheckpointFolder
from .colearn import CoLearn
from .dynamic import DynamicAveraging, ModelAveraging
from .dynamic_history import DynamicHistory, DynamicRecord
from .errors import ColearnError
from .history import History, RoundRecord
from .inprocess import InProcessGrid
from .learner import learner
from .operators import Relative
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

__version__ = "0.1.0"

__all__ = [
    "CheckpointFolder",
    "CoLearn",
    "ColearnError",
    "ConstantRate",
    "CyclicalRate",
    "DynamicAveraging",
    "DynamicHistory",
    "DynamicRecord",
    "Epoch",
    "ExponentialRate",
    "FixedEpochs",
    "History",
    "InProcessGrid",
    "IncreasingEpochs",
    "LocalPlan",
    "ModelAveraging",
    "Quorum",
    "RecoveringGrid",
    "Recovery",
    "Relative",
    "Role",
    "RoundRecord",
    "RunningMean",
    "introduce",
    "learner",
    "participant_mod",
    "relative_change",
]
