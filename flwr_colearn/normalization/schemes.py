"""The schemes for normalization layers where participants' data differ.

Batch norm trains with the statistics of local batches and evaluates with running statistics. Where
labels are skewed over the participants, the two are far apart. A scheme defines how the arrays of
such layers are averaged, which of them stay with the participants, and what the train config
contains. It is one argument, ``CoLearn(..., normalization=LocalStatistics())``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Signature, signature
from typing import Any, ClassVar

from ..errors import ColearnError, expected, whole_number
from ..roles import Arrays, Role, pair_statistics, split_name

PARTIAL = "incomplete: local arrays are those of the initial model; test at the participants"
"""The warning for an evaluation of the shared model where statistics or layers are local."""


@dataclass(frozen=True)
class Normalization:
    """The base class of schemes, with the behaviour of `Pooled`.

    Attributes
    ----------
    name : str
        The scheme's name in configs, histories and tables.
    all_reduces : bool
        Whether layers exchange sums during the computation, for which participants must run in
        threads of one process, at the same step.
    needs_statistics : bool or None
        Whether the model must have (True), or must not have (False), layers with running
        statistics; None for either.
    """

    name: ClassVar[str] = ""
    all_reduces: ClassVar[bool] = False
    needs_statistics: ClassVar[bool | None] = None

    def local(self, arrays: Arrays, roles: Mapping[str, Role]) -> list[str]:
        """Return the names of the arrays that never leave a participant, in the model's order."""
        return []

    def not_returned(
        self, server_round: int, arrays: Arrays, roles: Mapping[str, Role]
    ) -> list[str]:
        """Return the names of arrays that are sent to participants and not returned by them."""
        return []

    def roles(self, arrays: Arrays, roles: Mapping[str, Role]) -> dict[str, Role]:
        """Return the role of every array in the average under this scheme.

        Local arrays are not averaged, so they are left out of eq. 4 too.
        """
        # Integers keep their role, since a buffer is of a float type.
        local = {n for n in self.local(arrays, roles) if arrays[n].dtype.kind == "f"}
        return {name: Role.BUFFER if name in local else role for name, role in roles.items()}

    def config(self, server_round: int) -> dict[str, str | bool]:
        """Return the scheme's entries of the participants' train config."""
        return {"normalization": self.name}

    def due(self, server_round: int) -> bool:
        """Return whether the statistics are recomputed after this round."""
        return False

    def check(self, arrays: Arrays, roles: Mapping[str, Role]) -> None:
        """Raise a ColearnError unless the scheme can work with the model."""
        found = len(pair_statistics(arrays, roles))
        if self.needs_statistics and not found:
            raise ColearnError(
                f"normalization {self.name}: expected a model with running means and variances, "
                "found none; are the arrays named, or their roles given?"
            )
        if self.needs_statistics is False and found:
            raise ColearnError(
                f"normalization {self.name}: expected a model without running statistics, found "
                f"{found} layers that have them; convert the model on the server and at every "
                "participant (flwr_colearn.torch.convert, flwr_colearn.keras.convert)"
            )

    @property
    def travels_whole(self) -> bool:
        """Whether the complete model is exchanged, so that participants do not need the scheme."""
        return False

    @property
    def is_local(self) -> bool:
        """Whether the shared model is incomplete, since arrays exist at the participants only."""
        return type(self).local is not Normalization.local


@dataclass(frozen=True)
class Average(Normalization):
    """The plain mean of means and of variances, as in federated averaging; for a baseline."""

    name: ClassVar[str] = "average"

    @property
    def travels_whole(self) -> bool:
        """True."""
        return True

    def roles(self, arrays: Arrays, roles: Mapping[str, Role]) -> dict[str, Role]:
        """Return the roles with statistics as plain buffers, which are averaged one by one."""
        plain = {Role.MEAN: Role.BUFFER, Role.VARIANCE: Role.BUFFER}
        return {name: plain.get(role, role) for name, role in roles.items()}


@dataclass(frozen=True)
class Pooled(Normalization):
    """Pool the statistics, which gives those of all participants' data together (the default).

    mu  = sum n_k mu_k / n
    var = sum n_k var_k / n + sum n_k (mu_k - mu)^2 / n
    """

    name: ClassVar[str] = "pooled"

    @property
    def travels_whole(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True)
