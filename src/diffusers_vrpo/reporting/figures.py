# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The plots of `vrpo report`: quality against cost with the spread over seeds, and the last values."""

import io
import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogFormatter, LogLocator, MaxNLocator


# Colours of Okabe and Ito, which are distinct for any colour vision, and lighter ones of the same hues for a dark background.
# Line styles and markers repeat with other periods than the colours, so that no two of a dozen arms look alike.
COLORS = {
    "light": ["#0072B2", "#D55E00", "#009E73", "#AA4499", "#8A6D00", "#000000", "#56B4E9"],
    "dark": ["#56B4E9", "#FF8A3D", "#2FD3A2", "#F0A6D0", "#F0E442", "#FFFFFF", "#8FA8FF"],
}
LINES = ["-", "--", "-.", ":"]
MARKERS = ["o", "s", "^", "D", "v"]
THEMES = {
    "light": {"ink": "#1b1b1b", "ground": "#ffffff"},
    "dark": {"ink": "#e6e6e6", "ground": "none"},  # the page shows through
}


def style(theme: str) -> dict:
    """matplotlib's settings for a theme, with which the same data always give the same SVG file."""
    ink, ground = THEMES[theme]["ink"], THEMES[theme]["ground"]
    names = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color legend.labelcolor grid.color"
    return dict.fromkeys(names.split(), ink) | {
        "figure.facecolor": ground,
        "axes.facecolor": ground,
        "savefig.facecolor": ground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.18,
        "font.size": 10.5,
        "svg.hashsalt": "diffusers-vrpo",
        "svg.fonttype": "path",
        "text.parse_math": False,  # a name may contain a $
    }


def flop_unit(flops: float) -> tuple[float, str]:
    """The divisor for a number of FLOPs, and the unit of the quotient."""
    power = min(7, max(0, int(math.log10(flops) / 3))) if flops > 0 else 0
    return 1000.0**power, ["", "k", "M", "G", "T", "P", "E", "Z"][power] + "FLOP"


def metric_label(metric: str) -> str:
    """A metric of `metrics.jsonl` in words: `Fréchet distance (digits)` for `validation/fd_digits`."""
    group, _, name = metric.rpartition("/")
    if metric == "loss_fm":
        return "flow-matching loss"
    if group == "validation" and name.startswith("fd_"):
        return f"Fréchet distance ({name.removeprefix('fd_')})"
    if group == "reward":
        return f"{name.replace('_', ' ')} reward"
    return metric.replace("_", " ").replace("/", ": ")


COST_WORDS = {"steps": "training steps", "seconds": "training time", "flops": "training compute"}


def scale_of(axis: str, largest: float) -> tuple[float, str]:
    """The divisor for a cost, and the label of its axis.

    Args:
        axis: `steps`, `seconds` or `flops`.
        largest: the largest cost that is shown.
    """
    if axis == "steps":
        return 1.0, COST_WORDS["steps"]
    if axis == "seconds":
        for size, unit in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
            if largest >= 3 * size:
                return size, f"training time ({unit})"
        return 1.0, "training time (seconds)"
    size, unit = flop_unit(largest)
    return size, f"training compute ({unit})"


