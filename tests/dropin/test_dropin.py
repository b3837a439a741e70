"""The diffs of docs/drop-in.md, applied to small apps: each runs with FedAvg and with CoLearn."""

import ast
import re
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from flwr_colearn import ColearnError, InProcessGrid
from tests.dropin.digits import part

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "drop-in.md"
K = 5
RUN_CONFIG = {
    "local-epochs": 2,
    "max-epochs": 2,
    "learning-rate": 0.01,
    "fraction-evaluate": 1.0,
}


class App(NamedTuple):
    """A small app, and what it needs to learn quickly."""

    module: str
    library: str
    accuracy: float
    changes: dict[str, str] = {}  # noqa: RUF012  (never changed)
    rounds: int = 6


CONFIGURED = 'CyclicalRate(context.run_config["learning-rate"])'
FASTER = {"CyclicalRate(0.01)": "CyclicalRate(0.05)", CONFIGURED: "CyclicalRate(0.05)"}
APPS = {  # by heading of the document
    "PyTorch": App("pytorch_app", "torch", 0.9, FASTER),
    "TensorFlow": App("tensorflow_app", "tensorflow", 0.75, {"(0.001)": "(0.01)"}, rounds=3),
    "PyTorch Lightning": App(
        "lightning_app", "lightning", 0.8, {"(0.001)": "(0.01)", "lr=1e-3": "lr=1e-2"}, rounds=3
    ),
    "Hugging Face transformers": App(
        "huggingface_app", "transformers", 0.9, {"5e-5": "3e-3", "Epochs(2,": "Epochs(3,"}
    ),
    "scikit-learn": App("sklearn_app", "sklearn", 0.85),
    "scikit-learn without a learning rate": App("logreg_app", "sklearn", 0.8),
    "Legacy NumPyClient": App("legacy_app", "torch", 0.8, FASTER),
}
each_app = pytest.mark.parametrize("heading", APPS)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Lightning writes where it runs."""
    monkeypatch.chdir(tmp_path)


def sections_of(text, level="##"):
    """Return the sections of a document by heading."""
    return dict(re.findall(rf"^{level} (.*?)\n(.*?)(?=^{level} |\Z)", text, re.M | re.S))


def diffs_in(text):
    return re.findall(r"```diff\n(.*?)```", text, re.S)


def diffs_of(heading):
    """Return the diffs of a section, the server's first."""
    section = sections_of(DOCUMENT.read_text())[heading]
    above = diffs_of("scikit-learn")[:1] if "as above, `client" in section else []
    return above + diffs_in(section)


def hunks_of(diff):
    """Yield (before, after) for each hunk."""
    for hunk in diff.split("...\n"):
        lines = hunk.splitlines(keepends=True)
        yield tuple("".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))


def patched(source, diffs):
    for diff in diffs:
        for before, after in hunks_of(diff):
            assert source.count(before) == 1, before
            source = source.replace(before, after)
    return source


