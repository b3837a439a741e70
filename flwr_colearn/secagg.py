"""CoLearn under secure aggregation: the server receives the average and no participant's model."""

from collections.abc import Mapping
from dataclasses import replace
from logging import INFO
from typing import Any

import numpy as np
from flwr.common import (
    FitIns,
    FitRes,
    Parameters,
    Scalar,
    log,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.server import ClientManager

from . import legacy
from ._flwr import ClientProxy
from .errors import expected, real_number
from .roles import UNTRAINED, NDArray


class CoLearn(legacy.CoLearn):
    """`flwr_colearn.legacy.CoLearn` for Flower's SecAgg+, which computes the average itself.

    The workflow gives the strategy only the average of all models, and co-learning needs no more:
    the next T is computed from it (eq. 4). On the server::

        context = LegacyContext(
            context=context,
            config=ServerConfig(num_rounds=20),
            strategy=flwr_colearn.secagg.CoLearn(5, local_epochs=..., learning_rate=...),
        )
        workflow = DefaultWorkflow(
            fit_workflow=SecAggPlusWorkflow(
                num_shares=5, reconstruction_threshold=3, max_weight=1.0
            )
        )
        workflow(grid, context)

    The participant's app is ``ClientApp(client_fn, mods=[secaggplus_mod])``; its ``fit`` returns 1
    as the number of examples, since SecAgg+ uses that as the weight.

    Limits: the server cannot check a participant's model, so a model with NaN makes the average
    NaN. Values beyond the workflow's `clipping_range` are clipped, and the others are rounded to
    its quantization. A participant that fails is left out of the round. The history counts the
    bytes of unmasked models. Metrics are not hidden from the server.

    Parameters
    ----------
    num_participants : int
        K, the number of participants.
    clipping_range : float, default 8.0
        That of the workflow. An average beyond it is refused, since participants cut their values
        to the range before they are summed.
    **kwargs
        As for `flwr_colearn.legacy.CoLearn`: `local_epochs`, `learning_rate`, `total_epochs`,
        `local_steps`, `history` and the others. `roles` must be without means, variances and
        counters: statistics must stay with the participants.

    Raises
    ------
    ColearnError
        If an argument cannot work under SecAgg+; in the first round, if the model holds integers,
        float16 or arrays without dimensions; in any round, if a participant states another number
        of examples than 1, or if the average is not finite or beyond the clipping range.
    """

    def __init__(
        self, num_participants: int | None = None, *, clipping_range: float = 8.0, **kwargs: Any
    ) -> None:
        if kwargs.setdefault("recovery", None) is not None:
            raise expected(
                "recovery under SecAgg+",
                "None, since a participant cannot be asked again once the masks are made",
                kwargs["recovery"],
            )
        if kwargs.setdefault("weighting", "uniform") != "uniform":
            raise expected(
                "weighting under SecAgg+",
                "'uniform', since the weights would have to fit the workflow's max_weight",
                kwargs["weighting"],
            )
        if kwargs.setdefault("guard", None) is not None:
            raise expected(
                "guard under SecAgg+",
                "None, since the server receives no participant's update",
                kwargs["guard"],
            )
        log(INFO, "Guard: off under SecAgg+, where the server receives no participant's update")
        if kwargs.get("names") is not None:
            raise expected(
                "names under SecAgg+",
                "None, since every array counts as a weight; statistics stay local",
                kwargs["names"],
            )
        roles = kwargs.get("roles") or ()
        for role in roles.values() if isinstance(roles, Mapping) else roles:
            if role in UNTRAINED:
                raise expected(
                    "roles under SecAgg+",
                    "'trainable' or 'buffer' only: statistics are pooled from each participant's "
                    "own, which the server does not see; keep them local",
                    str(role),
                )
        super().__init__(num_participants, **kwargs)
        self.clipping_range = real_number("clipping_range", clipping_range, least=0.0)
        self._plain: list[NDArray] = []

    def configure_fit(
        self, server_round: int, parameters: Parameters, client_manager: ClientManager
    ) -> list[tuple[ClientProxy, FitIns]]:
        """Decide T (eq. 4) from the average, and ask K participants to train.

        Raises
        ------
        ColearnError
            If SecAgg+ cannot average an array of the model correctly.
        """
        self._plain = parameters_to_ndarrays(parameters)
        for index, array in enumerate(self._plain):
            if array.dtype.kind != "f" or array.dtype.itemsize < 4:
                raise expected(
                    f"array '{index}' under SecAgg+",
                    "float32 or float64, since counters would be cut to its clipping_range and "
                    "float16 overflows in its quantization; convert, or keep local",
                    str(array.dtype),
                )
            if not array.ndim:
                raise expected(
                    f"array '{index}' under SecAgg+",
                    "at least one dimension, since Flower does not unmask arrays without; make it "
                    "one of shape (1,)",
                    array.shape,
                )
        return super().configure_fit(server_round, parameters, client_manager)

    def aggregate_fit(
        self,
        server_round: int,
        results: list[tuple[ClientProxy, FitRes]],
        failures: list[legacy.FitFailure],
    ) -> tuple[Parameters | None, dict[str, Scalar]]:
        """Use the average, which every result contains, in the types of the arrays sent.

        Raises
        ------
        ColearnError
            If a participant's number of examples is not 1, or there are no results.
        """
        for client, result in results:
            if result.num_examples != 1:
                raise expected(
                    f"number of examples of participant {client.cid} under SecAgg+",
                    "1, since SecAgg+ weighs by it; return 1 in fit, and give SecAggPlusWorkflow "
                    "max_weight=1.0",
                    result.num_examples,
                )
        # Every result gets its own Parameters with the average in it: their mean in the base class
        # is the average again, and the base class refuses one object for all results.
        if results:
            average = self._as_sent(results[0][1].parameters)
            results = [
                (client, replace(result, parameters=Parameters(average, "numpy.ndarray")))
                for client, result in results
            ]
        return super().aggregate_fit(server_round, results, failures)

    def _as_sent(self, parameters: Parameters) -> list[bytes]:
        """Return the tensors of the average, which SecAgg+ makes float64, in the types sent."""
        average = parameters_to_ndarrays(parameters)
        for index, array in enumerate(average):
            self._check_range(index, array)
        # Not strict: the base class refuses too few or too many arrays, and states the reason.
        cast = [np.asarray(a, sent.dtype) for a, sent in zip(average, self._plain)]  # noqa: B905
        return ndarrays_to_parameters(cast + average[len(cast) :]).tensors

    def _check_range(self, index: int, array: NDArray) -> None:
        """Raise a ColearnError for an average that no honest participants can have."""
        largest = float(np.abs(array).max(initial=0.0))
        # A mean of values within the range is within it, up to the rounding of the quotient. Not
        # `largest > limit`, which is false for NaN.
        if not largest <= self.clipping_range * (1 + 1e-6):
            raise expected(
                f"array '{index}' of the average under SecAgg+",
                f"values within the clipping range of {self.clipping_range}, to which participants "
                "cut theirs (give CoLearn the clipping_range of SecAggPlusWorkflow); a participant "
                "that sends other masked values than the protocol's can cause this, and SecAgg+ "
                "hides which",
                largest,
            )
