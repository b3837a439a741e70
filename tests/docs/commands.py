"""Commands of the pages: each is read by its own program's parser, and a test runs it for real.

`RULES` has for each command, by its first words, the check of its arguments and the test of this
repository that runs the command itself. A command without a rule is an error.
"""

import argparse
import os
import re
import shlex
import subprocess
import tomllib
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import click
import typer
from flwr.common.config import parse_config_args
from packaging.requirements import Requirement

from clients.settings import ParticipantSettings
from simulations.settings import RunSettings
from simulations.study.__main__ import STUDIES
from tests.docs.blocks import COMMENT, HEREDOC, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NODE_TABLE = (ROOT / "docs" / "run-config.md").read_text().partition("## The node config")[2]
NODE_KEYS = set(re.findall(r"^\| `([\w-]+)` \|", NODE_TABLE, re.M))


def commands_in(script):
    """Return the commands of a bash script, each as a list of words, without redirections."""
    text = COMMENT.sub("", HEREDOC.sub(r"<<END\2", script)).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    commands, words = [], []
    tokens = iter(lexer)
    for token in tokens:
        if set(token) <= {"<", ">"}:
            next(tokens)  # the file
        elif set(token) <= set(";&|\n<>"):
            commands.append(words)
            words = []
        else:
            words.append(token)
    return [command for command in (*commands, words) if command]


def check(words):
    """Check a command by the rule of its first words; return the test that runs it for real."""
    words = without_shell(words)
    if not words:
        return None
    program = words[0] if words[0].startswith("simulations/") else Path(words[0]).name
    words = [program, *words[1:]]
    for length in (4, 3, 2, 1):
        if rule := RULES.get(" ".join(words[:length])):
            checked, test = rule
            checked(words, length)
            return test
    raise AssertionError(f"no rule for the command {shlex.join(words)}; see tests/docs/commands.py")


def without_shell(words):
    """Leave out the words of a loop, and assignments before a command."""
    if words[0] in ("for", "done"):
        return []
    while words and (words[0] == "do" or re.match(r"\w+=", words[0])):
        words = words[1:]
    return words


# Programs of Python ------------------------------------------------------------------------------


class _Parsed(Exception):  # noqa: N818  (no error: the end of what is tried)
    """The arguments were read."""


def by_argparse(module):
    """Return a check by the parser of a module's ``main``, which goes no further."""

    def checked(words, length):
        read = argparse.ArgumentParser.parse_args

        def parse_args(parser, args=None, namespace=None):
            read(parser, args, namespace)
            raise _Parsed

        given = [word.replace("$study", "speech") for word in words[length:]]
        with (
            patch.object(argparse.ArgumentParser, "parse_args", parse_args),
            patch("sys.argv", [words[0], *given]),
        ):
            try:
                import_module(module).main()
            except _Parsed:
                pass
            except SystemExit as error:
                raise AssertionError(f"arguments refused: {shlex.join(words)}") from error
            else:
                raise AssertionError(f"{module} has read no arguments")

    return checked


def study(words, length):
    """The config that a study names exists too."""
    by_argparse("simulations.study.__main__")(words, length)
    name = words[length]
    if name in ("epsilon", "unequal"):
        name = words[length + 1]
    elif name in STUDIES:
        return  # its parser knows what there is
    named = ROOT / "simulations" / "conf" / f"{name}.toml"
    assert named.exists() or Path(name).suffix == ".toml", f"no run config {named}"


def pytest_arguments(words, length):
    """The tests and the plugin that are named exist."""
    parser = argparse.ArgumentParser()
    for option in ("-p", "-m", "-k"):
        parser.add_argument(option)
    parser.add_argument("tests", nargs="*")
    options, _ = parser.parse_known_args(words[length:])
    assert not options.p or find_spec(options.p), f"no plugin {options.p}"
    for test in options.tests:
        assert_test_exists(test)


def assert_test_exists(node):
    path, _, test = node.partition("::")
    assert (ROOT / path).exists(), f"no test {path}"
    assert not test or f"\ndef {test}(" in (ROOT / path).read_text(), f"no test {node}"


def pip(words, length):
    """What is installed is this package with extras that it has, or a requirement."""
    given = iter(words[length:])
    for word in given:
        if word in ("-c", "--constraint"):
            assert (ROOT / next(given)).exists()
        elif word.startswith("-"):
            assert word in ("-e", "--upgrade", "--quiet"), word
        elif found := re.match(r"(?:\.|flwr-colearn)(?:\[(.*)\])?$", word):
            extras = set(filter(None, (found[1] or "").split(",")))
            assert extras <= set(PYPROJECT["project"]["optional-dependencies"]), word
        elif word != "outputs/app":
            Requirement(word)


