"""What a strategy of this package refuses in another loop than that of `flwr_colearn.run`."""

from ..errors import expected
from ..transport import Transport

_ELSEWHERE = "outside flwr_colearn.run (in a `start` of a subclass, or of a wrapper)"


def refuse_in_foreign_loop(
    transport: Transport,
    connected: Transport | None,
    total_epochs: int | None,
    checkpoints: object,
    private: bool,
) -> None:
    """Raise a ColearnError for what only `flwr_colearn.run`, or a connected grid, can do.

    Parameters
    ----------
    transport : Transport
        The strategy's own features.
    connected : Transport or None
        Those of the grid, if it is connected.
    total_epochs : int or None
        The budget of local epochs.
    checkpoints : object
        The folder for checkpoints, or None.
    private : bool
        Whether the loop is that of a differential privacy wrapper.
    """
    where = "under a wrapper such as differential privacy" if private else _ELSEWHERE
    loop = "the wrapper's start runs Flower's loop" if private else "that loop is its own"
    start = "wrapper.start" if private else "start"
    for name, value in (("total_epochs", total_epochs), ("checkpoints", checkpoints)):
        if value is not None:
            raise expected(
                f"{name} {where}",
                f"None, since {loop}, which has neither a budget nor checkpoints; use num_rounds, "
                "or flwr_colearn.run(strategy, grid, ...)",
                value,
            )
    connect = "grid = strategy.transport.connect(grid), the first line of that `start`"
    if connected is not None and connected == transport:
        return
    if transport.participants is not None:
        given = f"{start}(Transport(participants=...).connect(grid), ...)" if private else connect
        raise expected(
            f"participants {where}",
            f"those of the grid, {given}",
            list(transport.participants),
        )
    if not (transport.normalization.travels_whole and transport.compression.is_plain):
        given = f"{start}(Transport(...).connect(grid), ...)" if private else connect
        raise expected(
            f"compression and normalization {where}",
            f"those of the grid, {given}, since {loop} on it",
            f"{transport.compression}, {transport.normalization}",
        )
