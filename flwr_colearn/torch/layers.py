"""Batch renormalization, norms with an activation, and the detection of such layers."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ColearnError
from ..normalization import BatchRenorm

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of torch's batch norms of all dimensions."""


class BatchRenormLayer(BatchNorm):
    """Batch renormalization (Ioffe, 2017) with batch norm's arrays; any number of dimensions.

    Parameters
    ----------
    num_features : int
        The number of channels, on axis 1.
    scheme : BatchRenorm
        The limits of r and d, and the batches of their warm-up.
    **kwargs
        Further arguments of ``nn.BatchNorm1d``.
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
        # The batch counter drives the warm-up, so it travels with the statistics (role counter).
        r_max, d_max = self.scheme.limits(int(self.num_batches_tracked))
        self.num_batches_tracked.add_(1)
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        if inputs.numel() == inputs.shape[1]:
            # As batch norm does: one value has no variance.
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size "
                f"{inputs.shape}"
            )
        # Under autocast inputs have half precision, too little for a variance.
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mean = wide.mean(axes)
        variance = wide.var(axes, unbiased=False)
        sigma = (variance + self.eps).sqrt()
        # Ioffe (2017), algorithm 1: r and d are constants in the backward pass, and use the
        # running statistics from before this batch.
        with torch.no_grad():
            running_sigma = (self.running_var + self.eps).sqrt()
            r = (sigma / running_sigma).clamp(1 / r_max, r_max)
            d = ((mean - self.running_mean) / running_sigma).clamp(-d_max, d_max)
            # torch's rule: momentum None means a cumulative average.
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
    """Mixin for a norm that `drop` and `act` follow, as in timm's ``BatchNormAct2d``.

    Both are child modules, so that the norm's arrays keep their names (``bn.weight``).
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise, then apply `drop` and `act`."""
        return self.act(self.drop(super().forward(inputs)))  # type: ignore[no-any-return]


class ActingGroupNorm(Acting, nn.GroupNorm):
    """Group norm that replaces a batch norm with `drop` and `act`."""


class ActingBatchRenorm(Acting, BatchRenormLayer):
    """Batch renormalization that replaces a batch norm with `drop` and `act`."""


def timm_layers() -> Any:
    """Return the module ``timm.layers`` if it is imported, else None."""
    # Not imported here: participants work without timm, and a model with timm's layers has
    # imported it already.
    return sys.modules.get("timm.layers")


def holds_activation(layer: BatchNorm) -> bool:
    """Return whether `drop` and `act` follow a layer's batch norm.

    Raises
    ------
    ColearnError
        If the layer computes anything else, which its replacement would leave out.
    """
    # The function `forward` is compared, not the class: a subclass without a forward of its own
    # computes the same as its base.
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
