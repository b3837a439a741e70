"""Compare the paper's arms at the same number of local epochs per participant, in process.

    python -m simulations.study digits --seeds 3
    python -m simulations.study cifar10-densenet40 --calibrate 10

TASK names a config in simulations/conf (or is a path to one). Every (arm, seed) is a unit: its
result is written as it ends, a re-run skips what is there, and an interrupted unit goes on from its
last round. Other studies have commands of their own: ``paper`` makes the paper's tables and figure,
``normalization`` compares normalization schemes, ``dynamic`` operators of model averaging.
"""

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from flwr_colearn import ColearnError
from simulations.settings import CONF, read_config
from simulations.study.arguments import OVERRIDES, parse_arguments, settings_of
from simulations.study.calibration import calibrate
from simulations.study.comparison import run_study, write_report

STUDIES = {
    "dynamic": "simulations.study.dynamic",
    "converged": "simulations.study.converged.command",
    "normalization": "simulations.study.normalization",
    "epsilon": "simulations.study.epsilon",
    "paper": "simulations.study.paper",
    "unequal": "simulations.study.unequal",
}
"""Studies with a command of their own, by module, imported when asked for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a study from the command line."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words and words[0] in STUDIES:
        import_module(STUDIES[words[0]]).main(words[1:])
        return
    options = parse_arguments(words, __doc__)
    logging.getLogger("flwr").setLevel(logging.WARNING)  # one progress bar says it all
    path = Path(options.task)
    config = read_config(path if path.suffix == ".toml" else CONF / f"{options.task}.toml")
    for name in OVERRIDES:
        if getattr(options, name) is not None:
            config[name.replace("_", "-")] = getattr(options, name)
    participants, settings = settings_of(config, str(path))
    if options.calibrate is not None:
        print(calibrate(participants, settings, options.calibrate))
        return
    output = options.output or Path("outputs") / f"study-{path.stem}"
    units = run_study(
        options.arms, options.seeds, participants, settings, output, options.processes
    )
    try:
        print(write_report(units, output, path.stem))
    except (ModuleNotFoundError, ColearnError) as error:  # a machine that only trains needs neither
        print(f"No table or no picture ({error}); pip install 'flwr-colearn[report]'")
    print(f"\nResults are in {output}")


if __name__ == "__main__":
    main()
