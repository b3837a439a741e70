"""Co-learning across data centers as a Flower strategy: few, long rounds, with failure recovery.

On the server ``CoLearn`` takes the place of ``FedAvg``. A participant reads the ``LocalPlan`` from
its train config and iterates it. The other names are the arguments and parts of these two.
"""

from ._version import __version__
from .aggregation import RunningMean, relative_change
from .best import Best, BestModel, RunResult
from .checkpoint import CheckpointFolder
from .compression import (
    BFloat16,
    Compression,
    CompressionGrid,
    Float16,
    Int8,
    PackedCodec,
    Uncompressed,
    codec_named,
    register,
)
from .dynamic import (
    Calibrated,
    DynamicAveraging,
    DynamicHistory,
    DynamicRecord,
    ModelAveraging,
    Relative,
    learner,
)
from .epoch_rules import (
    EpochRule,
    FixedEpochs,
    IncreasingEpochs,
    Observations,
    PlateauEpochs,
)
from .errors import ColearnError
from .grids import InProcessGrid, ThreadedGrid
from .history import History, RoundRecord, Sink
from .loop import run
from .normalization import (
    Average,
    BatchRenorm,
    Frozen,
    GroupNorm,
    LayerNorm,
    LocalBN,
    LocalStatistics,
    Normalization,
    NormalizationGrid,
    Pooled,
    Recalibrated,
    Synchronised,
    scheme_named,
)
from .numpy_client import numpy_client_app
from .participant import participant_mod
from .plan import Epoch, LocalPlan
from .policy import Guard, Quorum, Recovery
from .progress import track
from .recovery import RecoveringGrid
from .roles import Role
from .schedules import (
    Annealed,
    ConstantRate,
    CosineRate,
    CyclicalRate,
    ExponentialRate,
    LearningRate,
    ProgressRate,
    Warmup,
)
from .secure import SecureAggregation
from .sharing import share_metrics, shared_metrics
from .strategies import Averaging, CoLearn, SynchronousSGD
from .traffic import RoundTraffic
from .transport import ConnectedGrid, Transport

__all__ = [
    "Annealed",
    "Average",
    "Averaging",
    "BFloat16",
    "BatchRenorm",
    "Best",
    "BestModel",
    "Calibrated",
    "CheckpointFolder",
    "CoLearn",
    "ColearnError",
    "Compression",
    "CompressionGrid",
    "ConnectedGrid",
    "ConstantRate",
    "CosineRate",
    "CyclicalRate",
    "DynamicAveraging",
    "DynamicHistory",
    "DynamicRecord",
    "Epoch",
    "EpochRule",
    "ExponentialRate",
    "FixedEpochs",
    "Float16",
    "Frozen",
    "GroupNorm",
    "Guard",
    "History",
    "InProcessGrid",
    "IncreasingEpochs",
    "Int8",
    "LayerNorm",
    "LearningRate",
    "LocalBN",
    "LocalPlan",
    "LocalStatistics",
    "ModelAveraging",
    "Normalization",
    "NormalizationGrid",
    "Observations",
    "PackedCodec",
    "PlateauEpochs",
    "Pooled",
    "ProgressRate",
    "Quorum",
    "Recalibrated",
    "RecoveringGrid",
    "Recovery",
    "Relative",
    "Role",
    "RoundRecord",
    "RoundTraffic",
    "RunResult",
    "RunningMean",
    "SecureAggregation",
    "Sink",
    "Synchronised",
    "SynchronousSGD",
    "ThreadedGrid",
    "Transport",
    "Uncompressed",
    "Warmup",
    "__version__",
    "codec_named",
    "learner",
    "numpy_client_app",
    "participant_mod",
    "register",
    "relative_change",
    "run",
    "scheme_named",
    "share_metrics",
    "shared_metrics",
    "track",
]
