"""Who may import whom, read off the sources: the packages and layers of this repository."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = [  # a module imports those of earlier lines, and those of its own line
    {"errors", "text", "_flwr", "_version", "files", "folder_lock", "journal", "site_files"},
    {"roles", "traffic", "records", "schedules", "plan", "policy", "history", "checkpoint"}
    | {"strategy_state", "epoch_file", "epoch_rules", "adherence", "sharing", "progress"},
    {"aggregation", "grids"},
    {"recovery", "compression", "normalization", "secure", "state_dir"},
    {
        "transport",
        "participant",
        "numpy_client",
        "managed",
        "stock",
        "stock_metrics",
        "best",
        "loop",
    },
    {"strategies", "dynamic", "reporting"},
    {"legacy", "legacy_fits", "secagg"},
    {"__init__"},
    {"torch", "keras"},  # which only a client imports
]
FEATURES = {"recovery", "compression", "normalization", "secure"}
CLIENT_SIDE = {"client", "client_state", "local_arrays", "residuals", "participant", "state_dir"}
CLIENT_SIDE |= {"answering", "member"}
FRAMEWORKS = {"torch", "torchvision", "timm", "tensorflow", "keras", "tf_keras", "tf_slim"}
HOMES_OF_FRAMEWORKS = {
    "flwr_colearn": {"torch", "keras"},
    "clients": {"torch", "tensorflow", "keras", "slim"},
    "simulations": {"study", "bench"},  # which train PyTorch models of their own
}


def imports_of(path):
    """Yield the dotted names that a file imports, relative ones made absolute."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            for alias in node.names:
                whole = ROOT.joinpath(*module.split("."), alias.name)
                is_module = whole.with_suffix(".py").exists() or whole.is_dir()
                yield f"{module}.{alias.name}" if is_module else module


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def layer_of(part):
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def own_imports(path):
    """Yield (importing module, imported module) within flwr_colearn, as tuples without its name."""
    me = path.relative_to(ROOT / "flwr_colearn").with_suffix("").parts
    for name in imports_of(path):
        if name.partition(".")[0] == "flwr_colearn":
            yield me, tuple(name.split(".")[1:]) or ("__init__",)


OWN = [pair for path in sources("flwr_colearn") for pair in own_imports(path)]


def test_a_module_imports_its_own_layer_and_those_below():
    wrong = [(me, it) for me, it in OWN if layer_of(it[0]) > layer_of(me[0])]
    assert not wrong


def test_features_do_not_know_each_other_nor_strategies_each_other():
    for packages in (FEATURES, {"strategies", "dynamic"}, {"torch", "keras"}):
        wrong = [(me, it) for me, it in OWN if {me[0], it[0]} <= packages and me[0] != it[0]]
        assert not wrong


def test_no_server_file_imports_a_client_file():
    wrong = [
        (me, it)
        for me, it in OWN
        if it[-1] in CLIENT_SIDE and me[-1] not in CLIENT_SIDE | {"__init__", "numpy_client"}
    ]
    assert not wrong


def test_from_outside_a_package_only_its_init_is_imported():
    wrong = [(me, it) for me, it in OWN if len(it) > 1 and me[0] != it[0]]
    assert not wrong


def test_there_is_no_cycle():
    graph = {}
    for me, it in OWN:
        graph.setdefault(me, set()).add(
            it if len(it) > 1 or not is_package(it) else (*it, "__init__")
        )
    TopologicalSorter({me: its - {me} for me, its in graph.items()}).prepare()


def test_nothing_inside_imports_the_packages_of_the_frameworks():
    users = {me for me, it in OWN if it[0] in ("torch", "keras") and me[0] != it[0]}
    assert not users


def is_package(module):
    return (ROOT / "flwr_colearn").joinpath(*module).is_dir()


def test_only_the_loop_runs_rounds():
    users = {me[0] for me, it in OWN if it[0] == "loop"}
    assert users <= {"strategies", "dynamic", "__init__"}


@pytest.mark.parametrize("folder", HOMES_OF_FRAMEWORKS)
def test_frameworks_are_imported_where_they_are_at_home(folder):
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sources(folder)
        if not HOMES_OF_FRAMEWORKS[folder] & set(path.relative_to(ROOT).parts)
        for name in top_level_imports(path)
        if name in FRAMEWORKS
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("folder", "own"), [("torch", {"torch"}), ("keras", {"keras", "tensorflow"})]
)
def test_a_framework_s_package_imports_that_one_only(folder, own):
    found = {
        name.partition(".")[0]
        for path in sources(f"flwr_colearn/{folder}")
        for name in imports_of(path)
    }
    assert own == found & FRAMEWORKS
    assert not found & {"clients", "simulations", "tqdm", "sklearn"}


def test_within_the_plugin_frameworks_are_not_imported_later_either():
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sources("flwr_colearn")
        if path.relative_to(ROOT).parts[1] not in HOMES_OF_FRAMEWORKS["flwr_colearn"]
        for name in imports_of(path)
        if name.partition(".")[0] in FRAMEWORKS
    ]
    assert not wrong


def top_level_imports(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_apps_use_the_public_names():
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in sources("clients", "simulations")
        for name in imports_of(path)
        if name.startswith("flwr_colearn.") and name.count(".") > 1
    ]
    assert not wrong
