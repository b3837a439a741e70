"""The server's settings, read from a run config, and the reader of config files."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from clients.settings import WORDS, FromConfig, ParticipantSettings
from flwr_colearn import Best, ColearnError, Quorum, Recovery, SecureAggregation, Transport

CONF = Path(__file__).parent / "conf"
"""The folder of the run configs."""


@dataclass(frozen=True)
class RunSettings(FromConfig):
    """The server's settings; each field is a run-config key.

    Attributes
    ----------
    arm : str
        The arm: "clr-ile" (co-learning), "clr-fle", "elr-ile" or "elr-fle" (federated averaging).
    num_participants : int
        K, the number of participants.
    num_server_rounds : int
        The largest number of rounds; 0 for as many as `total_epochs` allows.
    total_epochs : int
        The budget of local epochs per participant, and E of the exponential rate; 0 for none.
    initial_epochs : int
        T0, the local epochs of the first round (of all rounds in the "fle" arms).
    epsilon : float or "auto"
        The threshold of eq. 4 on the relative change: how far one round should move the model.
        "auto" is the plateau rule in place of eq. 4, which needs none (`PlateauEpochs`).
    max_local_epochs : int
        The largest T; 0 for no limit, and with epsilon "auto" for 16.
    local_steps : int
        The steps (mini-batches) that every participant trains in place of one local epoch, for
        participants with data of very different sizes; 0 for passes over each one's own data.
    learning_rate, decay : float
        eta and r, the initial learning rate and its decay.
    anneal : str
        How eta of the "clr" arms anneals over `total_epochs`: "cosine" to 0, or "exponential" to
        eta*r; empty for the paper's constant eta.
    weighting : str
        The weights of the average: "uniform" or "weighted" (by the number of examples).
    compression_up, compression_down : str
        The codecs of models from and to the participants: "float32" (unchanged), "float16",
        "bfloat16"; up also "int8", with a scale for each array, "int8-first-axis" or
        "int8-last-axis", with one for each channel.
    secure_aggregation : bool
        Whether the server receives the average only, and no participant's model. It needs at least
        three participants, and `compression_up` must stay "float32".
    fraction_evaluate : float
        The share of participants that evaluate the shared model on their own data after each
        round. The default, -1, stands for all of them if the server has no test set, or if they
        compare models (`compare-alone`), else none.
    wait_for_participants : float
        The seconds to wait for K participants to connect; a day by default.
    participants : str
        The registered names of the sites that take part, separated by commas: no other gets the
        model. `num_participants` is their number then. Empty for any K sites that are connected.
    policy : str
        What happens if a participant's restarts are spent: "fail" ends the run with the model of
        the last completed round, "wait" restarts without a limit.
    quorum : int
        The number of participants with which a round may be completed, in place of `policy`; 0 for
        none.
    timeout : float
        The seconds that one attempt of a participant may take at least; the limit grows with T.
        After it the participant is restarted. "inf" is not possible in a run config: 0 stands for
        no limit.
    best_metric : str
        The metric by which the best shared model is kept beside the last one: the server's, or the
        sites' if it has no test set. Empty for the last one alone.
    best_mode : str
        "max" or "min"; empty for "min" if the metric's name contains "loss" or "error", else "max".
    stop_patience : int
        The run ends early after so many evaluations without a better `best_metric`; 0 for no early
        end.
    initial_weights : str
        A file of pretrained weights by name, ``.npz``, ``.safetensors`` or ``.pt`` (a state dict);
        empty for the model's own initialisation.
    run_name : str
        The name of the run, under which a run that is started again goes on; by default one made
        of all settings.
    resume : str
        "auto" goes on from the newest checkpoint; with "never" a run whose folder has checkpoints
        is refused.
    checkpoints : str
        The folder of the checkpoints; empty for none.
    history : str
        The file of the history.
    tracker : str
        "tensorboard" writes every round's numbers to the folder ``tensorboard`` in `output_dir`
        too; empty for no tracker.
    output_dir : str
        The folder for history, checkpoints, model, figure and summary. Relative paths, of this
        folder too, are below ``$FLWR_HOME/colearn/<run-name>`` (see `simulations.run_folder`).
    """

    arm: str = "clr-ile"
    num_participants: int = 5
    num_server_rounds: int = 0
    total_epochs: int = 60
    initial_epochs: int = 1
    epsilon: float | str = field(default=0.05, metadata={WORDS: ("auto",)})
    max_local_epochs: int = 0
    local_steps: int = 0
    learning_rate: float = 0.05
    decay: float = 0.25
    anneal: str = ""
    weighting: str = "uniform"
    compression_up: str = "float32"
    compression_down: str = "float32"
    secure_aggregation: bool = False
    fraction_evaluate: float = -1.0
    wait_for_participants: float = 86_400.0
    participants: str = ""
    policy: str = "fail"
    quorum: int = 0
    timeout: float = 3600.0
    best_metric: str = ""
    best_mode: str = ""
    stop_patience: int = 0
    initial_weights: str = ""
    run_name: str = ""
    resume: str = "auto"
    checkpoints: str = "checkpoints"
    history: str = "history.jsonl"
    tracker: str = ""
    output_dir: str = ""

    @property
    def participant_names(self) -> tuple[str, ...] | None:
        """The names in `participants`; None if there are none."""
        return tuple(filter(None, map(str.strip, self.participants.split(",")))) or None

    def with_evaluation(self, has_test_set: bool, compare_alone: bool = False) -> "RunSettings":
        """Return the settings with the default of `fraction_evaluate` replaced by its value.

        Raises
        ------
        ColearnError
            If the sites compare models, and none of them evaluates.
        """
        if compare_alone and self.fraction_evaluate == 0:
            raise ColearnError(
                "run config 'fraction-evaluate': expected above 0 beside 'compare-alone', since "
                "sites compare models when they evaluate, found 0; leave it out"
            )
        if self.fraction_evaluate >= 0:
            return self
        return replace(self, fraction_evaluate=1.0 if compare_alone or not has_test_set else 0.0)

    @property
    def recovery(self) -> Recovery:
        """The policy and the quorum."""
        policy = Quorum(self.quorum) if self.quorum else self.policy
        return Recovery(policy=policy)  # type: ignore[arg-type]  # Recovery checks it

    @property
    def best(self) -> Best | None:
        """The rule for the best shared model and the early end; None if there is none.

        Raises
        ------
        ColearnError
            If there is a patience and no metric, or one of the settings is invalid.
        """
        if self.best_metric:
            mode: Any = self.best_mode or None  # Best checks it
            return Best(self.best_metric, mode, self.stop_patience or None)
        for key, value in (("best-mode", self.best_mode), ("stop-patience", self.stop_patience)):
            if value:
                raise ColearnError(
                    f"run config '{key}': expected 'best-metric' beside it, found {value!r} alone"
                )
        return None

    @property
    def transport(self) -> Transport:
        """The features of exchanges that are no arguments of the strategy."""
        secure = SecureAggregation() if self.secure_aggregation else None
        return Transport(participants=self.participant_names, secure=secure)


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a run config file, as ``flwr run --run-config FILE`` does.

    Raises
    ------
    ColearnError
        If the file is missing or has a key that is no setting.
    """
    try:
        config = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ColearnError(f"config: expected a readable TOML file, found {error}") from error
    check_keys(config, str(path))
    return config


def check_keys(config: Mapping[str, Any], where: str) -> None:
    """Raise a ColearnError if `config` has a key that is no setting."""
    # A misspelt key would otherwise be ignored and its default used.
    known = {**ParticipantSettings().to_config(), **RunSettings().to_config()}
    for key in config:
        if key not in known:
            raise ColearnError(f"{where}: expected keys among {sorted(known)}, found '{key}'")