class Recalibrated(Normalization):
    """Recompute the statistics under the averaged weights, then pool them.

    Every participant evaluates the averaged model on its data (the idea of SWA's ``update_bn``,
    arXiv 1803.05407) and returns means and variances only. The cost is a second exchange (the model
    down, the statistics up) and a pass over the data. The ClientApp answers it with a function
    that is decorated with ``recalibrate(app)`` of ``flwr_colearn.torch`` or ``flwr_colearn.keras``.

    Parameters
    ----------
    every : int, default 1
        The number of rounds from one recalibration to the next; in the others the statistics are
        pooled. With `SynchronousSGD`, whose rounds are steps, choose the interval of evaluations.
    """

    every: int = 1
    name: ClassVar[str] = "recalibrated"
    needs_statistics: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        whole_number("every of Recalibrated", self.every, least=1)

    def due(self, server_round: int) -> bool:
        """Return whether the statistics are recomputed after this round."""
        return server_round % self.every == 0


@dataclass(frozen=True)
class LocalStatistics(Normalization):
    """Running statistics stay with the participants; gamma and beta are averaged.

    This is SiloBN (Andreux et al., arXiv 2008.07424).
    """

    name: ClassVar[str] = "local-statistics"
    needs_statistics: ClassVar[bool | None] = True

    def local(self, arrays: Arrays, roles: Mapping[str, Role]) -> list[str]:
        """Return means, variances and counters of normalization layers."""
        return statistics_of(arrays, roles)


@dataclass(frozen=True)
class LocalBN(Normalization):
    """All arrays of normalization layers stay with the participants: FedBN (arXiv 2102.07623)."""

    name: ClassVar[str] = "local-bn"
    needs_statistics: ClassVar[bool | None] = True

    def local(self, arrays: Arrays, roles: Mapping[str, Role]) -> list[str]:
        """Return every array of the normalization layers."""
        return layer_arrays(arrays, roles)


@dataclass(frozen=True)
class Synchronised(Normalization):
    """Every batch norm uses the batch of all participants together, forward and backward.

    The layers exchange sums, counts and gradients at every step, so this is for `SynchronousSGD`
    with participants in threads of one process (`ThreadedGrid`).
    """

    name: ClassVar[str] = "synchronised"
    all_reduces: ClassVar[bool] = True
    needs_statistics: ClassVar[bool | None] = True


@dataclass(frozen=True)
class Frozen(Normalization):
    """Two phases: as `Pooled`, then with the shared statistics frozen (FixBN, arXiv 2303.06530).

    In the second phase layers normalise with the frozen statistics in training too, and gamma and
    beta are still trained. Participants, which keep no state, receive the statistics and do not
    return them.

    Parameters
    ----------
    after : int
        The last round of the first phase, at least 1.

    Raises
    ------
    ColearnError
        If `after` is not a whole number of at least 1.
    """

    after: int
    name: ClassVar[str] = "frozen"
    needs_statistics: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        whole_number("after of Frozen", self.after, least=1)

    def not_returned(
        self, server_round: int, arrays: Arrays, roles: Mapping[str, Role]
    ) -> list[str]:
        """Return the statistics once they are frozen."""
        return statistics_of(arrays, roles) if server_round > self.after else []

    def config(self, server_round: int) -> dict[str, str | bool]:
        """Return the scheme's name and whether the statistics are frozen in this round."""
        return {"normalization": self.name, "normalization-frozen": server_round > self.after}


@dataclass(frozen=True)
class GroupNorm(Normalization):
    """Group norm (Wu & He, arXiv 1803.08494) instead of batch norm, without running statistics.

    The model is converted on both sides; the layers keep gamma and beta.

    Parameters
    ----------
    groups : int, default 8
        The largest number of groups G; a layer with C channels has the greatest divisor of C that
        is at most G.
    """

    groups: int = 8
    name: ClassVar[str] = "group-norm"
    needs_statistics: ClassVar[bool | None] = False

    def __post_init__(self) -> None:
        whole_number("groups of GroupNorm", self.groups, least=1)

    def groups_of(self, channels: int) -> int:
        """Return the number of groups of a layer with the given number of channels."""
        return next(g for g in range(min(self.groups, channels), 0, -1) if channels % g == 0)


@dataclass(frozen=True)
class LayerNorm(Normalization):
    """Layer norm (arXiv 1607.06450) over all channels and positions, gamma and beta by channel."""

    name: ClassVar[str] = "layer-norm"
    needs_statistics: ClassVar[bool | None] = False


