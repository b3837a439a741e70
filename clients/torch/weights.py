"""The reader of PyTorch's state dicts."""

from pathlib import Path

import torch
from torch import Tensor

from clients.trainer import NDArray
from flwr_colearn import ColearnError
from flwr_colearn.torch import to_array


def read_state_dict(path: Path) -> dict[str, NDArray]:
    """Return the arrays of a state dict that ``torch.save`` wrote.

    Raises
    ------
    ColearnError
        If the file holds something else.
    """
    # weights_only: a pickle from elsewhere may run any code.
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ColearnError(
            f"run config 'initial-weights': expected a state dict, tensors by name, in {path}, "
            f"found {type(state).__name__}; save model.state_dict()"
        )
    return {name: to_array(tensor, name) for name, tensor in state.items()}
