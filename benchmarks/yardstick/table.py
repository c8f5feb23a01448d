#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Make the table and the plots of a yardstick from its results file.

    python benchmarks/yardstick/table.py cpu
    python benchmarks/yardstick/table.py fork --against repa-4 --seeds 1 2 3 4

The command prints the table and writes it, `report.html` and the plots (quality against steps, time and FLOPs; last values) to
`outputs/yardstick/SIZE/report`. Seconds are nominal: they are steps times the seconds per step that `timing.py` measured,
because runs at the same time slow one another down. The results file also has the seconds that were spent.

`--against ARM` prints two other tables: the means over the given seeds with their standard errors, and the differences to this
arm for each seed, with a two-sided t-test.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from differences import difference, with_error
from recipe import choose_arms, equal_compute, load_recipe, recipe_hash
from run import read_results
from timing import read_timing
from training_run import add_common_options, resolve_folders

from diffusers_vrpo.command_line import OneLineErrorParser
from diffusers_vrpo.commands import report
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.reporting.runs import spread


COLUMNS = {
    "fd_train": "FD, training images",
    "fd_validation": "FD, validation images",
    "recall": "recall",
    "coverage": "coverage",
    "sliced_wasserstein_train": "sliced Wasserstein",
    "hog_train": "FD, gradients",
    "plain_train": "FD, gradients, colours, frequencies",
    "kid_train": "KID",
    "probe_accuracy": "probe",
}

# The measures that `--against` shows, and their numbers of decimals.
MEASURES = {
    "hog_train": ("gradients", 4),
    "fd_train": ("judge", 1),
    "colour_train": ("colours", 3),
    "dct_train": ("frequencies", 3),
    "sliced_wasserstein_train": ("sliced Wasserstein", 4),
    "kid_train": ("KID", 3),
    "coverage": ("coverage", 3),
    "probe_accuracy": ("probe", 3),
}


def group_lines(lines: list[dict], hashes: dict[str, str]) -> dict[str, list[dict]]:
    """Groups the lines of the current recipe by arm; each seed counts once."""
    arms = {}
    for name, key in hashes.items():
        found = {line["seed"]: line for line in lines if line["recipe"] == key}
        if found:
            arms[name] = [found[seed] for seed in sorted(found)]
    return arms


def in_std(arm: list[float], base: list[float]) -> float | None:
    """The difference of the means in pooled standard deviations over seeds; None if neither arm has two seeds."""
    freedom = len(arm) + len(base) - 2
    squares = sum((len(values) - 1) * statistics.variance(values) for values in (arm, base) if len(values) > 1)
    pooled = (squares / freedom) ** 0.5 if freedom else 0.0
    return (statistics.mean(arm) - statistics.mean(base)) / pooled if pooled else None


def paired(arm: list[dict], base: list[dict], key: str = "fd_train") -> str:
    """Mean ± standard deviation of the differences for each seed; runs of a seed share weights, samples and noise."""
    other = {line["seed"]: line[key] for line in base}
    differences = [line[key] - other[line["seed"]] for line in arm if line["seed"] in other]
    if len(differences) < 2:
        return f"{differences[0]:+.1f}" if differences else "–"
    return f"{statistics.mean(differences):+.1f} ± {statistics.stdev(differences):.1f}"


