"""Co-learning across data centers as a Flower strategy: few, long rounds, nothing lost.

On the server ``CoLearn`` takes the place of ``FedAvg``; a participant iterates the ``LocalPlan``
that it finds in its train config. The rest are the values that the two are made of.
"""

from .aggregation.mean import RunningMean, relative_change
from .checkpoint import CheckpointFolder
from .compression.client import wire_mod
from .compression.codecs import BFloat16, Float16, Float32, Int8, Wire
from .dynamic.client import learner
from .dynamic.operators import Relative
from .dynamic.record import DynamicHistory, DynamicRecord
from .dynamic.strategy import DynamicAveraging, ModelAveraging
from .errors import ColearnError
from .grids.in_process import InProcessGrid
from .grids.threaded import SideBySideGrid
from .history import History, RoundRecord
from .normalization.client import normalization_mod
from .normalization.grid import NormalizationGrid
from .normalization.schemes import (
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
from .plan import Epoch, LocalPlan
from .recovery.client import introduce, participant_mod
from .recovery.grid import Quorum, RecoveringGrid, Recovery
from .roles import Role
from .schedules import (
    ConstantRate,
    CyclicalRate,
    ExponentialRate,
    FixedEpochs,
    IncreasingEpochs,
)
from .strategies.averaging import NormalizedFedAvg
from .strategies.colearn import CoLearn
from .strategies.synchronous import SynchronousSGD

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
