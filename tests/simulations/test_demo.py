"""What ``make demo`` says; launch/test_simulation.py has the run itself."""

import json

import pytest

from simulations import demo

SUMMARY = {
    "accuracy": 0.984,
    "rounds": 11,
    "local-epochs": 60,
    "epochs-path": [1, 1, 2, 56],
    "bytes": 1_000_000,
    "fedavg-rounds": 60,
    "fedavg-bytes": 4_000_000,
}


def run_demo(monkeypatch, output, run_app):
    monkeypatch.setattr(demo, "run_app", run_app)
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(output), "--timeout", "7"])
    return demo.main()


def test_the_report_says_what_the_summary_says(tmp_path, capsys):
    demo.report(SUMMARY, tmp_path, 34.6, "by flwr run")
    text = " ".join(capsys.readouterr().out.split())
    assert "5 participants, scikit-learn's handwritten digits (by flwr run, 35 s)" in text
    assert "test accuracy 98.4 %" in text
    assert "rounds 11" in text
    assert "local epochs T_i 1, 1, 2, 56 (60 in all)" in text
    assert "bytes up and down 1,000,000" in text
    assert "averaging for the same local epochs 5,454,545 with T=1 (60 rounds)" in text
    assert "has 18 % of that 909,090 with T=6 (10 rounds); co-learning has 110 % of that" in text
    for name in ("history.jsonl", "report.html", "accuracy.png", "model.npz"):
        assert str(tmp_path / name) in text


def test_the_demo_is_five_participants_of_the_app_in_its_output_folder(tmp_path, monkeypatch):
    asked = {}

    def run_app(app, participants, config, home, timeout):
        asked.update(app=app, participants=participants, config=config, home=home, timeout=timeout)
        (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))

    assert run_demo(monkeypatch, tmp_path, run_app) == 0
    assert (asked["app"] / "pyproject.toml").exists()
    assert (asked["participants"], asked["timeout"]) == (5, 7.0)
    assert asked["config"] == {"output-dir": str(tmp_path), "checkpoints": ""}
    assert asked["home"].is_relative_to(tmp_path)


def test_a_run_that_does_not_reach_its_end_is_a_failure_even_after_one_that_did(
    tmp_path, monkeypatch, capsys
):
    # Flower's own exit code is 0 in both cases.
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert run_demo(monkeypatch, tmp_path, lambda *arguments: None) == 1
    captured = capsys.readouterr()
    assert "did not finish" in captured.err
    assert "98.4" not in captured.out


def test_help_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        demo.main()
    assert "co-learning of five participants" in capsys.readouterr().out
