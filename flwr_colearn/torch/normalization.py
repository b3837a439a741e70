"""The normalization schemes in PyTorch; layers are found by module type, never by name."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ColearnError
from ..grids import AllReduceGroup, group_of
from ..normalization import BatchRenorm, GroupNorm, LayerNorm, Normalization
from .arrays import to_array
from .layers import (
    ActingBatchRenorm,
    ActingGroupNorm,
    BatchNorm,
    BatchRenormLayer,
    holds_activation,
)


def convert(model: nn.Module, scheme: Normalization) -> nn.Module:
    """Return a copy of a model whose batch-norm layers are converted to the scheme's layers.

    `GroupNorm` and `LayerNorm` replace them and keep gamma and beta; `BatchRenorm` keeps the
    statistics as well. Other schemes change no layer. Layer norm is over channels and positions
    together, with gamma and beta by channel: group norm with one group. Dropout and an activation
    that are part of the layer (timm's ``BatchNormAct2d``) follow the new norm too.

    Parameters
    ----------
    model : nn.Module
        The model, which is not changed.
    scheme : Normalization
        The scheme of the server's strategy.

    Returns
    -------
    nn.Module
        The converted copy, in which the remaining arrays keep their names.

    Raises
    ------
    ColearnError
        If a layer that would be converted computes anything else besides batch norm.
    """
    model = copy.deepcopy(model)
    if not isinstance(scheme, GroupNorm | LayerNorm | BatchRenorm):
        return model
    return _replace(model, lambda layer: _converted(layer, scheme))


@contextmanager
def normalised(model: nn.Module, config: Mapping[str, Any]) -> Iterator[None]:
    """Apply the server's normalization scheme to a model's batch-norm layers, within the block.

    This context manager goes around the training loop. It matters for the schemes that change how
    layers compute: in the second phase of `Frozen` they normalise with the shared statistics, also
    after ``model.train()``; under `Synchronised` they use the batches of all participants. Modules
    that follow the norm in a layer (timm's dropout) train as usual.

    Parameters
    ----------
    model : nn.Module
        The model, whose batch-norm layers are changed in place and restored at the end.
    config : mapping
        The train config.

    Raises
    ------
    ColearnError
        If the scheme is not possible with this model or device; the message has the reason.

    Examples
    --------
    ::

        with normalised(model, message.content["config"]):
            train(model, data)
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
    try:
        if config.get("normalization") == "synchronised":
            group, rank = group_of(config)
            for layer in layers:
                if isinstance(layer, BatchRenormLayer):
                    raise ColearnError(
                        "synchronised normalization: expected batch norm, found a layer with batch "
                        "renorm, which would train as plain batch norm; convert the original model"
                    )
                acts = holds_activation(layer)
                forward = partial(_synchronised_forward, layer, acts, group, rank)
                layer.forward = forward  # type: ignore[method-assign]
        if config.get("normalization-frozen"):
            # Training loops call model.train() inside the block, so `train` is replaced as well.
            for layer in layers:
                layer.training = False
                layer.train = partial(_stay, layer)  # type: ignore[method-assign]
        yield
    finally:
        # The replacements are attributes of the instances; without them the class's methods apply.
        for layer in layers:
            for name in ("forward", "train"):
                layer.__dict__.pop(name, None)


@torch.no_grad()
def recalibrated(
    model: nn.Module, batches: Iterable[Tensor]
) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return the statistics of all data under the model's weights, as ``update_bn`` computes them.

    The function makes one forward pass in training mode, in which every layer normalises with its
    batch. The mean and the (population) variance of a layer's inputs are taken over all batches
    together, so those of the first batch norm do not depend on the batch size.

    Parameters
    ----------
    model : nn.Module
        The model, which is not changed, running statistics included.
    batches : iterable of Tensor
        The inputs, on the model's device.

    Returns
    -------
    dict
        ``running_mean`` and ``running_var`` of every layer that has them, by name.
    """
    saved = copy.deepcopy(model.state_dict())
    modes = {module: module.training for module in model.modules()}
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, BatchNorm) and layer.track_running_stats
    }
    moments = {name: _Moments() for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, seen=moments[name]: seen.add(args[0]))
        for name, layer in layers.items()
    ]
    # eval() first, because dropout would change the statistics. Then the attribute, not train(),
    # which would also switch on dropout inside a layer (timm).
    model.eval()
    for layer in layers.values():
        layer.training = True
    try:
        for inputs in batches:
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
        model.load_state_dict(saved)
    return {
        f"{name}.{kind}" if name else kind: array
        for name, layer in layers.items()
        for kind, array in moments[name].arrays(layer).items()
    }


class _Moments:
    """Count, mean and sum of squared deviations by channel, merged batch by batch in float64.

    The merge is that of Chan, Golub and LeVeque (1979); a sum of squares minus the squared mean
    would cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0

    def add(self, inputs: Tensor) -> None:
        values = inputs.transpose(0, 1).reshape(inputs.shape[1], -1).double()
        count, mean = values.shape[1], values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + squares + shift**2 * self.count * count / total
        self.mean = self.mean + shift * count / total
        self.count = total

    def arrays(self, layer: BatchNorm) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        assert layer.running_mean is not None
        if not isinstance(self.mean, Tensor) or not isinstance(self.squares, Tensor):
            raise ColearnError("recalibration: expected at least one batch of data, found none")
        values = {"running_mean": self.mean, "running_var": self.squares / self.count}
        dtype = layer.running_mean.dtype
        return {name: to_array(value.to(dtype), name) for name, value in values.items()}


class _Synchronise(torch.autograd.Function):
    """Normalise with the mean and variance of all participants' batches together."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, layer: BatchNorm, group: AllReduceGroup, rank: int
    ) -> Tensor:
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        count = inputs.numel() // inputs.shape[1]
        # Two exchanges: the mean first, then the squared deviations from it. One exchange of sums
        # and sums of squares would lose digits.
        own = np.append(inputs.double().sum(axes).numpy(), [count, inputs.shape[0]])
        *sums, total, examples = group.sum(rank, own)
        mean = torch.tensor(np.array(sums) / total)
        centered = inputs.double() - mean.view(shape)
        variance = torch.from_numpy(group.sum(rank, centered.square().sum(axes).numpy()) / total)
        if layer.track_running_stats:
            _track(layer, mean, variance * (total / max(total - 1, 1)))
        normal = centered / (variance.view(shape) + layer.eps).sqrt()
        ctx.save_for_backward(normal, variance)
        ctx.job = layer.eps, group, rank, total, inputs.shape[0] / examples
        # A copy even of float64 inputs: an activation may work in place, but `normal` is saved for
        # the backward pass.
        return normal.to(inputs.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normal, variance = ctx.saved_tensors
        eps, group, rank, total, share = ctx.job
        axes = [axis for axis in range(gradient.dim()) if axis != 1]
        shape = [1, -1] + [1] * (gradient.dim() - 2)
        wide = gradient.double()
        # Every participant differentiates the mean loss of its own batch. The joint loss is their
        # mean weighted by the shares of examples, by which the server averages the gradients.
        own = torch.stack([wide.sum(axes), (wide * normal).sum(axes)]) * share
        sums = torch.from_numpy(group.sum(rank, own.numpy())) / (total * share)
        # Batch norm's gradient by its inputs, with the means of all participants' batches.
        through = sums[0].view(shape) + normal * sums[1].view(shape)
        result = (wide - through) / (variance.view(shape) + eps).sqrt()
        return result.to(gradient.dtype), None, None, None


def _synchronised_forward(
    layer: BatchNorm, acts: bool, group: AllReduceGroup, rank: int, inputs: Tensor
) -> Tensor:
    if not layer.training:
        return type(layer).forward(layer, inputs)
    if inputs.device.type != "cpu":
        raise ColearnError(
            "synchronised normalization: expected the CPU, since torch runs the backward passes of "
            f"all threads of a GPU in one, where they would wait for each other, found "
            f"{inputs.device}"
        )
    normal = _Synchronise.apply(inputs, layer, group, rank)
    if layer.affine:
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        normal = normal * layer.weight.view(shape) + layer.bias.view(shape)
    return layer.act(layer.drop(normal)) if acts else normal  # type: ignore[no-any-return,operator]


def _track(layer: BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    rate = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), rate)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), rate)


def _stay(layer: BatchNorm, mode: bool = True) -> BatchNorm:
    """Replace ``train`` of a frozen layer; only its child modules (dropout) change their mode."""
    for child in layer.children():
        child.train(mode)
    return layer


def _replace(module: nn.Module, convert_layer: Callable[[BatchNorm], nn.Module]) -> nn.Module:
    if isinstance(module, BatchNorm):
        return convert_layer(module)
    for name, child in module.named_children():
        setattr(module, name, _replace(child, convert_layer))
    return module


def _converted(layer: BatchNorm, scheme: GroupNorm | LayerNorm | BatchRenorm) -> nn.Module:
    acts = holds_activation(layer)
    channels, state = layer.num_features, layer.state_dict()
    # The new layer is made on the device and in the type of the old one's arrays.
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), None)
    where: dict[str, Any] = {} if like is None else {"device": like.device, "dtype": like.dtype}
    new: nn.Module
    if isinstance(scheme, BatchRenorm):
        options = {"eps": layer.eps, "momentum": layer.momentum, "affine": layer.affine}
        renorm = ActingBatchRenorm if acts else BatchRenormLayer
        new = renorm(channels, scheme, **options, **where)
    else:
        groups = scheme.groups_of(channels) if isinstance(scheme, GroupNorm) else 1
        norm = ActingGroupNorm if acts else nn.GroupNorm
        new = norm(groups, channels, layer.eps, layer.affine, **where)
    # Not strict: a layer without running statistics has none to copy.
    new.load_state_dict({n: a for n, a in state.items() if n in new.state_dict()}, strict=False)
    new.train(layer.training)
    if acts:
        new.drop, new.act = layer.drop, layer.act
    return new
