"""The strategies in which every participant sends its model, or gradient, in every round."""

from .algorithm import Algorithm, Progress, algorithm_of, plan_record
from .arguments import participant_arguments
from .averaging import Averaging
from .colearn import CoLearn
from .synchronous import GRADIENTS, SynchronousSGD

__all__ = [
    "GRADIENTS",
    "Algorithm",
    "Averaging",
    "CoLearn",
    "Progress",
    "SynchronousSGD",
    "algorithm_of",
    "participant_arguments",
    "plan_record",
]