def logarithmic_quality(axes):
    """Makes the y axis logarithmic, with labels at 1, 2 and 5 times each power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(9, 9)))
    axes.yaxis.set_minor_formatter("")


def curves(arms: list[dict], axis: str, metric: str, target: tuple[float, str] | None, theme: str) -> Figure:
    """Plots quality against a cost: the mean over seeds with markers at evaluations, and a band of one standard deviation.

    Args:
        arms: the arms of the report, with `name`, `n`, `curve` (`mean`, `std` and the costs), and `runs`, which are drawn
            one by one if they share no evaluated step.
        axis: the cost: `steps`, `seconds` or `flops`.
        metric: the name of the metric in `metrics.jsonl`.
        target: the value at which a horizontal line is drawn, and its name; or None.
        theme: `light` or `dark`.
    """
    longest = max([len(f"{arm['name']} (n = {arm['n']})") for arm in arms] + [len(target[1]) if target else 0])
    columns = 1 if longest > 30 else 2 if longest > 17 else 3
    rows = math.ceil((len(arms) + (target is not None)) / columns)
    figure = Figure(figsize=(5.2, 3.7 + 0.21 * rows), layout="constrained")
    axes = figure.subplots()
    shown = [
        value for arm in arms for value in arm["curve"]["mean"] or sum((run["values"] for run in arm["runs"]), [])
    ]
    shown += [target[0]] if target else []
    # Fréchet distances and losses fall by large factors early on.
    logarithmic = min(shown) > 0 and max(shown) > 4 * min(shown)
    size, label = scale_of(axis, max(max(run[axis]) for arm in arms for run in arm["runs"]))
    for i, arm in enumerate(arms):
        look = {"color": COLORS[theme][i % 7], "linestyle": LINES[i % 4], "marker": MARKERS[i % 5]}
        look |= {"linewidth": 1.8, "markersize": 4.5}
        name, curve = f"{arm['name']} (n = {arm['n']})", arm["curve"]
        if not curve["steps"]:
            for j, run in enumerate(arm["runs"]):
                axes.plot(np.array(run[axis]) / size, run["values"], label=None if j else name, **look)
            continue
        x, mean = np.array(curve[axis]) / size, np.array(curve["mean"])
        axes.plot(x, mean, label=name, markevery=max(1, len(x) // 15), **look)
        if curve["std"]:
            std = np.array(curve["std"])
            # A logarithmic axis has no values below zero, so the band ends at half the mean there.
            below = np.where(logarithmic & (std >= mean), mean / 2, mean - std)
            axes.fill_between(x, below, mean + std, color=look["color"], alpha=0.2, linewidth=0)
            if len(x) == 1:
                axes.errorbar(x, mean, [mean - below, std], color=look["color"], capsize=4)
    if target is not None:
        axes.axhline(target[0], color=THEMES[theme]["ink"], linewidth=1, linestyle=(0, (1, 2)), label=target[1])
    if logarithmic:
        logarithmic_quality(axes)
    axes.set_xlim(left=0)
    axes.set_title(f"by {COST_WORDS[axis]}", fontsize=11.5, fontweight="bold", loc="left")
    axes.set_xlabel(label)
    axes.set_ylabel(metric_label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=axis == "steps"))
    if axis == "steps":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=9.5, handlelength=3.2)
    return figure


def final_values(arms: list[dict], metric: str, theme: str) -> Figure:
    """Plots the last value of each arm: mean and standard deviation over seeds, and the value of each seed as a ring."""
    figure = Figure(figsize=(5.2, 1.2 + 0.42 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for i, arm in enumerate(arms):
        color = COLORS[theme][i % 7]
        std = arm["final"]["std"]
        axes.errorbar(
            arm["final"]["mean"], i, xerr=std, fmt=MARKERS[i % 5], color=color, capsize=4 if std else 0, markersize=6
        )
        axes.plot(
            arm["final"]["values"],
            [i + 0.22] * len(arm["final"]["values"]),
            "o",
            color=color,
            mfc="none",
            markersize=4,
        )
    axes.set_yticks(range(len(arms)), [f"{arm['name']} (n = {arm['n']})" for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_title("at the last evaluation", fontsize=11.5, fontweight="bold", loc="left")
    figure.supxlabel(metric_label(metric), fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure


def as_bytes(figure: Figure, kind: str) -> bytes:
    """The figure as a `png` or `svg` file."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {}
    figure.savefig(buffer, format=kind, dpi=160, metadata=metadata)
    return buffer.getvalue()


def draw(plot, *arguments, theme: str, kinds: tuple[str, ...]) -> dict[str, bytes]:
    """Calls `plot(*arguments, theme)` and returns the figure as files, by their kinds `png` and `svg`."""
    with matplotlib.rc_context(style(theme)):
        figure = plot(*arguments, theme)
        return {kind: as_bytes(figure, kind) for kind in kinds}
