# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The training curves of a run, in at most five panels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..training.metrics import read_metrics


MOST_PANELS = 5
FLAT = 1e-3  # a curve that varies by less than this part of its largest absolute value counts as flat


@dataclass
class Panel:
    """A panel of the curves.

    Attributes:
        title: the title.
        lines: the metrics to draw, by their labels.
        logarithmic: whether the values are shown on a logarithmic scale.
        measured: whether the values are few and exact, so that they are drawn with markers and without smoothing.
    """

    title: str
    lines: dict[str, str]
    logarithmic: bool = False
    measured: bool = False


def candidates(rows: list[dict]) -> list[Panel]:
    """The panels that a run could have, the most telling first."""

    def labelled(prefix: str) -> dict[str, str]:
        names = sorted({name for row in rows for name in row if name.startswith(prefix)})
        return {name.removeprefix(prefix).replace("_", " "): name for name in names}

    # The fidelity reward is minus the loss.
    rewards = {label: name for label, name in labelled("reward/").items() if label != "fidelity"}
    samples = {f"{label}, samples": name for label, name in labelled("sample_reward/").items()}
    real = {f"{label}, real images": name for label, name in labelled("sample_reward_real/").items()}
    return [
        Panel("Flow-matching loss, logarithmic", {"": "loss_fm"}, logarithmic=True),
        Panel("Fréchet distance to training images", labelled("validation/fd_"), logarithmic=True, measured=True),
        Panel("Rewards of the aligned tokens and images", rewards),
        Panel("Rewards of generated images", samples | real),
        Panel("Shares of the rewards in the update", labelled("share/")),
        Panel("Cosine of alignment's and flow matching's gradient", {"mean over noise levels": "mean:cosine/"}),
        Panel("Distance to the encoder's features", {"": "alignment_distance"}),
        Panel("Distance to the scaffold's keys and values", {"": "scaffold_distance"}, logarithmic=True),
        Panel("Length of the gradient", {"": "grad_norm"}, logarithmic=True),
        Panel("Length of alignment's gradient over flow matching's", {"": "mean:gradient_ratio/"}),
        Panel("Length of the image rewards' gradient over flow matching's", labelled("image_share/")),
        Panel("Part of the noise levels that are aligned", {"": "mean:gate/"}),
        Panel("Images per second", {"": "images_per_second"}),
    ]


def points_of(rows: list[dict], name: str, logarithmic: bool) -> tuple[list[int], list[float]]:
    """Steps and finite values of a metric. The name `mean:PREFIX` means the mean over all metrics with that prefix."""
    steps, values = [], []
    for row in rows:
        if name.startswith("mean:"):
            prefix = name.removeprefix("mean:")
            found = [value for key, value in row.items() if key.startswith(prefix)]
        else:
            found = [row[name]] if name in row else []
        found = [value for value in found if isinstance(value, int | float) and math.isfinite(value)]
        value = sum(found) / len(found) if found else math.nan
        if math.isfinite(value) and (value > 0 or not logarithmic):
            steps.append(row["step"])
            values.append(value)
    return steps, values


def varies(values: Sequence[float]) -> bool:
    """Whether a curve of these values is not flat."""
    return len(values) > 1 and max(values) - min(values) > FLAT * max(map(abs, values))


def smoothed(values: Sequence[float], logarithmic: bool = False) -> list[float]:
    """Replaces each value by the mean around it, over a fifteenth of all values, or over fewer near both ends.

    Args:
        logarithmic: whether to take the geometric mean, which does not lift a loss that falls fast.
    """
    if logarithmic:
        return [math.exp(mean) for mean in smoothed([math.log(value) for value in values])]
    half = len(values) // 30
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        means.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return means


def chosen_panels(rows: list[dict]) -> list[tuple[Panel, dict[str, tuple[list[int], list[float]]]]]:
    """The first panels with a curve that is neither empty nor flat, and the points of their lines by label.

    If no curve varies, as in a run of one step, it is the first panel with any point, which is the loss.
    """
    found, only = [], []
    for panel in candidates(rows):
        points = {label: points_of(rows, name, panel.logarithmic) for label, name in panel.lines.items()}
        points = {label: (steps, values) for label, (steps, values) in points.items() if values}
        if any(varies(values) for _, values in points.values()):
            found.append((panel, points))
        elif points and not only:
            only.append((panel, points))
    return found[:MOST_PANELS] or only


def plot_metrics(metrics_file: str | Path, output_file: str | Path, title: str = ""):
    """Plots the metrics of a run over its steps: loss, rewards and their shares, gradients and speed.

    There are at most five panels; those that would be empty or flat are omitted. Strong lines are smoothed, pale ones show
    the values as logged. Without any metric, no file is written.

    Args:
        metrics_file: a `metrics.jsonl`.
        output_file: the picture to write.
        title: a title above all panels.
    """
    # The object interface draws without changing the global backend of matplotlib.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullLocator, ScalarFormatter

    panels = chosen_panels(read_metrics(metrics_file))
    if not panels:
        return
    # Each panel has one cell of a grid; the first of five has two.
    columns = len(panels) if len(panels) < 4 else 2 if len(panels) == 4 else 3
    rows = -(-len(panels) // columns)
    width, height = 4.6 * columns, 3.3 * rows + 0.4
    figure = Figure(figsize=(width, height))
    # Margins in inches. A layout engine would draw everything twice to find them.
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0.75 / width,
        right=1 - 0.2 / width,
        bottom=0.55 / height,
        top=1 - 0.8 / height,
        wspace=0.65 / (width / columns - 1),
        hspace=0.85 / (height / rows - 1),
    )
    first = 2 if len(panels) == 5 else 1
    cells = [grid[0, :first]] + [grid[divmod(i, columns)] for i in range(first, rows * columns)]
    for cell, (panel, points) in zip(cells, panels):
        axis = figure.add_subplot(cell)
        for number, (label, (steps, values)) in enumerate(points.items()):
            color = f"C{number}"
            if panel.measured or len(values) < 20:
                axis.plot(steps, values, label=label, color=color, linewidth=1.8, marker="o", markersize=4)
            else:
                axis.plot(steps, values, color=color, linewidth=0.8, alpha=0.25)
                axis.plot(steps, smoothed(values, panel.logarithmic), label=label, color=color, linewidth=1.8)
        if panel.logarithmic:
            axis.set_yscale("log")
            low, high = axis.get_ylim()
            if high < 10 * low:  # within one power of ten, a logarithmic locator finds at most one tick
                axis.yaxis.set_major_locator(MaxNLocator(6))
                axis.yaxis.set_major_formatter(ScalarFormatter())
            else:
                axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                axis.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
            axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if any(points):
            axis.legend(frameon=False, fontsize="small")
    if title:
        figure.suptitle(title)
    figure.savefig(output_file, dpi=120)