def added(diff):
    """Return the statements that a diff adds, those in loops included."""
    statements = []
    for hunk in diff.split("...\n"):
        lines = [line[1:] for line in hunk.splitlines() if line.startswith("+")]
        tree = ast.parse(dedent("\n".join(lines)))
        statements += [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    return statements


def run(heading, colearn, changes=(), rounds=None, more=()):
    """Run an app over K participants in this process; return what its server reports.

    `more` are diffs that are applied after those of the heading.
    """
    app = APPS[heading]
    pytest.importorskip(app.library)
    path = HERE / f"{app.module}.py"
    source = path.read_text()
    if colearn:
        source = patched(source, [*diffs_of(heading), *more])
    for old, new in [*app.changes.items(), *changes]:
        source = source.replace(old, new)
    module = {"__name__": app.module}
    exec(compile(source, path, "exec"), module)
    config = {**RUN_CONFIG, "num-server-rounds": rounds or app.rounds}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    module["server"](InProcessGrid(module["app"], K, run_config=config), context)
    return module["OUTCOME"]


@each_app
def test_a_diff_is_one_import_one_constructor_and_three_statements_of_the_client(heading):
    server, *client = diffs_of(heading)
    assert [type(statement) for statement in added(server)] == [ast.ImportFrom, ast.Assign]
    statements = [statement for diff in client for statement in added(diff)]
    imports = [each for each in statements if isinstance(each, ast.ImportFrom)]
    assert len(imports) == 1
    assert len(statements) - len(imports) <= 3


@each_app
@pytest.mark.parametrize("colearn", [False, True], ids=["FedAvg", "CoLearn"])
def test_an_app_learns_before_and_after(heading, colearn):
    outcome = run(heading, colearn)
    accuracy = {number: metrics["accuracy"] for number, metrics in outcome["metrics"].items()}
    print(f"\n{heading}, {type(outcome['strategy']).__module__}: {accuracy}")
    assert accuracy[APPS[heading].rounds] > APPS[heading].accuracy
    if colearn:
        history = outcome["strategy"].history
        print(f"T_i {history.epochs_path}, relative change {[r.relative_change for r in history]}")
        assert [len(record.participants) for record in history] == [K] * len(accuracy)
        assert not any(record.refusals for record in history)


@each_app
def test_participants_train_as_many_epochs_at_the_rate_that_the_plan_says(heading):
    def change(epochs, rate):
        rules = ((2, 16), (2, 8), (3, 8), (5, 20))
        changes = [(f"PlateauEpochs({t}, maximum={most})", str(epochs)) for t, most in rules]
        for known in ("0.05", "0.01", "3e-3"):
            changes.append((f"CyclicalRate({known})", str(rate)))
        [record] = run(heading, True, changes, rounds=1)["strategy"].history
        assert (record.local_epochs, record.learning_rate) == (epochs, rate)
        return record.relative_change

    four_epochs = change(4, 1e-3)
    assert four_epochs > 1.5 * change(1, 1e-3)
    if "without" not in heading:
        assert four_epochs > 100 * change(4, 1e-6)


def test_the_rate_of_the_first_diff_is_that_of_the_app_s_own_config():
    """RUN_CONFIG has 0.01, at T=5 from 0.01 * 0.25**0.2."""
    [record] = run("PyTorch", True, [("CyclicalRate(0.05)", CONFIGURED)], rounds=1)[
        "strategy"
    ].history
    assert record.learning_rates[0] == pytest.approx(0.01 * 0.25**0.2)


def test_the_diffs_of_the_readme_are_those_of_the_page():
    readme = diffs_in((DOCUMENT.parents[1] / "README.md").read_text())
    assert readme == diffs_of("PyTorch")


def test_the_epochs_grow_when_the_shared_model_settles():
    sooner = "maximum=20, patience=1, tolerance=0.5"
    outcome = run("PyTorch", True, [("maximum=20", sooner)])
    assert outcome["strategy"].history.epochs_path[-1] > 5


# Normalization schemes

SCHEMES = sections_of(sections_of(DOCUMENT.read_text())["PyTorch with batch norm"], "###")


def run_with(scheme, without_client=False, **options):
    """Run the app under a scheme; return what its server reports, and the arrays."""
    server, client = diffs_in(SCHEMES[scheme])
    outcome = run("PyTorch", True, more=[server] if without_client else [server, client], **options)
    return outcome, {name: array.numpy() for name, array in outcome["arrays"].items()}


def test_the_clients_diffs_of_the_page_on_normalization_are_those_that_are_run_here():
    page = sections_of((DOCUMENT.parent / "normalization.md").read_text())["At the participants"]
    assert diffs_in(page) == [diffs_in(section)[1] for section in SCHEMES.values()]
    assert list(SCHEMES) == ["Recalibrated", "Frozen", "GroupNorm"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_app_learns_under_a_normalization_scheme(scheme):
    outcome, _ = run_with(scheme)
    history = outcome["strategy"].history
    assert outcome["metrics"][6]["accuracy"] > 0.85
    assert not any(record.refusals for record in history)


def test_recalibrated_statistics_are_those_of_all_participants_data():
    _, arrays = run_with("Recalibrated", rounds=2)
    inputs = [part(k, K, "float64")[0] for k in range(K)]
    reached = [x @ arrays["0.weight"].astype("float64").T + arrays["0.bias"] for x in inputs]
    # Uniform weights.
    mean = np.mean([values.mean(0) for values in reached], 0)
    variance = np.mean([(values**2).mean(0) for values in reached], 0) - mean**2
    np.testing.assert_allclose(arrays["1.running_mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["1.running_var"], variance, rtol=1e-4)


def test_recalibrated_without_the_clients_function_ends_with_what_is_missing():
    changes = [("normalization=", "recovery=Recovery(max_restarts=0),\n        normalization=")]
    changes.append(("import CoLearn,", "import CoLearn, Recovery,"))
    with pytest.raises(ColearnError, match=r"flwr_colearn.torch.recalibrate\(app\)"):
        run_with("Recalibrated", without_client=True, changes=changes, rounds=1)


def test_frozen_statistics_stay_and_are_used_in_training():
    _, before = run_with("Frozen", rounds=4)
    _, after = run_with("Frozen", rounds=6)
    _, unused = run_with("Frozen", rounds=6, without_client=True)
    for name in ("1.running_mean", "1.running_var"):
        assert np.array_equal(before[name], after[name])
    assert not np.array_equal(before["0.weight"], after["0.weight"])
    assert not np.allclose(after["0.weight"], unused["0.weight"], rtol=1e-3)


def test_group_norm_keeps_the_names_of_what_remains():
    _, arrays = run_with("GroupNorm", rounds=1)
    assert list(arrays) == [f"{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")]
