"""Variants: ways of training that a study compares, as its description has them."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clients.settings import ParticipantSettings
from flwr_colearn import ColearnError
from simulations.arms import Arm, arm_named
from simulations.settings import CONF, RunSettings, read_config
from simulations.study.arguments import settings_of

FOLDER = CONF / "converged"
"""The folder of the descriptions."""


@dataclass(frozen=True)
class Variant:
    """One way of training.

    Attributes
    ----------
    name, title : str
        In file names, and in tables and legends.
    arm : Arm
        The learning-rate schedule, the epoch rule, and who trains together.
    participants, settings
        The settings of both sides.
    """

    name: str
    title: str
    arm: Arm
    participants: ParticipantSettings
    settings: RunSettings


@dataclass(frozen=True)
class Study:
    """A task and the variants that are compared on it.

    Attributes
    ----------
    name : str
        Of the description's file.
    title, note : str
        What is trained, and what there is to say about it.
    every : int
        The local epochs between two evaluations; the last model is always evaluated.
    headline : str
        The variant that the others are compared with.
    figure : list of str
        The variants that the figure shows.
    variants : tuple of Variant
        In the order of the tables.
    """

    name: str
    title: str
    note: str
    every: int
    headline: str
    figure: tuple[str, ...]
    variants: tuple[Variant, ...]

    @property
    def compares(self) -> bool:
        """Whether variants are compared on the test set; else settings are chosen by them."""
        return not any(v.participants.validation_examples for v in self.variants)

    def variant(self, name: str) -> Variant:
        """Return the variant of that name.

        Raises
        ------
        ColearnError
            If there is none.
        """
        for variant in self.variants:
            if variant.name == name:
                return variant
        names = ", ".join(variant.name for variant in self.variants)
        raise ColearnError(f"variant: expected one of {names}, found {name!r}")


def with_seed(variant: Variant, seed: int, data_dir: str | None = None) -> Variant:
    """Return the variant with a seed and, if given, the folder of the data."""
    participants = replace(variant.participants, seed=seed)
    if data_dir is not None:
        participants = replace(participants, data_dir=data_dir)
    return replace(variant, participants=participants)


def studies() -> dict[str, Path]:
    """Return the descriptions by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read_study(path: Path) -> Study:
    """Read a description: a run config, what all variants change in it, and what each changes.

    Raises
    ------
    ColearnError
        If an arm or a key of a run config is unknown.
    """
    content = tomllib.loads(path.read_text())
    base = {**read_config(CONF / f"{content['config']}.toml"), **content.get("changes", {})}
    variants = tuple(_variant(entry, base, str(path)) for entry in content["variants"])
    return Study(
        path.stem,
        content["title"],
        content["note"],
        content["every"],
        content["headline"],
        tuple(content.get("figure", [variant.name for variant in variants])),
        variants,
    )


def _variant(entry: Mapping[str, Any], base: Mapping[str, Any], where: str) -> Variant:
    changes = {key: value for key, value in entry.items() if key not in ("name", "title")}
    participants, settings = settings_of({**base, **changes}, where)
    arm = arm_named(settings.arm)
    return Variant(entry["name"], entry["title"], arm, participants, settings)
