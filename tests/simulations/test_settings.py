import tomllib
from pathlib import Path

import pytest

import simulations
from clients.settings import ParticipantSettings
from flwr_colearn import Best, ColearnError
from simulations.arms import arm_named, schedules
from simulations.settings import RunSettings, check_keys, read_config

ROOT = Path(simulations.__file__).parent.parent
CONFIGS = sorted((ROOT / "simulations" / "conf").glob("*.toml"))
APP = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)


def typed(config):
    return {key: (value, type(value)) for key, value in config.items()}


def test_the_apps_defaults_are_the_settings_defaults_and_no_key_is_unknown():
    defaults = {**ParticipantSettings().to_config(), **RunSettings().to_config()}
    assert typed(APP) == typed(defaults)


def test_no_key_belongs_to_both_sides():
    assert not ParticipantSettings().to_config().keys() & RunSettings().to_config().keys()


def test_settings_survive_the_run_config():
    settings = RunSettings(arm="elr-fle", epsilon=0.01, total_epochs=9, output_dir="x")
    assert RunSettings.from_config(settings.to_config()) == settings


@pytest.mark.parametrize("value", ["auto", 0.01, 1])
def test_epsilon_is_a_number_or_auto(value):
    settings = RunSettings.from_config({"epsilon": value})
    assert settings.epsilon == value
    assert RunSettings.from_config(settings.to_config()) == settings


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("epsilon", "0.05", "'epsilon': expected float or 'auto', found '0.05'"),
        ("epsilon", "automatic", "'epsilon': expected float or 'auto', found 'automatic'"),
        ("epsilon", True, "'epsilon': expected float or 'auto', found True"),
        ("num-participants", 5.0, "'num-participants': expected int, found 5.0"),
        ("arm", 1, "'arm': expected str, found 1"),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_key(key, value, message):
    with pytest.raises(ColearnError, match=message):
        RunSettings.from_config({key: value})


@pytest.mark.parametrize(
    ("config", "best"),
    [
        ({}, None),
        ({"best-metric": "accuracy"}, Best("accuracy", "max")),
        ({"best-metric": "loss", "stop-patience": 3}, Best("loss", "min", 3)),
        ({"best-metric": "loss", "best-mode": "max"}, Best("loss", "max")),
    ],
)
def test_the_best_model_and_the_patience_are_keys_of_the_run_config(config, best):
    assert RunSettings.from_config(config).best == best


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stop-patience": 3}, "'stop-patience': expected 'best-metric' beside it, found 3"),
        ({"best-mode": "max"}, "'best-mode': expected 'best-metric' beside it, found 'max'"),
        ({"best-metric": "loss", "best-mode": "least"}, "mode of Best: expected 'max' or 'min'"),
        ({"best-metric": "loss", "stop-patience": -1}, "patience of Best: expected a whole number"),
    ],
)
def test_a_patience_without_a_metric_and_an_unknown_mode_are_refused(config, message):
    with pytest.raises(ColearnError, match=message):
        _ = RunSettings.from_config(config).best


def test_the_demos_configs_are_there():
    assert {path.stem for path in CONFIGS} >= {
        "digits",
        "digits-fedavg",
        "digits-keras",
        "digits-slim",
        "cifar10",
        "cifar10-densenet40",
    }


@each_config
def test_a_config_has_only_keys_that_flower_and_the_settings_know(path):
    # ``flwr run --run-config FILE`` rejects keys that [tool.flwr.app.config] does not have.
    config = read_config(path)
    assert config.keys() <= APP.keys()
    assert config == tomllib.loads(path.read_text())


@each_config
def test_a_config_describes_a_run(path):
    config = read_config(path)
    settings = RunSettings.from_config(config)
    assert ParticipantSettings.from_config(config).task == config["task"]
    assert schedules(arm_named(settings.arm), settings)
    assert settings.total_epochs or settings.num_server_rounds


@pytest.mark.parametrize("framework", ["keras", "slim"])
def test_the_digits_run_with_tensorflow_differs_in_the_framework_only(framework):
    conf = ROOT / "simulations" / "conf"
    config = read_config(conf / f"digits-{framework}.toml")
    assert config.pop("framework") == framework
    assert config == read_config(conf / "digits.toml")


def test_the_papers_densenet_run_has_the_papers_values():
    config = read_config(ROOT / "simulations" / "conf" / "cifar10-densenet40.toml")
    paper = {"initial-epochs": 5, "learning-rate": 0.01, "decay": 0.25, "batch-size": 32}
    assert {key: config[key] for key in paper} == paper
    assert config["num-participants"] == 5


@pytest.mark.parametrize("name", ["toxic-bigru", "toxic-capsule"])
def test_the_papers_text_runs_have_the_papers_values(name):
    config = read_config(ROOT / "simulations" / "conf" / f"{name}.toml")
    paper = {"num-participants": 5, "learning-rate": 0.01, "decay": 0.25, "batch-size": 128}
    assert {key: config[key] for key in paper} == paper


def test_a_config_with_an_unknown_key_is_refused_by_file_and_key(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("epsilom = 0.05\n")
    with pytest.raises(ColearnError, match=r"mine.toml: expected keys among .*found 'epsilom'"):
        read_config(path)
    with pytest.raises(ColearnError, match="found 'learning_rate'"):
        check_keys({"learning_rate": 0.1}, "command line")


@pytest.mark.parametrize("content", [None, "epsilon = \n"], ids=["missing", "malformed"])
def test_a_config_that_cannot_be_read_is_refused(tmp_path, content):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ColearnError, match="config: expected a readable TOML file"):
        read_config(path)


def test_sites_that_compare_models_evaluate_in_every_round():
    compared = RunSettings().with_evaluation(has_test_set=True, compare_alone=True)
    assert compared.fraction_evaluate == 1.0
    assert RunSettings().with_evaluation(has_test_set=True).fraction_evaluate == 0.0
    some = RunSettings(fraction_evaluate=0.5)
    assert some.with_evaluation(has_test_set=True, compare_alone=True) == some
    with pytest.raises(ColearnError, match="'fraction-evaluate': expected above 0"):
        RunSettings(fraction_evaluate=0.0).with_evaluation(has_test_set=True, compare_alone=True)
