"""A module's arrays by name, and their roles."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ColearnError
from ..roles import NDArray, Role

_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def get_arrays(model: nn.Module) -> dict[str, NDArray]:
    """Return copies of the arrays of a model's state dict, by name.

    bfloat16 tensors become float32 arrays, see `to_array`.
    """
    return {name: to_array(tensor) for name, tensor in model.state_dict().items()}


def to_array(tensor: Tensor) -> NDArray:
    """Return a copy of a tensor as an array; a bfloat16 tensor as float32.

    numpy has no bfloat16. Every bfloat16 number is a float32 number too, so nothing is rounded
    here; `set_arrays` rounds an average to the nearest bfloat16.
    """
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.float().numpy()
    # A copy: on the CPU .numpy() shares memory with the model, which trains on.
    return tensor.numpy().copy()


def set_arrays(model: nn.Module, arrays: Mapping[str, NDArray]) -> None:
    """Load arrays, which may be read-only, into a model's state dict.

    The float32 arrays of bfloat16 tensors are rounded to the nearest bfloat16.

    Raises
    ------
    ColearnError
        If names or shapes differ from the model's.
    """
    # A copy, because the arrays may be read-only views of a message.
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ColearnError(
            f"weights: expected those of this participant's {type(model).__name__}, "
            f"found others; is it the server's model? {error}"
        ) from error


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of every array of a model's state dict, by module type, never by name.

    Trained parameters are ``trainable``. Running means, variances and counters of normalization
    layers have the roles of these names. Frozen parameters and other buffers are ``buffer``.

    Examples
    --------
    Roles by name are enough for most models. A model whose own arrays are called ``running_mean``,
    or with frozen parameters, needs these::

        strategy = CoLearn(5, ..., roles=roles(model))
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    found = {
        name: _role_by_type(tensor, name in trained) for name, tensor in model.state_dict().items()
    }
    for layer, module in model.named_modules():
        if isinstance(module, _NORMS_WITH_STATISTICS):
            prefix = f"{layer}." if layer else ""
            for buffer, role in (("running_mean", Role.MEAN), ("running_var", Role.VARIANCE)):
                if prefix + buffer in found:
                    found[prefix + buffer] = role
    return found


def _role_by_type(tensor: Tensor, is_trained: bool) -> Role:
    if not tensor.is_floating_point():
        return Role.COUNTER
    return Role.TRAINABLE if is_trained else Role.BUFFER
