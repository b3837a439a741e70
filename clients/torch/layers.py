"""Batch renormalization and norms that an activation follows, and telling such layers apart."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flwr_colearn import BatchRenorm, ColearnError

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The class of all of torch's batch norms, whatever their dimensions."""


class BatchRenormLayer(BatchNorm):
    """Batch renormalization (Ioffe, 2017) with batch norm's arrays; any number of dimensions.

    Parameters
    ----------
    num_features : int
        Channels, on axis 1.
    scheme : BatchRenorm
        Limits of r and d, and their warm-up in batches seen.
    **kwargs
        Of ``nn.BatchNorm1d``.
    """

    def __init__(self, num_features: int, scheme: BatchRenorm | None = None, **kwargs: Any) -> None:
        super().__init__(num_features, **kwargs)
        self.scheme = scheme or BatchRenorm()

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise [N, C, ...] over all axes but 1."""
        if not self.training:
            return super().forward(inputs)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        r_max, d_max = self.scheme.limits(int(self.num_batches_tracked))
        self.num_batches_tracked.add_(1)
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        # Under autocast inputs have half the digits, in which no variance can be taken.
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mean = wide.mean(axes)
        variance = wide.var(axes, unbiased=False)
        sigma = (variance + self.eps).sqrt()
        with torch.no_grad():
            running_sigma = (self.running_var + self.eps).sqrt()
            r = (sigma / running_sigma).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / running_sigma).clamp(-d_max, d_max)
            rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            count = inputs.numel() / inputs.shape[1]
            unbiased = variance * (count / max(count - 1, 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        normal = (wide - mean.view(shape)) / sigma.view(shape)
        normal = normal * r.view(shape) + d.view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(inputs.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, found {input.dim()}")


class Acting(nn.Module):
    """Mixin that lets `drop` and `act` follow a norm, as in timm's ``BatchNormAct2d``.

    They are children beside the norm's arrays, which thus keep their names (``bn.weight``).
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then apply `drop` and `act`."""
        return self.act(self.drop(super().forward(inputs)))  # type: ignore[no-any-return]


class ActingGroupNorm(Acting, nn.GroupNorm):
    """Group norm in the place of a batch norm that `drop` and `act` follow."""


class ActingBatchRenorm(Acting, BatchRenormLayer):
    """Batch renormalization in the place of a batch norm that `drop` and `act` follow."""


def timm_layers() -> Any:
    """Return the module ``timm.layers`` if it is in use; participants work without timm."""
    return sys.modules.get("timm.layers")


def holds_activation(layer: BatchNorm) -> bool:
    """Return whether `drop` and `act` follow a layer's batch norm.

    Raises
    ------
    ColearnError
        If the layer does anything else besides, which would be lost.
    """
    timm = timm_layers()
    plain = [BatchNorm, nn.SyncBatchNorm, BatchRenormLayer]
    acting = [Acting, timm.BatchNormAct2d] if timm else [Acting]
    forward = type(layer).forward
    if forward not in [kind.forward for kind in plain + acting]:
        raise ColearnError(
            "normalization: expected batch-norm layers of torch's own or timm's BatchNormAct2d, "
            f"found {type(layer).__module__}.{type(layer).__name__}, whose forward does something "
            "else besides; use a scheme that leaves layers as they are, or another model"
        )
    return forward in [kind.forward for kind in acting]
