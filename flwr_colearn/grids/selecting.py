"""SelectingGrid: a grid on which only the named participants exist."""

from collections.abc import Iterable, Sequence
from typing import Any

from flwr.serverapp import Grid

from .._flwr import node_names
from .wrapping import WrappingGrid


class SelectingGrid(WrappingGrid):
    """A grid whose connected nodes are those with the registered names of the participants.

    A name is registered by ``flwr supernode register KEY LINK --name NAME``; it needs flwr 1.38 or
    newer, and SuperNodes that authenticate themselves. What a SuperNode says of itself is no name.

    Parameters
    ----------
    grid : Grid
        The inner grid.
    participants : sequence of str
        The registered names.
    """

    def __init__(self, grid: Grid, participants: Sequence[str]) -> None:
        super().__init__(grid)
        self.participants = tuple(participants)

    def get_node_ids(self) -> Iterable[int]:
        """Return the ids of the participants' nodes that are connected."""
        names = node_names(self.grid)
        return [node for node in self.grid.get_node_ids() if names.get(node) in self.participants]

    def get_nodes(self) -> Iterable[Any]:
        """Return Flower's descriptions of the participants' nodes that are connected."""
        nodes = super().get_nodes()
        return [node for node in nodes if getattr(node, "name", "") in self.participants]
