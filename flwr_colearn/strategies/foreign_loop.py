"""What a strategy of this package refuses in Flower's own loop, which a wrapper's start runs."""

from ..errors import expected
from ..transport import Transport


def refuse_in_foreign_loop(
    transport: Transport, total_epochs: int | None, checkpoints: object
) -> None:
    """Raise a ColearnError for what only `flwr_colearn.run`, or a connected grid, can do.

    Parameters
    ----------
    transport : Transport
        The strategy's own features, as opposed to those of the grid.
    total_epochs : int or None
        The budget of local epochs.
    checkpoints : object
        The folder for checkpoints, or None.
    """
    for name, value in (("total_epochs", total_epochs), ("checkpoints", checkpoints)):
        if value is not None:
            raise expected(
                f"{name} under a wrapper such as differential privacy",
                "None, since the wrapper's start runs Flower's loop, which has neither a "
                "budget nor checkpoints; use num_rounds, or flwr_colearn.run",
                value,
            )
    if transport.participants is not None:
        raise expected(
            "participants under a wrapper such as differential privacy",
            "those of the grid, wrapper.start(Transport(participants=...).connect(grid), ...)",
            list(transport.participants),
        )
    if not (transport.normalization.travels_whole and transport.compression.is_plain):
        raise expected(
            "compression and normalization under a wrapper such as differential privacy",
            "those of the grid, wrapper.start(Transport(...).connect(grid), ...), since the "
            "wrapper's start runs Flower's loop on it",
            f"{transport.compression}, {transport.normalization}",
        )
