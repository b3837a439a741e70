"""A module's arrays by name, and their roles."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm

from ..errors import ColearnError
from ..roles import NDArray, Role

_NORMS_WITH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)

_FLOATS_OF_NUMPY = (torch.float16, torch.float32, torch.float64)


def get_arrays(model: nn.Module) -> dict[str, NDArray]:
    """Return copies of the arrays of a model's state dict, by name.

    bfloat16, and the other floats that numpy does not have, become float32, which has each of their
    numbers; the server averages in float32, and `set_arrays` rounds to the model's own type.

    Raises
    ------
    ColearnError
        As `check_state` does, and if a tensor has no equivalent in numpy (sparse, meta).
    """
    check_state(model)
    return {name: to_array(tensor, name) for name, tensor in model.state_dict().items()}


def save_state_dict(arrays: Mapping[str, NDArray], path: str | Path) -> None:
    """Write arrays by name as a state dict, which ``torch.load`` and ``load_state_dict`` take."""
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, path)


def check_state(model: nn.Module) -> None:
    """Raise a ColearnError unless a model's state dict consists of tensors that have shapes.

    The parameters of a lazy module have none before its first batch, and a module's
    ``get_extra_state`` may return any object, which no server can average.
    """
    state = model.state_dict()
    lazy = [name for name, tensor in state.items() if is_lazy(tensor)]
    if lazy:
        raise ColearnError(
            f"model: expected one whose arrays have shapes, found lazy ones {lazy[:3]}; pass a "
            "batch through the model before it is used: model(inputs)"
        )
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ColearnError(
                f"model: expected tensors only in its state dict, found {type(value).__name__} at "
                f"'{name}'; return a tensor from get_extra_state, or keep this state out of the "
                "state dict"
            )


def to_array(tensor: Tensor, name: str = "tensor") -> NDArray:
    """Return a tensor's copy as an array; bfloat16 and 8-bit floats become float32.

    Raises
    ------
    ColearnError
        If numpy has no such array; `name` is its name in the error message.
    """
    tensor = tensor.detach()
    if tensor.is_floating_point() and tensor.dtype not in _FLOATS_OF_NUMPY:
        tensor = tensor.float()
    try:
        # A copy: on the CPU .numpy() shares memory with the model, which trains on.
        return tensor.cpu().numpy().copy()
    except (TypeError, RuntimeError) as error:
        raise ColearnError(
            f"array '{name}': expected a dense tensor of a type that numpy has, found "
            f"{tensor.dtype}, {tensor.layout}, on {tensor.device} ({error})"
        ) from error


def set_arrays(model: nn.Module, arrays: Mapping[str, NDArray]) -> None:
    """Load arrays, which may be read-only, into a model's state dict, in the model's own types.

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
    layers have the roles of these names. The vectors of spectral normalization are ``unit``, and
    the extremes of quantization's observers ``min`` and ``max``. Frozen parameters and other
    buffers are ``buffer``.

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
        prefix = f"{layer}." if layer else ""
        for buffer, role in _roles_of_buffers(module).items():
            if prefix + buffer in found:
                found[prefix + buffer] = role
    return found


def _roles_of_buffers(module: nn.Module) -> dict[str, Role]:
    """Return the roles of a module's own buffers where its type says what they are."""
    if isinstance(module, _NORMS_WITH_STATISTICS):
        return {"running_mean": Role.MEAN, "running_var": Role.VARIANCE}
    if isinstance(module, nn.utils.parametrizations._SpectralNorm):
        return {"_u": Role.UNIT, "_v": Role.UNIT}
    # Not imported here, since the import takes long; a model with observers has imported it.
    observing = sys.modules.get("torch.ao.quantization.observer")
    if observing and isinstance(module, observing.ObserverBase):
        return {"min_val": Role.MINIMUM, "max_val": Role.MAXIMUM}
    # The older torch.nn.utils.spectral_norm is a hook of the layer.
    hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
    return {f"{hook.name}{end}": Role.UNIT for hook in hooks for end in ("_u", "_v")}


def _role_by_type(tensor: Tensor, is_trained: bool) -> Role:
    if not tensor.is_floating_point():
        return Role.COUNTER
    return Role.TRAINABLE if is_trained else Role.BUFFER
