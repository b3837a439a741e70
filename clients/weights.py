"""Readers of pretrained weights."""

from pathlib import Path

import numpy as np

from clients.trainer import NDArray
from flwr_colearn import ColearnError


def read_weights(path: str | Path) -> dict[str, NDArray]:
    """Return the arrays of a file of weights by name.

    Parameters
    ----------
    path : str or Path
        ``.npz`` of numpy, ``.safetensors``, or ``.pt`` or ``.pth``, a state dict of PyTorch. No
        format runs code: pickled objects are refused.

    Raises
    ------
    ColearnError
        If the file is of another format or cannot be read, or the reader is not installed.
    """
    path = Path(path)
    readers = {
        ".npz": _npz,
        ".safetensors": _safetensors,
        ".pt": _state_dict,
        ".pth": _state_dict,
    }
    if path.suffix not in readers:
        raise ColearnError(
            f"run config 'initial-weights': expected a file {', '.join(readers)}, found {path}"
        )
    try:
        return readers[path.suffix](path)
    except ModuleNotFoundError as error:
        raise ColearnError(
            f"run config 'initial-weights': expected {error.name} to be installed to read {path}, "
            f"found no such module; pip install {error.name}, or use another format"
        ) from error
    except ColearnError:
        raise
    except Exception as error:  # a damaged file makes the readers raise errors of many types
        raise ColearnError(
            f"run config 'initial-weights': expected a readable file of weights, found in {path}: "
            f"{error!r}"
        ) from error


def _npz(path: Path) -> dict[str, NDArray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def _safetensors(path: Path) -> dict[str, NDArray]:
    from safetensors.numpy import load_file

    return dict(load_file(path))


def _state_dict(path: Path) -> dict[str, NDArray]:
    from clients.torch.weights import read_state_dict

    return read_state_dict(path)
