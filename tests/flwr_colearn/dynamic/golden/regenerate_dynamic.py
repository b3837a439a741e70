"""Write dynamic.json anew, after a change that is meant to change what a run does.

    PYTHONPATH=. python tests/flwr_colearn/dynamic/golden/regenerate_dynamic.py

Look at the difference before committing it: the golden trace is there to catch changes that are
not meant.
"""

import json
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    trace = runpy.run_path(str(HERE.parent / "test_strategy.py"))["golden_trace"]
    (HERE / "dynamic.json").write_text(json.dumps(trace(), indent=1) + "\n")
