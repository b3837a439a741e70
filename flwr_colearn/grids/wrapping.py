"""WrappingGrid: the base class of layers, a Flower Grid around another Grid."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from .._flwr import nodes_of


class WrappingGrid(Grid):
    """A Grid around any Grid, to which every method delegates.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def set_run(self, run: Any) -> None:
        """Set the run of the inner grid."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the inner grid."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message by the inner grid."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the connected nodes."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return Flower's descriptions of the connected nodes."""
        return nodes_of(self.grid)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages by the inner grid."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies by the inner grid."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies by the inner grid."""
        return self.grid.send_and_receive(messages, timeout=timeout)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Remove references to messages in the inner layers; their replies are not expected."""
        # Flower's own grids, at the end of the layers, have no such method.
        if isinstance(self.grid, WrappingGrid):
            self.grid.forget(message_ids)


def is_closed(grid: Grid) -> bool:
    """Return whether nobody can join, and failures repeat themselves; see `InProcessGrid`."""
    while isinstance(grid, WrappingGrid):
        grid = grid.grid
    return bool(getattr(grid, "closed", False))
