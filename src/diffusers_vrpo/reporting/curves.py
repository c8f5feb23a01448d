# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Pictures of a run: sample grids and training curves."""

from pathlib import Path

from ..training.metrics import read_metrics


def plot_metrics(metrics_file: str | Path, output_file: str | Path, title: str = ""):
    """Plots loss, rewards, their shares, weights and std, gradient norm and speed over steps, from a `metrics.jsonl`."""
    # The object interface draws without changing the global backend of matplotlib.
    import matplotlib
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_file)

    def names(prefix: str) -> list[str]:
        return sorted({name for row in rows for name in row if name.startswith(prefix)})

    panels = [
        ("flow-matching loss", ["loss_fm"]),
        *((f"Fréchet distance, {name.removeprefix('validation/fd_')}", [name]) for name in names("validation/fd_")),
        *((name.replace("/", ": "), [name]) for name in names("reward/")),
        ("reward shares s", names("share/")),
        ("image rewards' gradient over flow matching's", names("image_share/")),
        ("raw reward weights ω", names("weight/")),
        ("reward std σ", names("std/")),
        ("cosine of the two gradients, by t", names("cosine/")),
        ("alignment's gradient over flow matching's, by t", names("gradient_ratio/")),
        ("gate, by t", names("gate/")),
        ("distance to the targets", ["alignment_distance", "alignment_distance_slow"]),
        ("alignment coefficient in force", ["alignment_coeff"]),
        ("distance of keys and values to the scaffold's", ["scaffold_distance"]),
        ("spread of a group's rewards", names("spread/")),
        ("clip fraction", ["clip_fraction"]),
        *(
            (f"samples: {name.removeprefix('sample_reward/')}", [name, name.replace("reward/", "reward_real/")])
            for name in names("sample_reward/")
        ),
        ("shares in the samples' advantages", names("sample_share/")),
        ("reward gradient over flow matching's", ["policy/gradient_ratio"]),
        *(
            (f"guard: {name.removeprefix('guard/')}", [name])
            for name in names("guard/")
            if not name.endswith("/start_reward")
        ),
        ("gradient norm", ["grad_norm"]),
        ("images per second", ["images_per_second"]),
    ]
    panels = [(name, keys) for name, keys in panels if any(key in row for row in rows for key in keys)]
    if not panels:
        return
    columns = min(3, len(panels))
    rows_of_panels = -(-len(panels) // columns)
    width, height = 4.6 * columns, 3.2 * rows_of_panels + 0.4
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    # Margins in inches. A layout engine would draw everything twice to find them.
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.2 / width,
        bottom=0.55 / height,
        top=1 - 0.8 / height,
        wspace=0.85 / (width / columns - 1),
        hspace=0.9 / (height / rows_of_panels - 1),
    )
    for axis, (name, keys) in zip(axes, panels):
        shades = [matplotlib.colormaps["viridis"](i / max(1, len(keys) - 1)) for i in range(len(keys))]
        for key, shade in zip(keys, shades):
            points = [(row["step"], row[key]) for row in rows if key in row]
            prefix, _, label = key.rpartition("/")
            label = {"sample_reward": "samples", "sample_reward_real": "real images"}.get(prefix, label)
            color, marker = shade if len(keys) > 4 else None, "o" if len(points) == 1 else None
            axis.plot(*zip(*points), label=label, linewidth=1.5, color=color, marker=marker)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if len(keys) > 1:
            # The lines of the ten bins fill the panel, so their legend is small, in two columns, on a pale background.
            many = len(keys) > 4
            axis.legend(frameon=many, fontsize="x-small" if many else "small", ncols=2 if many else 1, framealpha=0.85)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title)
    figure.savefig(output_file, dpi=120)