def make(words, length):
    done = subprocess.run(
        ["make", "--dry-run", *words[length:]], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# Programs of Flower ------------------------------------------------------------------------------


@cache
def flwr_command():
    """Flower's command line, of which every command only reads its arguments."""
    from flwr.cli.app import app

    whole = typer.main.get_command(app)

    def silence(command):
        command.callback = lambda *args, **more: None
        for each in getattr(command, "commands", {}).values():
            silence(each)

    silence(whole)
    return whole


def flwr(words, length):
    del length
    given = ["1234567890" if word == "RUN" else word for word in words[1:]]
    try:
        flwr_command().main(given, "flwr", standalone_mode=False)
    except click.ClickException as error:
        raise AssertionError(f"{shlex.join(words)}: {error.format_message()}") from error


def flwr_run(words, length):
    """The keys of the run config exist, and their values have the right types."""
    flwr(words, length)
    for option, value in pairwise(words):
        if option == "--federation-config":
            assert parse_config_args([value])
        if option == "--run-config":
            config = run_config_of(value)
            unknown = set(config) - {*RunSettings().to_config(), *ParticipantSettings().to_config()}
            assert not unknown, f"no keys of the run config: {unknown}"
            RunSettings.from_config(config)
            ParticipantSettings.from_config(config)


def run_config_of(value):
    if value.endswith(".toml"):
        return tomllib.loads((ROOT / value).read_text())
    return parse_config_args([value])


def superlink(words, length):
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    _parse_args_run_superlink().parse_args(words[length:])


def supernode(words, length):
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    given = [word for word in words[length:] if word != "..."]
    options, unknown = _parse_args_run_supernode().parse_known_args(given)
    assert not unknown, unknown
    unknown = set(parse_config_args([options.node_config])) - NODE_KEYS
    assert not unknown, f"no keys of the node config: {unknown}"


# Programs of the system --------------------------------------------------------------------------


def script(words, length):
    path = ROOT / words[0]
    assert os.access(path, os.X_OK), f"no program {words[0]}"
    assert len(words) > length, f"{words[0]} needs arguments"


def files_exist(words, length):
    """Files of this repository that are named exist."""
    for word in words[length:]:
        if word.startswith("simulations/"):
            assert (ROOT / word).exists(), f"no file {word}"


TESTS = "tests/simulations"
E2E = "tests/e2e"
OPERATIONS = f"{E2E}/test_operations.py"
DEPLOYMENT = f"{E2E}/test_deployment.py::test_a_clean_run_has_every_participant_in_every_round"
RENEWED = f"{OPERATIONS}::test_certificates_are_renewed_and_sites_change_nothing"
REVOKED = f"{OPERATIONS}::test_a_site_is_revoked_and_another_gets_a_new_key"
OPERATED = f"{E2E}/test_attack.py::test_the_same_commands_get_in_where_no_proxy_is_in_front"
RESTORED = f"{OPERATIONS}::test_the_database_is_restored_from_a_backup_made_while_it_was_in_use"
SIMULATION = f"{TESTS}/launch/test_simulation.py::test_a_run_reaches_its_end"
WHEEL = "tests/test_packaging.py::test_a_users_torch_app_runs_from_the_wheel_without_the_repository"
SITE = "tests/docs/test_site.py::test_it_is_built_without_a_warning"
COMMANDS = "tests/flwr_colearn/reporting"
ADMINISTRATION = ("apt-get", "useradd", "chgrp", "chmod", "install", "rm", "systemctl")
NEEDS_ROOT = None  # users, packages and services of the machine: no test does that

RULES = {
    "python -m simulations.study": (study, f"{TESTS}/study/test_study.py"),
    "python -m simulations.bench": (
        by_argparse("simulations.bench.__main__"),
        f"{TESTS}/bench/test_bench.py",
    ),
    "python -m simulations.export": (
        by_argparse("simulations.export"),
        f"{TESTS}/test_export.py::test_flower_takes_it_as_format_1",
    ),
    "python -m simulations.screenshot": (
        by_argparse("simulations.screenshot"),
        f"{COMMANDS}/test_report_browser.py",
    ),
    "python -m pytest": (pytest_arguments, SITE),
    "python -m http.server": (files_exist, SITE),
    "python -c": (lambda words, length: compile(words[length], "-c", "exec"), RESTORED),
    "python simulations/deploy/check-runs.py": (
        lambda words, length: files_exist(words, 1),
        f"{TESTS}/test_deploy.py::test_a_run_that_ended_with_an_error_is_seen",
    ),
    "python3 -m venv": (files_exist, WHEEL),
    "pip install": (pip, WHEEL),
    "make": (make, SIMULATION),
    "make docs": (lambda words, length: make(words, 1), SITE),
    "flwr run": (flwr_run, SIMULATION),
    "flwr build": (flwr, f"{TESTS}/test_export.py::test_flower_takes_it_as_format_1"),
    "flwr ls": (flwr, OPERATED),
    "flwr log": (flwr, OPERATED),
    "flwr supernode": (flwr, REVOKED),
    "flower-superlink": (superlink, DEPLOYMENT),
    "flower-supernode": (supernode, DEPLOYMENT),
    "nginx": (files_exist, DEPLOYMENT),
    "simulations/deploy/certificates.sh": (
        script,
        f"{TESTS}/test_deploy.py::test_keys_are_for_their_owner_only",
    ),
    "simulations/deploy/proxy.sh": (
        script,
        f"{TESTS}/test_deploy.py::test_nginx_accepts_the_configuration",
    ),
    "simulations/deploy/site-key.sh": (
        script,
        f"{TESTS}/test_deploy.py::test_keys_are_for_their_owner_only",
    ),
    "openssl x509": (files_exist, RENEWED),
    "systemd-analyze security": (
        files_exist,
        f"{TESTS}/test_deploy.py::test_systemd_finds_the_units_well_closed",
    ),
    "umask": (files_exist, RESTORED),
    "cat": (files_exist, REVOKED),
    "mkdir": (files_exist, REVOKED),
    "export": (files_exist, SIMULATION),
    **dict.fromkeys(ADMINISTRATION, (files_exist, NEEDS_ROOT)),
    **{
        f"flwr-colearn {name}": (
            lambda words, length: by_argparse("flwr_colearn.reporting.command_line")(words, 1),
            f"{COMMANDS}/{test}.py",
        )
        for name, test in (
            ("report", "test_report"),
            ("calibrate", "test_calibration"),
            ("checkpoints", "test_checkpoints"),
        )
    },
}  # fmt: skip
