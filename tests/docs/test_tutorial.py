"""The notebook of the tutorial runs as it is, and its cells print what its text says."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tutorial.ipynb"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder in which the notebook was run, and what each of its cells printed."""
    folder = tmp_path_factory.mktemp("tutorial")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
        client.execute()
    return folder, "\n".join(map(printed, notebook.cells))


def printed(cell):
    outputs = cell.get("outputs", ())
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def test_it_is_committed_without_outputs():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_its_code_is_in_cells_that_are_run():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert not [cell for cell in cells if cell.cell_type == "markdown" and "```" in cell.source]


def test_every_participant_trains_forty_epochs_in_growing_rounds(run):
    epochs = [int(t) for t in re.findall(r"round +\d+: T=(\d+)", run[1])]
    assert sum(epochs) == 40
    assert epochs[0] == 2
    assert max(epochs) == 8


def test_the_shared_model_is_better_than_the_one_of_a_participant_alone(run):
    alone, shared = map(float, re.search(r"alone ([\d.]+) %, shared ([\d.]+) %", run[1]).groups())
    assert shared > 97
    assert shared > alone


def test_bytes_of_federated_averaging_are_shown_for_both_t(run):
    assert re.search(r"averaging, T=1: 40 rounds, [\d.]+ MB", run[1])
    rounds, own = re.search(r"^(\d+) rounds, ([\d.]+) MB", run[1], re.M).groups()
    assert re.search(rf"averaging, T=[\d.]+: {rounds} rounds, {own} MB", run[1])


def test_the_participant_that_failed_is_restarted_and_named(run):
    second = re.search(r"^2 5 participants, restarted: (.*)", run[1], re.M)
    assert "'participant': 'partition-3'" in second[1]


def test_it_writes_the_history_and_the_report(run):
    folder = run[0]
    assert (folder / "history.jsonl").stat().st_size > 1000
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
