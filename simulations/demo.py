"""The demo: co-learning of five participants on digits.

``make demo`` runs it with ``flwr run``, as Flower simulates; ``make demo-fast`` in one process,
without Flower's runtime and Ray, whose start takes most of the other's time.
"""

import argparse
import json
import os
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from simulations.launch.simulation import run_app

ROOT = Path(__file__).resolve().parent.parent
PARTICIPANTS = 5


def main() -> int:
    """Run the demo; return 0 if it finished."""
    parser = argparse.ArgumentParser(prog="python -m simulations.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo")
    parser.add_argument("--timeout", type=float, default=900, help="seconds (default 900)")
    parser.add_argument("--in-process", action="store_true", help="without flwr run, faster")
    options = parser.parse_args()
    output = options.output.absolute()
    summary_path = output / "summary.json"
    # The summary of an earlier run would hide that this one failed.
    summary_path.unlink(missing_ok=True)
    started = time.monotonic()
    # Without checkpoints, with which a second demo would find that nothing is left to train.
    config = {"output-dir": str(output), "checkpoints": ""}
    if options.in_process:
        in_process(config)
    else:
        run_app(ROOT, PARTICIPANTS, config, output / "flwr-home", options.timeout)
    # Flower's exit code is 0 for failed runs too. The summary is written last, so it shows whether
    # the run has finished.
    if not summary_path.exists():
        print("\nThe run did not finish; the reason is in the log above.", file=sys.stderr)
        return 1
    how = "in one process" if options.in_process else "by flwr run"
    report(json.loads(summary_path.read_text()), output, time.monotonic() - started, how)
    return 0


def in_process(overrides: dict[str, Any]) -> None:
    """Run the app with its default run config in this process."""
    # On networks this small threads cost more than they save; PyTorch reads this at its import.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from flwr.app import Context, RecordDict

    from flwr_colearn import InProcessGrid
    from simulations.server_app import main as serve

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    config = {**project["tool"]["flwr"]["app"]["config"], **overrides}
    with InProcessGrid("clients.app:app", PARTICIPANTS, config) as grid:
        serve(grid, Context(1, 0, {}, RecordDict(), config))


def averaging(summary: dict[str, Any], epochs: int) -> str:
    """Return the bytes of federated averaging with T fixed, for the same local epochs."""
    rounds = -(-summary["local-epochs"] // epochs)
    sent = rounds * summary["bytes"] // summary["rounds"]
    share = summary["bytes"] / sent
    return (
        f"{sent:,} with T={epochs} ({rounds} rounds); co-learning has {100 * share:.0f} % of that"
    )


def report(summary: dict[str, Any], output: Path, seconds: float, how: str) -> None:
    """Print the results of the run."""
    path = ", ".join(str(epochs) for epochs in summary["epochs-path"])
    # T fixed at the first one, and at the one with which there are about as many rounds.
    fixed = summary["epochs-path"][0], -(-summary["local-epochs"] // summary["rounds"])
    print(f"""
Co-learning, {PARTICIPANTS} participants, scikit-learn's handwritten digits
({how}, {seconds:.0f} s)

  test accuracy        {100 * summary["accuracy"]:.1f} %
  rounds               {summary["rounds"]}
  local epochs T_i     {path}  ({summary["local-epochs"]} in all)
  bytes up and down    {summary["bytes"]:,}

  federated averaging for the same local epochs
                       {averaging(summary, fixed[0])}
                       {averaging(summary, fixed[1])}

  history   {output / "history.jsonl"}
  report    {output / "report.html"}
  picture   {output / "accuracy.png"}
  model     {output / "model.npz"}""")


if __name__ == "__main__":
    sys.exit(main())
