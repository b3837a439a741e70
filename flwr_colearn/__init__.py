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
from .fedavg import NormalizedFedAvg
from .history import History, RoundRecord
from .inprocess import InProcessGrid
from .keeping import normalization_mod
from .learner import learner
from .normalization import (
    Average,
    BatchRenorm,
    Frozen,
    GroupNorm,
    LayerNorm,
    LocalBN,
    LocalStatistics,
    Normalization,
    Pooled,
    Recalibrated,
    Synchronised,
)
from .normalization_grid import NormalizationGrid
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
from .sidebyside import SideBySideGrid
from .synchronous import SynchronousSGD
from .wire import BFloat16, Float16, Float32, Int8, Wire
from .wire_participant import wire_mod

__version__ = "0.4.0"

__all__ = [
    "Average",
    "BFloat16",
    "BatchRenorm",
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
    "Float16",
    "Float32",
    "Frozen",
    "GroupNorm",
    "History",
    "InProcessGrid",
    "IncreasingEpochs",
    "Int8",
    "LayerNorm",
    "LocalBN",
    "LocalPlan",
    "LocalStatistics",
    "ModelAveraging",
    "Normalization",
    "NormalizationGrid",
    "NormalizedFedAvg",
    "Pooled",
    "Quorum",
    "Recalibrated",
    "RecoveringGrid",
    "Recovery",
    "Relative",
    "Role",
    "RoundRecord",
    "RunningMean",
    "SideBySideGrid",
    "Synchronised",
    "SynchronousSGD",
    "Wire",
    "introduce",
    "learner",
    "normalization_mod",
    "participant_mod",
    "relative_change",
    "wire_mod",
]
