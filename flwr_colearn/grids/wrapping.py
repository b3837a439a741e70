"""WrappingGrid: a Flower Grid around another, for those that change or watch what goes through."""

from collections.abc import Iterable
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from .._flwr import nodes_of


class WrappingGrid(Grid):
    """A Grid around any Grid, which it leaves all that it does not do itself.

    Parameters
    ----------
    grid : Grid
        The one inside.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def set_run(self, run: Any) -> None:
        """Set the run of the grid inside."""
        self.grid.set_run(run)

    @property
    def run(self) -> Any:
        """The run of the grid inside."""
        return self.grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Create a message as the grid inside does."""
        return self.grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are connected."""
        return self.grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """Return what is known of the nodes that are connected."""
        return nodes_of(self.grid)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push messages as the grid inside does."""
        return self.grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies as the grid inside does."""
        return self.grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages and return the replies as the grid inside does."""
        return self.grid.send_and_receive(messages, timeout=timeout)

    def forget(self, message_ids: Iterable[str]) -> None:
        """Tell the grids inside that nobody waits for the replies to these messages any more."""
        if isinstance(self.grid, WrappingGrid):
            self.grid.forget(message_ids)
