"""The participants' settings, read from a run config with checks of their types."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from flwr_colearn import ColearnError, Frozen, Normalization
from flwr_colearn.normalization import scheme_named

WORDS = "words"
"""The entry of a field's metadata with the strings that it takes in place of a number."""


class FromConfig:
    """Mixin: build a dataclass of settings from kebab-case keys of a Flower run config."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Take this class's keys from `config`; those that are absent keep their default.

        Raises
        ------
        ColearnError
            If a value is of another type than its default, and none of the words that its field
            takes in place of it.
        """
        values = {}
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            key = field.name.replace("_", "-")
            if key not in config:
                continue
            wanted, found = type(field.default), config[key]
            words = field.metadata.get(WORDS, ())
            # In TOML and on the command line 1 is an int, also where 1.0 is meant.
            if wanted is float and type(found) is int:
                found = float(found)
            # Exact types, not isinstance: True would pass as an int.
            if type(found) is not wanted and found not in words:
                either = " or ".join([wanted.__name__, *map(repr, words)])
                raise ColearnError(f"run config '{key}': expected {either}, found {config[key]!r}")
            values[field.name] = found
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """Return the settings under their kebab-case keys."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]
        return {name.replace("_", "-"): value for name, value in values.items()}


@dataclass(frozen=True)
class ParticipantSettings(FromConfig):
    """A participant's data, model and optimizer; each field is a run-config key.

    Attributes
    ----------
    framework : str
        The framework: "torch", "keras" (Keras 3 on TensorFlow) or "slim" (TF-slim, in graph mode).
        All sites of a run use the same one; only that one is imported.
    task : str
        The task: "digits", "cifar10", or with PyTorch only "mnist", "imagefolder", "toxic",
        "speech", "audioset"; or a function of an installed package, "package.module:function",
        see docs/own-data.md.
    model : str
        One of the models that the framework has for the task, or "package.module:function"; empty
        for the task's default.
    data_dir : str
        In the run config, the folder of the data set that a simulation divides; empty for ``data``.
        In a site's node config, the folder of the site's own data.
    classes : str
        The names of the classes, separated by commas, in the order of their numbers: the same at
        every site, whichever of them it has. Needed for own data of the tasks "imagefolder" and
        "speech", whose classes are names of folders.
    held_out : float
        The share of a site's own examples that the site evaluates on and does not train on, drawn
        by `seed`, if the site has no test data of its own.
    split : str
        The split of task "speech": "official" for the data set's own training, validation and test
        parts, or "speaker" for parts by another hash of the speaker, which fit subsets of the data.
    examples : int
        The number of training examples to use; 0 for all.
    validation_examples : int
        The number of training examples, the last ones, that models are evaluated on in a simulation
        in place of the test set: settings are chosen by them. 0 for none.
    partition : str
        The partition: "iid" (equal shards), "shares" (unequal ones), "dirichlet" or "classes"; only
        the first two for tasks with several labels for each example.
    shares : str
        The sizes of the shards of the "shares" partition, in proportion and in participants' order.
    dirichlet_alpha : float
        The concentration of the "dirichlet" partition.
    classes_each : int
        The number of classes of each participant in the "classes" partition.
    vectors : str
        The fastText ``.vec`` file of tasks with text, the same at every site, which defines the
        vocabulary and the word vectors; empty to learn them.
    vocabulary : int
        The number of words in the vocabulary of tasks with text. For own data without `vectors` and
        `vocabulary_file` it is the number of hash values of words.
    vocabulary_file : str
        A text file with the words of the vocabulary, one in every line, for tasks with text; a
        relative path is one inside the app. Empty for none.
    seed : int
        The seed of the partition, the initial model, and the participants' training.
    batch_size, momentum, weight_decay, clip_norm
        The parameters of SGD; `clip_norm` 0 switches clipping off.
    augment : bool
        Whether training uses the task's standard augmentation.
    keep_optimizer : bool
        Whether participants store the optimizer's state between rounds.
    devices : str
        The device by the framework's name ("cuda:0", "GPU:0", "cpu"); empty for a GPU if there is
        one. With torch also several, separated by commas, for data parallel training inside the
        site.
    precision : str
        The precision: "float32", or with torch and keras "bfloat16" or "float16".
    jit_compile : bool
        Whether to compile the training step: with keras by XLA, with torch by ``torch.compile``.
    channels_last, workers
        Options of torch: see `clients.torch.trainer.TorchTrainer`.
    image_size : int
        The height and width in pixels to which the task "imagefolder" scales its images; 0 for 224.
    normalization : str
        The normalization scheme of both sides: "average", "pooled", "recalibrated",
        "local-statistics", "local-bn", "frozen", "group-norm", "layer-norm" or "batch-renorm", with
        the scheme's default parameters; see `flwr_colearn.Normalization`.
    frozen_after : int
        The last round in which the scheme "frozen" updates statistics.
    compare_alone : bool
        Whether every site also trains a model on its own data alone, for the same epochs, and
        compares the shared model with it, see `clients.alone.CompareAlone`. It doubles the training
        time, and each site evaluates in every round.
    common_test : str
        In a site's node config, a folder with a test set that all sites have, laid out as
        `data_dir`, on which the comparison is made too; empty for none.
    """

    framework: str = "torch"
    task: str = "digits"
    model: str = ""
    data_dir: str = ""
    classes: str = ""
    held_out: float = 0.1
    split: str = "official"
    examples: int = 0
    validation_examples: int = 0
    partition: str = "iid"
    shares: str = "1:2:4:8:16"
    dirichlet_alpha: float = 0.5
    classes_each: int = 2
    vectors: str = ""
    vocabulary: int = 20_000
    vocabulary_file: str = ""
    seed: int = 0
    batch_size: int = 32
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    augment: bool = False
    keep_optimizer: bool = False
    devices: str = ""
    precision: str = "float32"
    jit_compile: bool = False
    channels_last: bool = False
    workers: int = 0
    image_size: int = 0
    normalization: str = "pooled"
    frozen_after: int = 4
    compare_alone: bool = False
    common_test: str = ""

    @property
    def scheme(self) -> Normalization:
        """The scheme that `normalization` names.

        Raises
        ------
        ColearnError
            If there is no such scheme.
        """
        parameters = {"after": self.frozen_after} if self.normalization == Frozen.name else {}
        return scheme_named(self.normalization, **parameters)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names in `classes`, in order; empty if there are none.

        Raises
        ------
        ColearnError
            If a name occurs twice.
        """
        names = tuple(name.strip() for name in self.classes.split(",") if name.strip())
        if len(set(names)) < len(names):
            raise ColearnError(f"run config 'classes': expected every name once, found {names}")
        return names

    def refuse(self, *names: str) -> None:
        """Raise a ColearnError if one of these settings, which the framework lacks, is set."""
        # An ignored setting would train another model than the run config describes.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ColearnError(
                    f"run config '{field.name.replace('_', '-')}': expected {field.default!r}, "
                    f"since framework '{self.framework}' has no such option, found {value!r}"
                )
