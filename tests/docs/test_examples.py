"""Every fenced block of the README and the pages is run, read or applied; drawings are listed."""

import json
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array

from clients.settings import ParticipantSettings
from flwr_colearn import ModelAveraging
from flwr_colearn.dynamic import Periodic
from simulations.settings import RunSettings
from tests.docs import preludes
from tests.docs.blocks import BLOCKS, PAGES, ROOT, of_language
from tests.docs.commands import assert_test_exists

LANGUAGES = {"python", "bash", "diff", "toml", "json", "text", ""}
ELSEWHERE = {  # pages whose examples have tests of their own, which count them too
    "docs/own-strategy.md": "tests/dropin/test_own_strategy.py::test_the_page_has_the_shapes",
    "docs/own-data.md": "tests/clients/test_own_task.py",
}
ONLY_COMPILED = {("docs/app.md", "NVFlare"): "NVFlare is in no extra of this package"}
DRAWINGS = {
    ("docs/rounds.md", "What a round does"),
    ("docs/rounds.md", "Layers around the grid"),
    ("docs/security.md", "Ports and connections"),
}


OUTPUTS = {  # what a program prints, and the test that sees it print
    ("docs/operations.md", "How far a run is"): "tests/flwr_colearn/grids/test_progress.py",
    ("docs/own-data.md", "Is the shared model better than my own?"): "tests/clients/test_alone.py",
}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("mlflow", None)


def test_every_block_has_a_language_that_has_a_rule():
    assert len(BLOCKS) > 100
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_fence_is_left_open_or_unread(path):
    page = path.relative_to(ROOT).as_posix()
    fences = re.findall(r"^\s*(?:>\s*)*(?:```|~~~)", path.read_text(), re.M)
    assert len(fences) == 2 * len([block for block in BLOCKS if block.page == page])


def test_text_is_a_drawing_or_an_output_that_a_test_sees():
    shown = {(block.page, block.heading) for block in (*of_language("text"), *of_language(""))}
    assert shown - DRAWINGS <= OUTPUTS.keys()
    for section in shown - DRAWINGS:
        assert_test_exists(OUTPUTS[section])


@pytest.mark.parametrize("block", of_language("toml"), ids=str)
def test_toml_is_a_run_config(block):
    config = tomllib.loads(block.text)
    known = RunSettings().to_config() | ParticipantSettings().to_config()
    assert config.keys() <= known.keys()
    RunSettings.from_config(config)
    ParticipantSettings.from_config(config)


def test_json_is_json():
    for block in of_language("json"):
        json.loads(block.text)


def test_every_diff_is_one_that_the_drop_in_tests_apply():
    from tests.dropin import test_dropin

    applied = [diff for heading in test_dropin.APPS for diff in test_dropin.diffs_of(heading)]
    for section in test_dropin.SCHEMES.values():
        applied += test_dropin.diffs_in(section)
    left = [str(block) for block in of_language("diff") if block.text not in applied]
    assert left == []


def run(block):
    """Run an example; return its names."""
    text = block.text
    for long, short in preludes.SHORTER.items():
        text = text.replace(long, short)
    names = {"__name__": "example", **preludes.common()}
    section = (block.page, block.heading)
    prelude = preludes.SECTIONS.get(section) or preludes.PRELUDES.get(block.page, dict)
    names |= prelude()
    exec(compile(text, ROOT / block.page, "exec"), names)
    return names


EXAMPLES = [
    block
    for block in of_language("python")
    if block.page not in ELSEWHERE and (block.page, block.heading) not in ONLY_COMPILED
]


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_an_example_runs(block):
    names = run(block)
    for words, holds in CHECKS.items():
        if words in block.text:
            assert holds(names), words


def trains_two_epochs(names):
    return len(names["rates"]) == 2 and names["rates"][0] > names["rates"][1]


def keeps_the_sent_numbers(names):
    from flwr_colearn.keras import get_arrays

    reached = get_arrays(names["model"])
    sent = names["msg"].content["arrays"]
    return all(np.array_equal(reached[name], array.numpy()) for name, array in sent.items())


def serves_dynamic_averaging(names):
    strategy = ModelAveraging(Periodic(2), 1)
    start = preludes.ArrayRecord(names["model"].state_dict())
    result = strategy.start(preludes.InProcessGrid(names["app"], 1), start, num_rounds=2)
    return not np.array_equal(result.arrays["weight"].numpy(), start["weight"].numpy())


def averages_three(names):
    return np.allclose(names["result"].arrays["fc.weight"].numpy(), 4.0)  # 2 rounds of 1, 2, 3


def tracks_a_record(names):
    record = names["strategy"].history.records[0]
    names["MLflow"]().write(record)
    return names["logged"][0][0] == 1 and names["logged"][0][1]


CHECKS = {  # by words of the example
    "for group in optimizer.param_groups": trains_two_epochs,
    "set_arrays(model": keeps_the_sent_numbers,
    "@learner(app)": serves_dynamic_averaging,
    "Transport(secure=SecureAggregation())\nresult": averages_three,
    "class MLflow": tracks_a_record,
    "itertools.islice": lambda names: names["steps"] == [10, 10],
    "result = run(": lambda names: names["result"].arrays is not None,
    "result = strategy.start(": lambda names: names["result"].arrays is not None,
    "class Scaffold": lambda names: kept(names["Scaffold"]),
    "save_report(": lambda names: Path("report.html").exists(),
}


def kept(strategy_class):
    strategy = strategy_class()
    strategy.rounds, strategy.control = 3, Array(np.ones(2))
    other = strategy_class()
    other.restore_strategy_state(*strategy.strategy_state())
    return other.rounds == 3 and other.control is strategy.control


@pytest.mark.parametrize("block", of_language("python"), ids=str)
def test_an_example_is_python(block):
    compile(block.text, block.page, "exec")


@pytest.mark.parametrize("page", ELSEWHERE)
def test_pages_with_tests_of_their_own_have_them(page):
    assert_test_exists(ELSEWHERE[page])
    assert page.rpartition("/")[2] in (ROOT / ELSEWHERE[page].partition("::")[0]).read_text()
