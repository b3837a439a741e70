"""The demo (``make demo``): co-learning of five participants on digits, with ``flwr run``."""

import argparse
import json
import sys
import time
from pathlib import Path

from simulations.launch.simulation import run_app

ROOT = Path(__file__).resolve().parent.parent
PARTICIPANTS = 5


def main() -> int:
    """Run the demo; return 0 if it finished."""
    parser = argparse.ArgumentParser(prog="python -m simulations.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "demo")
    parser.add_argument("--timeout", type=float, default=900, help="seconds (default 900)")
    options = parser.parse_args()
    output = options.output.absolute()
    summary_path = output / "summary.json"
    # The summary of an earlier run would hide that this one failed.
    summary_path.unlink(missing_ok=True)
    started = time.monotonic()
    # Without checkpoints, with which a second demo would find that nothing is left to train.
    config = {"output-dir": str(output), "checkpoints": ""}
    run_app(ROOT, PARTICIPANTS, config, output / "flwr-home", options.timeout)
    # Flower's exit code is 0 for failed runs too. The summary is written last, so it shows whether
    # the run has finished.
    if not summary_path.exists():
        print("\nThe run did not finish; the reason is in the log above.", file=sys.stderr)
        return 1
    report(json.loads(summary_path.read_text()), output, time.monotonic() - started)
    return 0


def report(summary: dict, output: Path, seconds: float) -> None:  # type: ignore[type-arg]
    """Print the results of the run."""
    path = ", ".join(str(epochs) for epochs in summary["epochs-path"])
    saved = 1 - summary["bytes"] / summary["fedavg-bytes"]
    same = summary["local-epochs"] / summary["rounds"]  # the fixed T of as many rounds
    print(f"""
Co-learning, {PARTICIPANTS} participants, scikit-learn's handwritten digits ({seconds:.0f} s)

  test accuracy        {100 * summary["accuracy"]:.1f} %
  rounds               {summary["rounds"]}
  local epochs T_i     {path}  ({summary["local-epochs"]} in all)
  bytes up and down    {summary["bytes"]:,}
  federated averaging  {summary["fedavg-bytes"]:,} with T=1 \
({summary["fedavg-rounds"]} rounds): {100 * saved:.0f} % saved; \
as many as here with T={same:.1f} ({summary["rounds"]} rounds)

  history   {output / "history.jsonl"}
  report    {output / "report.html"}
  picture   {output / "accuracy.png"}
  model     {output / "model.npz"}""")


if __name__ == "__main__":
    sys.exit(main())
