"""Everything that this plugin takes from Flower outside its public modules, in one place."""

from collections.abc import Iterable
from typing import Any

from flwr.server.client_proxy import ClientProxy as ClientProxy
from flwr.server.server import fit_clients as fit_clients
from flwr.serverapp import Grid
from flwr.serverapp.strategy.strategy_utils import config_to_str as config_to_str


def nodes_of(grid: Grid) -> Iterable[Any]:
    """Return what Flower knows of the connected nodes: in 1.29 nothing but their ids."""
    get_nodes = getattr(grid, "get_nodes", None)
    return get_nodes() if get_nodes is not None else ()


def node_names(grid: Grid) -> dict[int, str]:
    """Return the names with which connected nodes are registered, where they have one."""
    named = {info.node_id: getattr(info, "name", "") for info in nodes_of(grid)}
    return {node_id: name for node_id, name in named.items() if name}


def assume_identity() -> None:
    """Let ``Message(...)`` be called outside a Flower run, as flwr demands since 1.38."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # flwr < 1.38 asks for none
        return
    for name in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, 1)


def empty_run(run_id: int) -> Any:
    """Return Flower's description of a run about which only the id is known."""
    try:
        from flwr.supercore.run import Run
    except ImportError:  # flwr < 1.38
        from flwr.common.typing import Run  # type: ignore[attr-defined,no-redef]
    return Run.create_empty(run_id)


__all__ = [
    "ClientProxy",
    "assume_identity",
    "config_to_str",
    "empty_run",
    "fit_clients",
    "node_names",
    "nodes_of",
]
