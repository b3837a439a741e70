"""`LocalPlan.resumable` in a user's own loop, the example of the documentation."""

import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from flwr_colearn import CoLearn, ColearnError, FixedEpochs, InProcessGrid, LocalPlan, Recovery

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 4


def example():
    """The functions of the example in docs/features.md."""
    text = (ROOT / "docs" / "features.md").read_text()
    [code] = [
        each for each in re.findall(r"```python\n(.*?)```", text, re.S) if "resumable" in each
    ]
    names = {}
    exec(code, names)
    return names


class Loop:
    """The example's ClientApp, whose training is interrupted at the given (round, epoch)s."""

    def __init__(self, *interruptions):
        self.interruptions, self.trained = list(interruptions), []
        names = example()
        original = names["train_one_epoch"]

        def train_one_epoch(weights, momentum, rate, seed):
            original(weights, momentum, rate, seed)
            self.trained.append(seed)
            if self.interruptions and self.interruptions[0] == seed:
                self.interruptions.pop(0)
                raise OSError("the machine is gone")

        names["train_one_epoch"] = train_one_epoch
        self.app = names["app"]


def run(loop, folder, k=1):
    configs = [
        {"state-dir": str(folder), "partition-id": i} if folder else {"partition-id": i}
        for i in range(k)
    ]
    rules = {"learning_rate": 0.1, "local_epochs": FixedEpochs(EPOCHS)}
    strategy = CoLearn(k, **rules, recovery=Recovery(pause=0.0))
    model = ArrayRecord({"w": Array(np.linspace(-1, 1, 5, dtype=np.float32))})
    grid = InProcessGrid(loop.app, k, node_configs=configs)
    return strategy.start(grid, model, num_rounds=3).arrays["w"].numpy()


def test_the_example_goes_on_where_it_was_interrupted(tmp_path):
    plain = Loop()
    expected = run(plain, None)
    assert plain.trained == list(range(1, 13))
    loop = Loop(3, 7)
    found = run(loop, tmp_path)
    # An epoch that is interrupted is trained again, and none before it.
    assert loop.trained == [1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    assert found.tobytes() == expected.tobytes()


def test_participants_may_have_one_folder(tmp_path):
    expected = run(Loop(), None, k=3)
    loop = Loop(3, 3, 6)
    assert run(loop, tmp_path, k=3).tobytes() == expected.tobytes()
    assert len(list(tmp_path.glob("*.epoch"))) == 3
    assert len(loop.trained) == 3 * 12 + 3


def test_objects_are_refused_with_the_name_of_the_array(tmp_path):
    plan = LocalPlan(1, 2, 0.1)
    with pytest.raises(ColearnError, match="'w' of the state to save: expected an array of number"):
        list(plan.resumable(tmp_path, lambda: {"w": np.array([None])}, lambda state: None))


def steps(folder, interrupted_at=None, session="a", name="site"):
    """The epochs that a loop with one number as its state trains, and the number at the end."""
    config = {**LocalPlan(1, EPOCHS, 0.1).to_config(), "session": session}
    state, trained = {"n": np.array(0)}, []
    for epoch in LocalPlan.from_config(config).resumable(folder, lambda: state, state.update, name):
        trained.append(epoch.index)
        state["n"] = state["n"] * 10 + epoch.index
        if epoch.index == interrupted_at:
            break
    return trained, int(state["n"])


def test_names_and_sessions_have_files_of_their_own(tmp_path):
    for who in ({}, {"session": "b"}, {"name": "other"}):
        assert steps(tmp_path, 3, **who) == ([1, 2, 3], 123)
    for who in ({}, {"session": "b"}, {"name": "other"}):
        assert steps(tmp_path, **who) == ([3, 4], 1234)


def test_the_last_three_sessions_are_kept(tmp_path):
    for number in range(6):
        steps(tmp_path, 3, session=str(number))
    assert len(list(tmp_path.iterdir())) == 3


def test_half_written_files_of_a_killed_process_are_removed(tmp_path):
    steps(tmp_path, 3)
    [file] = tmp_path.iterdir()
    (tmp_path / f".{file.name}.x1.tmp").write_bytes(b"half")
    (tmp_path / ".another.x1.tmp").write_bytes(b"half")
    assert steps(tmp_path) == ([3, 4], 1234)
    assert {each.name for each in tmp_path.iterdir()} == {file.name, ".another.x1.tmp"}


@pytest.mark.parametrize("folder", [None, ""])
def test_without_a_folder_it_is_the_plan(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert steps(folder) == ([1, 2, 3, 4], 1234)
    assert not list(tmp_path.iterdir())
