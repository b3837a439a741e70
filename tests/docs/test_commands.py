"""Every command of the README and of the pages exists and takes the arguments that it is given."""

import subprocess
import tomllib

import pytest

from flwr_colearn import ColearnError
from tests.docs.blocks import ROOT, documents_in, inline_commands, of_language
from tests.docs.commands import NODE_KEYS, RULES, assert_test_exists, check, commands_in

SCRIPTS = of_language("bash")


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_the_commands_of_a_block_are_read_by_their_programs(block):
    commands = commands_in(block.text)
    assert commands
    for words in commands:
        check(words)


@pytest.mark.parametrize("block", SCRIPTS, ids=str)
def test_a_block_is_bash(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for document in documents_in(block.text):
        tomllib.loads(document)


@pytest.mark.parametrize(("page", "command"), inline_commands())
def test_the_commands_in_the_text_are_read_by_their_programs(page, command):
    for words in commands_in(command):
        named_only = words[0] == "flwr" and all(word.isalpha() for word in words)
        check([*words, "--help"] if named_only else words)


@pytest.mark.parametrize("key", sorted(NODE_KEYS))
def test_a_key_of_the_node_config_is_read_by_the_code(key):
    sources = [*(ROOT / "flwr_colearn").rglob("*.py"), *(ROOT / "clients").rglob("*.py")]
    field = f"    {key.replace('-', '_')}: "  # of ParticipantSettings
    assert any(
        f'"{key}"' in source.read_text() or field in source.read_text() for source in sources
    )


def test_the_test_that_runs_a_command_for_real_exists():
    tests = {test for _, test in RULES.values() if test}
    assert len(tests) > 10
    for test in tests:
        assert_test_exists(test)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("python -m simulations.study digits --sedes 3", "refused"),
        ("python -m simulations.study digitz", "no run config"),
        ("python -m simulations.study converged toxik", "refused"),
        ("python -m simulations.bench pears", "refused"),
        ("make demonstration", "demonstration"),
        ("flwr run . --streams", "streams"),
        ("flwr run . --run-config 'epsilonn=1'", "epsilonn"),
        ("flwr run . --run-config 'num-participants=\"five\"'", "num-participants"),
        ("flower-superlink --hostname 1", "2"),
        ("flower-supernode --node-config 'nme=\"utrecht\"'", "nme"),
        ("flwr-colearn reports history.jsonl", "no rule"),
        ("pip install '.[torhc]'", "torhc"),
        ("simulations/deploy/certificate.sh folder", "no rule"),
        ("simulations/deploy/certificates.sh", "needs arguments"),
        ("install -m 644 simulations/deploy/flower.service /etc", "no file"),
        ("cp state.db backup.db", "no rule"),
    ],
)
def test_what_a_reader_could_not_type_is_found(command, said):
    [words] = commands_in(command)
    with pytest.raises((AssertionError, SystemExit, ColearnError), match=said):
        check(words)


def test_a_script_is_taken_apart_as_bash_does():
    script = """a 'x
  y' && b \\
    --c  # why
d <<END > file
e
END
f | g &
"""
    assert commands_in(script) == [["a", "x\n  y"], ["b", "--c"], ["d"], ["f"], ["g"]]
