"""PyTorch's half of the normalization schemes; layers are found by module type, never by name."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clients.torch.layers import (
    ActingBatchRenorm,
    ActingGroupNorm,
    BatchNorm,
    BatchRenormLayer,
    holds_activation,
)
from flwr_colearn import BatchRenorm, ColearnError, GroupNorm, LayerNorm, Normalization
from flwr_colearn.grids import AllReduceGroup, group_of


def convert(model: nn.Module, scheme: Normalization) -> nn.Module:
    """Return a copy of a model with its batch-norm layers as the scheme has them.

    `GroupNorm` and `LayerNorm` take their place with gamma and beta; `BatchRenorm` keeps the
    statistics as well. Other schemes change no layer. Layer norm is over channels and positions
    together, with gamma and beta by channel: group norm with one group. Where dropout and an
    activation are part of the layer (timm's ``BatchNormAct2d``), they go on following the norm.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    scheme : Normalization
        The one that the server's strategy has.

    Returns
    -------
    nn.Module
        Names of arrays that remain are the same.

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
    """Let a model's batch-norm layers train as the server's scheme says, within the block.

    One line around the training loop, for the schemes under which layers compute otherwise than
    they usually do: in the second phase of `Frozen` they normalise with the shared statistics,
    whatever ``model.train()`` says; `Synchronised` ones use the batch of all participants. What
    follows the norm in a layer (timm's dropout) trains as ever.

    Parameters
    ----------
    model : nn.Module
        Its batch-norm layers are changed in place, and changed back.
    config : mapping
        The train config.

    Raises
    ------
    ColearnError
        If the scheme cannot be had here; the message says why.

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
                        "renorm, which would train as plain batch norm; convert the model anew"
                    )
                acts = holds_activation(layer)
                forward = partial(_synchronised_forward, layer, acts, group, rank)
                layer.forward = forward  # type: ignore[method-assign]
        if config.get("normalization-frozen"):
            for layer in layers:
                layer.training = False
                layer.train = partial(_stay, layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            for name in ("forward", "train"):
                layer.__dict__.pop(name, None)


@torch.no_grad()
def recalibrated(
    model: nn.Module, batches: Iterable[Tensor]
) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
    """Return the statistics of all data under the model's weights, as ``update_bn`` has them.

    One forward pass in training mode, in which every layer normalises with its batch; the mean
    and the (population) variance of what reaches a layer are taken over all batches together,
    so they do not depend on how the data are cut where no other batch norm lies before the layer.

    Parameters
    ----------
    model : nn.Module
        Left as it is, running statistics included.
    batches : iterable of Tensor
        Inputs, on the model's device.

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
    model.eval()  # dropout is no part of the statistics
    for layer in layers.values():
        layer.training = True  # not train(): dropout may be a part of the layer
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
    """Count, mean and sum of squared deviations by channel, merged batch by batch in float64."""

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
        return {name: value.to(dtype).cpu().numpy() for name, value in values.items()}


class _Synchronise(torch.autograd.Function):
    """Normalise with the mean and variance of all participants' batches together."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, layer: BatchNorm, group: AllReduceGroup, rank: int
    ) -> Tensor:
        axes = [axis for axis in range(inputs.dim()) if axis != 1]
        shape = [1, -1] + [1] * (inputs.dim() - 2)
        count = inputs.numel() // inputs.shape[1]
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
        # A copy in float64 too: an activation may work in place, and `normal` is saved.
        return normal.to(inputs.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        normal, variance = ctx.saved_tensors
        eps, group, rank, total, share = ctx.job
        axes = [axis for axis in range(gradient.dim()) if axis != 1]
        shape = [1, -1] + [1] * (gradient.dim() - 2)
        wide = gradient.double()
        # Everyone differentiates the mean loss of its own batch; the joint loss is the mean with
        # the shares as weights, with which the server will average the gradients.
        own = torch.stack([wide.sum(axes), (wide * normal).sum(axes)]) * share
        sums = torch.from_numpy(group.sum(rank, own.numpy())) / (total * share)
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
    """Take the place of ``train`` in a frozen layer; dropout that is a part of it is not frozen."""
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
    # Not strict: a layer that tracked no statistics has none to keep.
    new.load_state_dict({n: a for n, a in state.items() if n in new.state_dict()}, strict=False)
    new.train(layer.training)
    if acts:
        new.drop, new.act = layer.drop, layer.act
    return new
