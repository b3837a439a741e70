import ast
import importlib
from pathlib import Path

import pytest
from flwr.serverapp import Grid

from flwr_colearn import InProcessGrid, RecoveringGrid
from flwr_colearn._flwr import node_names

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    "flwr.app",
    "flwr.client",
    "flwr.clientapp",
    "flwr.clientapp.mod",
    "flwr.common",
    "flwr.server",
    "flwr.server.strategy",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}
SOURCES = sorted(
    path
    for folder in ("flwr_colearn", "clients", "simulations")
    for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "flwr_colearn" / "_flwr.py"
)


def taken_from_flower(source):
    """Yield (module, name) for every import from flwr; the name is None for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((each.name, None) for each in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, each.name) for each in node.names)


def is_public(module, name):
    return module in PUBLIC and name in importlib.import_module(module).__all__


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_one_module_takes_what_flower_does_not_offer(path):
    taken = {
        (module, name)
        for module, name in taken_from_flower(path.read_text())
        if module.partition(".")[0] == "flwr"
    }
    assert {each for each in taken if not is_public(*each)} == set()


@pytest.mark.parametrize(
    ("line", "public"),
    [
        ("from flwr.app import Message", True),
        ("from flwr.app.message import Message", False),
        ("from flwr.common import Run", False),
        ("import flwr.server.server", False),
        ("def late():\n    from flwr.supercore import run", False),
    ],
)
def test_what_counts_as_public(line, public):
    [taken] = taken_from_flower(line)
    assert is_public(*taken) == public


def test_nodes_of_a_grid_that_knows_of_ids_only_have_no_names():
    class OldGrid(InProcessGrid):
        """As in flwr 1.29, where a Grid has no get_nodes."""

        get_nodes = property()

    old = OldGrid(client_app=None, num_supernodes=2)
    assert isinstance(old, Grid)
    assert not hasattr(old, "get_nodes")
    assert node_names(old) == {}
    assert node_names(RecoveringGrid(old)) == {}
