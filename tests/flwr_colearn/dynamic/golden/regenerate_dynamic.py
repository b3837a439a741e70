"""Write the golden traces of dynamic averaging anew, after a change that is meant to change them.

    PYTHONPATH=. python tests/flwr_colearn/dynamic/golden/regenerate_dynamic.py

Look at the difference before committing it: the golden traces are there to catch changes that are
not meant.
"""

import json
import runpy
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    for test, name in (("test_strategy", "dynamic"), ("test_calibration", "calibrated")):
        trace = runpy.run_path(str(HERE.parent / f"{test}.py"))["golden_trace"]
        (HERE / f"{name}.json").write_text(json.dumps(trace(), indent=1) + "\n")