def table_rows(arms: dict[str, list[dict]], reference: str) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table: mean ± standard deviation over seeds, and the difference of FD to the reference.

    The difference is given in pooled standard deviations over seeds, and as the differences for each seed.
    """
    head = [
        "arm",
        "seeds",
        "steps",
        "seconds",
        "FLOPs",
        *COLUMNS.values(),
        f"FD against {reference}",
        "in std",
        "seed by seed",
    ]
    rows = []
    for name, lines in arms.items():
        # Lines that earlier versions of the judge wrote lack some measures.
        values = {key: [line[key] for line in lines if key in line] for key in COLUMNS}
        row = [name, str(len(lines)), f"{lines[0]['steps']:,}", f"{lines[0]['nominal_seconds'][-1][1]:.0f}"]
        row.append(report.flop_count(statistics.mean(line["train_flops"] for line in lines)))
        row += [report.number(statistics.mean(each), spread(each)) if each else "–" for each in values.values()]
        if name == reference or reference not in arms:
            row += ["–", "–", "–"]
        else:
            base = [line["fd_train"] for line in arms[reference]]
            gap = in_std(values["fd_train"], base)
            row.append(f"{statistics.mean(values['fd_train']) - statistics.mean(base):+.1f}")
            row.append("–" if gap is None else f"{gap:+.1f}")
            row.append(paired(lines, arms[reference]))
        rows.append(row)
    return head, rows


def tables_against(arms: dict[str, list[dict]], reference: str, seeds: list[int] | None) -> str:
    """Two tables of `MEASURES`: means with their standard errors, and differences to the arm `reference` for each seed.

    Raises:
        InputError: if the arm has none of the seeds.
    """
    runs = {
        name: {line["seed"]: line for line in lines if not seeds or line["seed"] in seeds}
        for name, lines in arms.items()
    }
    runs = {name: of_seeds for name, of_seeds in runs.items() if of_seeds}
    if reference not in runs:
        raise InputError(None, f"--against {reference} has no run with these seeds; {', '.join(runs) or 'no arm'} has")
    titles = [title for title, _ in MEASURES.values()]
    means = [
        [name, str(len(own)), f"{next(iter(own.values()))['steps']:,}"]
        + [with_error([line[key] for line in own.values()], digits) for key, (_, digits) in MEASURES.items()]
        for name, own in runs.items()
    ]
    differences = [
        [name, *(difference(own, runs[reference], key, digits) for key, (_, digits) in MEASURES.items())]
        for name, own in runs.items()
        if name != reference
    ]
    tables = (
        markdown(["arm", "seeds", "steps", *titles], means),
        markdown([f"against {reference}", *titles], differences),
    )
    return "\n".join(tables)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_run(line: dict, folder: Path):
    """Writes a result as the output folder of a run, with nominal seconds, for `diffusers_vrpo.commands.report`."""
    folder.mkdir(parents=True)
    options = line["flags"] | {"seed": line["seed"], "fd_encoder": line["metric"].removeprefix("validation/fd_")}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(options))
    at, seconds = zip(*line["nominal_seconds"])
    rows = [
        {
            "step": step,
            line["metric"]: value,
            "train_seconds": float(np.interp(step, at, seconds)),
            "train_flops": flops,
        }
        for (step, value), flops in zip(line["curve"], line["curve_flops"])
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"step": 0, "hardware": " / ".join(line["hardware"]), "parameters": line["parameters"]}
    (folder / "starts.jsonl").write_text(json.dumps(start | {"projector_parameters": None}) + "\n")


def write_plots(arms: dict[str, list[dict]], reference: str, output_dir: Path) -> list[str]:
    """Writes the report of these results, and returns its sentences about speed-ups."""
    with tempfile.TemporaryDirectory() as temporary:
        chosen = []
        for i, (name, lines) in enumerate(arms.items()):
            folders = [Path(temporary) / str(i) / str(line["seed"]) for line in lines]
            for line, folder in zip(lines, folders):
                write_run(line, folder)
            chosen.append(f"{name}={','.join(map(str, folders))}")
        options = ["--arms", *chosen, "--metric", next(iter(arms.values()))[0]["metric"]]
        options += ["--baseline", reference] if reference in arms else []
        args = report.build_parser("table.py").parse_args(options)
        found, grids = report.collect(args)
        report.write_report(found, grids, output_dir)
    return found["sentences"]


def main(argv: list[str] | None = None):
    parser = OneLineErrorParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser)
    parser.add_argument("--against", metavar="ARM", help="print means, and differences to this arm, instead")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds for --against (default: all)")
    args = parser.parse_args(argv)
    resolve_folders(args)
    if args.seeds and not args.against:
        parser.error("--seeds needs --against ARM")
    recipe = load_recipe(args.size)
    timing, hashes = read_timing(recipe, args.results), {}
    for name, arm in choose_arms(args.arms, recipe).items():
        with contextlib.suppress(InputError):  # an arm that was not timed has no runs
            hashes[name] = recipe_hash(recipe, arm, equal_compute(recipe, arm, name, timing))
    arms = group_lines(read_results(args.results / f"results-{recipe.name}.jsonl"), hashes)
    if not arms:
        raise InputError(
            None, f"results-{recipe.name}.jsonl has no run of this recipe; `run.py {args.size}` makes them"
        )
    if args.against:
        print(tables_against(arms, args.against, args.seeds), end="")
        return
    text = markdown(*table_rows(arms, recipe.reference))
    output_dir = args.work / recipe.name / "report"
    output_dir.mkdir(parents=True, exist_ok=True)
    sentences = write_plots(arms, recipe.reference, output_dir)
    (output_dir / "table.md").write_text(text + "\n" + "\n".join(sentences) + "\n")
    print(text + "\n" + "\n".join(sentences) + f"\nwrote table.md, report.html and the plots to {output_dir}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"table.py: error: {error}")
