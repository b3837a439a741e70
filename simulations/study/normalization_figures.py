"""The figure of the study of normalization schemes."""

from collections.abc import Sequence
from pathlib import Path

from flwr_colearn.normalization import SCHEMES
from simulations.study.normalization_cells import PARTITIONS, TRAININGS, Unit


def save_figure(units: Sequence[Unit], path: Path, title: str) -> None:
    """Draw global (filled) and local (hollow) accuracy by scheme, one panel a training."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    trainings = [t for t in TRAININGS if any(u.training == t for u in units)]
    figure, axes = plt.subplots(
        1, len(trainings), figsize=(5 * len(trainings), 4.5), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axis, training in zip(axes[0], trainings, strict=True):
        for offset, (partition, colour) in enumerate(
            zip(PARTITIONS, ("tab:blue", "tab:orange", "tab:red"), strict=True)
        ):
            for x, scheme in enumerate(SCHEMES):
                runs = [
                    u
                    for u in units
                    if (u.training, u.partition, u.scheme) == (training, partition, scheme)
                    and not u.diverged
                ]
                if not runs:
                    continue
                place = x + 0.25 * (offset - 1)
                whole = [u.sites_accuracy for u in runs if u.sites_accuracy is not None]
                is_local = runs[0].shared_accuracy is None
                axis.plot([place] * len(whole), [100 * v for v in whole], linestyle="none",
                          marker="D" if is_local else "o", color=colour, markersize=4)  # fmt: skip
                local = [100 * u.local_accuracy for u in runs if u.local_accuracy is not None]
                axis.plot([place] * len(local), local, linestyle="none", marker="o",
                          markerfacecolor="none", color=colour, markersize=6)  # fmt: skip
        axis.set_title(TRAININGS[training])
        axis.set_xticks(range(len(SCHEMES)), SCHEMES, rotation=60, ha="right")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy %")
    for partition, colour in zip(PARTITIONS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
        axes[0][0].plot([], [], "o", color=colour, label=PARTITIONS[partition])
    axes[0][0].plot([], [], "o", color="grey", label="shared model, common test set")
    axes[0][0].plot([], [], "D", color="grey", label="sites' own models, common test set")
    axes[0][0].plot([], [], "o", color="grey", markerfacecolor="none", label="local labels")
    figure.legend(fontsize=8, loc="outside lower center", ncols=6)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
