"""Say how the newest run ended; `flwr run` returns 0 for a run that ended with an error too.

    flwr ls site --format json | python check-runs.py

Exit status: 0 if the newest run is complete, stopped by the operator or under way, or there is
none; 1 if it ended with an error; 2 if the SuperLink did not answer. A new run clears the error.
It needs Python's standard library only. docs/operations.md has the timer that calls it.
"""

import json
import sys
from typing import Any

ENDED_BADLY, NO_ANSWER = 1, 2


def newest_run(answer: str) -> dict[str, Any] | None:
    """Return the newest run in the output of ``flwr ls --format json``; None if there is none.

    Raises
    ------
    ValueError
        If the output is not a list of runs, with what it is instead.
    """
    try:
        listed = json.loads(answer)
    except ValueError:
        raise ValueError(f"expected the JSON of `flwr ls`, found {answer[:200]!r}") from None
    if not isinstance(listed, dict) or not listed.get("success"):
        raise ValueError(f"expected a list of runs, found {answer[:500]!r}")
    # Times are ISO 8601 in UTC, whose order is that of their texts.
    return max(listed["runs"], key=lambda run: run["pending-at"], default=None)


def main() -> int:
    """Read the list of runs from standard input, print one line, and return the exit status."""
    try:
        run = newest_run(sys.stdin.read())
    except ValueError as error:
        print(f"SuperLink: {error}", file=sys.stderr)
        return NO_ANSWER
    if run is None:
        print("no run yet")
        return 0
    # The details are an app's text. On one line, and bounded, for the journal.
    details = ascii(str(run.get("status-details", "")))[:500]
    status = run["status"]
    print(f"run {run['run-id']} of {run['pending-at']}: {status} {details}")
    # Statuses of later versions of Flower count as bad, so that none is passed over.
    under_way = ("pending", "starting", "running")
    good = (*under_way, "finished:completed", "finished:stopped")
    return 0 if status in good else ENDED_BADLY


if __name__ == "__main__":
    sys.exit(main())