@dataclass(frozen=True)
class BatchRenorm(Normalization):
    """Batch renormalization (Ioffe, arXiv 1702.03275) with pooled running statistics.

    In training the batch's statistics are corrected towards the running ones,
    y = (x - mu_B) / sigma_B * r + d, with r = clip(sigma_B / sigma, 1/r_max, r_max) and
    d = clip((mu_B - mu) / sigma, -d_max, d_max). Both are constants for the gradient.

    Parameters
    ----------
    r_max, d_max : float, default 3 and 5
        The final limits of r and d.
    warmup : int, default 100
        The number of steps with r = 1 and d = 0, which is batch norm; during as many further steps
        the limits rise linearly to the final ones.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 100
    name: ClassVar[str] = "batch-renorm"
    needs_statistics: ClassVar[bool | None] = True

    def __post_init__(self) -> None:
        # `not >=` and not `<`, so that NaN is refused too.
        if not self.r_max >= 1.0:
            raise expected("r_max of BatchRenorm", "a number of at least 1", self.r_max)
        if not self.d_max >= 0.0:
            raise expected("d_max of BatchRenorm", "a number of at least 0", self.d_max)
        whole_number("warmup of BatchRenorm", self.warmup, least=0)

    def limits(self, step: int) -> tuple[float, float]:
        """Return r_max and d_max after `step` batches."""
        opened = 1.0 if self.warmup == 0 else min(max(step / self.warmup - 1.0, 0.0), 1.0)
        return 1.0 + opened * (self.r_max - 1.0), opened * self.d_max


SCHEMES: dict[str, type[Normalization]] = {
    scheme.name: scheme
    for scheme in (
        Average,
        Pooled,
        Recalibrated,
        LocalStatistics,
        LocalBN,
        Synchronised,
        Frozen,
        GroupNorm,
        LayerNorm,
        BatchRenorm,
    )
}
"""All schemes by name."""


def scheme_named(name: str, **parameters: Any) -> Normalization:
    """Return the scheme of this name, as in run configs, histories and tables.

    Parameters
    ----------
    name : str
        A key of `SCHEMES`.
    **parameters
        The parameters of the scheme.

    Raises
    ------
    ColearnError
        If no scheme has this name, or the scheme has other parameters.

    Examples
    --------
    >>> scheme_named("group-norm", groups=4)
    GroupNorm(groups=4)
    """
    if name not in SCHEMES:
        raise expected("normalization", f"one of {', '.join(SCHEMES)}", name)
    # Bound before the call, so that a TypeError within the scheme is not taken for this one.
    wanted = signature(SCHEMES[name]).replace(return_annotation=Signature.empty)
    try:
        wanted.bind(**parameters)
    except TypeError:  # an unknown parameter, or one too few
        raise expected(f"normalization {name}", f"parameters {wanted}", parameters) from None
    return SCHEMES[name](**parameters)


def layer_arrays(arrays: Arrays, roles: Mapping[str, Role]) -> list[str]:
    """Return the names of all arrays of layers with running statistics, in the model's order.

    A layer is found by its (mean, variance) pair; its gamma, beta and counter are the arrays with
    the same name up to the last part. This rule is exact for torch's, Keras's and TF-slim's names,
    and does not depend on the names of layers. Layers without running statistics (group norm,
    layer norm) are not included.

    Examples
    --------
    >>> import numpy as np
    >>> from flwr_colearn.roles import assign_roles
    >>> names = ["0.weight", "1.weight", "1.running_mean", "1.running_var"]
    >>> model = {name: np.zeros(1) for name in names}
    >>> layer_arrays(model, assign_roles(model))
    ['1.weight', '1.running_mean', '1.running_var']
    """
    layers = {split_name(mean)[0] for mean, _ in pair_statistics(arrays, roles)}
    return [name for name in arrays if split_name(name)[0] in layers]


def statistics_of(arrays: Arrays, roles: Mapping[str, Role]) -> list[str]:
    """Return the names of means, variances and counters of the layers of `layer_arrays`."""
    kinds = (Role.MEAN, Role.VARIANCE, Role.COUNTER)
    return [name for name in layer_arrays(arrays, roles) if roles[name] in kinds]


def as_normalization(value: object) -> Normalization:
    """Return `value` if it is a scheme.

    Raises
    ------
    ColearnError
        If `value` is anything else, such as a class instead of an object.
    """
    if isinstance(value, Normalization) and value.name:
        return value
    raise expected("normalization", "a scheme such as Pooled() or LocalStatistics()", value)
