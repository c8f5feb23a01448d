# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Compare training runs: quality against steps, training time and FLOPs, with the spread over seeds.

    vrpo report outputs/repa-0 outputs/repa-1 outputs/vrpo-0 outputs/vrpo-1 --baseline repa
    vrpo report --arms ours=outputs/vrpo-0,outputs/vrpo-1 repa=outputs/repa-0 --metric loss_fm

Runs that differ only in the seed form one arm; the report shows its mean and standard deviation. The folder
`--output_dir` then has `report.html` (a self-contained file), `report.json` with every number, and the plots as PNG and
SVG. docs/report.md explains how each number is computed.
"""

import argparse
import base64
import contextlib
import html
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from ..command_line import OneLineErrorParser, number_in, one_line_errors
from ..config import FINITE
from ..errors import InputError
from ..files import open_image, write_atomically
from ..reporting.figures import COST_WORDS, curves, draw, final_values, flop_unit, metric_label
from ..reporting.runs import COSTS, Run, choose_metric, compare, group_runs
from ..schemas import read_object
from ..training.output_dir import check_writable, prepare_output_dir, writing_result


# If these options and the seed are equal, `validation.draw_samples` uses the same noise at each position of the grid.
NOISE = ["num_validation_images", "validation_labels", "resolution", "vae"]


# ----------------------------------------------------------------------------------------------------------------------
# Words


def number(value: float | None, std: float | None = None) -> str:
    """Formats a number as `12.34 ± 0.21`, with two digits of the standard deviation; without one, with four digits."""
    if value is None:
        return "–"
    if not std:
        return f"{value:.4g}" + ("" if std is None else " ± 0")
    digits = min(8, max(0, 1 - math.floor(math.log10(abs(std)))))
    return f"{value:.{digits}f} ± {std:.{digits}f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 4 * 86400 else f"{seconds / 86400:.1f} days"


def flop_count(flops: float) -> str:
    size, unit = flop_unit(flops)
    return f"{flops / size:.3g} {unit}"


def cost_text(cost: str, value: float) -> str:
    return {"steps": lambda x: f"{x:,.0f}", "seconds": duration, "flops": flop_count}[cost](value)


def percent(share: float, std: float | None = None) -> str:
    digits = 0 if std is None or std >= 0.01 else 1
    return f"{100 * share:.{digits}f}" + (f" ± {100 * std:.{digits}f}" if std is not None else "") + " %"


def listing(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def spent_text(record: dict, result: dict, costs: list[str]) -> str:
    """Formats the cost until an arm reaches the target: the mean over seeds if all reach it, else that of its mean curve."""
    whole, base = record["reached"] == record["n"], result["baseline"]
    parts = []
    for cost in costs:
        numbers = record[cost]
        if result["reference"]:
            share = (numbers["share"], numbers["share_std"]) if whole else (numbers["share_of_mean_curve"],)
            whose = "its" if parts else f"{base}'s"
            parts.append(f"{percent(*share)} of {whose} {COSTS[cost]}{' for it' if result['given'] else ''}")
        else:
            spent = float(np.mean(numbers["seeds"])) if whole else numbers["mean_curve"]
            parts.append(cost_text(cost, spent) + (" steps" if cost == "steps" else ""))
    return ("at most " if record["at_first_evaluation"] else "") + listing(parts)


def speed_up_sentences(report: dict) -> list[str]:
    """One sentence per arm, or two if its curve is not monotone."""
    result, metric, costs = report["speed_up"], report["metric"], report["costs"]
    base, goal = result["baseline"], number(result["target"])
    aim = f"{metric} {goal}" if result["given"] else f"the last {metric} of {base} ({goal})"
    sentences = []
    for record in result["arms"]:
        name, n, reached = record["arm"], record["n"], record["reached"]
        mean_reaches = record["steps"]["mean_curve"] is not None
        if name == base:
            name += " itself (as a control)"
        if reached == n:
            seeds = "one seed" if n == 1 else f"all {n} seeds, ± their standard deviation"
            sentences.append(f"{name} reaches {aim} in {spent_text(record, result, costs)} ({seeds}).")
        elif mean_reaches:
            spent = spent_text(record, result, costs)
            sentences.append(f"{name}: {reached} of {n} seeds reach {aim}; their mean reaches it in {spent}.")
        elif reached:
            sentences.append(f"{name}: {reached} of {n} seeds reach {aim}; their mean does not.")
        else:
            sentences.append(f"{name} does not reach {aim}.")
        if record["worse_again"]:
            sentences[-1] += " That is where it first does; a later evaluation is worse again."
    return sentences


def speed_up_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of speed-ups: shares of the reference, and factors between first crossings."""
    costs, head = report["costs"], ["arm", "seeds that reach it"]
    head += [f"{COSTS[c]}, % of the baseline's" for c in costs] + [f"{COSTS[c]}, first to first" for c in costs]
    rows = []
    for record in report["speed_up"]["arms"]:
        row = [record["arm"], f"{record['reached']} of {record['n']}"]
        bound = "≤ " if record["at_first_evaluation"] else ""
        for cost in costs:
            numbers = record[cost]
            if numbers["share"] is not None:
                row.append(bound + percent(numbers["share"], numbers["share_std"]))
            elif numbers["share_of_mean_curve"] is not None:
                row.append(f"{bound}{percent(numbers['share_of_mean_curve'])} (the mean)")
            else:
                row.append("does not reach")
        factors = [record[cost]["factor_first_to_first"] for cost in costs]
        rows.append(row + [f"{factor:.2f} x" if factor else "–" for factor in factors])
    return head, rows


def main_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of arms."""
    base, costs = report["baseline"], report["costs"]
    head = [
        "arm",
        "seeds",
        "steps",
        "training time",
        "FLOPs",
        f"last {metric_label(report['metric'])}",
        "best (of the mean)",
    ]
    head += [f"against {base}", "in std over seeds"] if base else []
    rows = []
    for arm in report["arms"]:
        final = arm["final"]
        row = [arm["name"], f"{arm['n']} ({', '.join(map(str, arm['seeds']))})"]
        row.append("–" if final["step"] is None else f"{final['step']:,}")
        row += [cost_text(c, final[c]["mean"]) if c in costs else "not logged" for c in ("seconds", "flops")]
        row.append(number(final["mean"], final["std"]))
        row.append(f"{number(arm['best']['value'])} at {arm['best']['step']:,}" if arm["best"] else "–")
        if base:
            gap = arm.get("difference")
            row.append("–" if gap is None else f"{gap['value']:+.4g} at {gap['step']:,}")
            row.append("–" if gap is None or gap["in_std"] is None else f"{gap['in_std']:+.1f}")
        rows.append(row)
    return head, rows


def hardware_table(report: dict) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table of models and hardware, from `starts.jsonl`."""
    rows = []
    for arm in report["arms"]:
        sizes = [" / ".join(f"{n / 1e6:.2f} M" for n in arm[k]) for k in ("parameters", "projector_parameters")]
        cells = [*sizes, *(" / ".join(arm[key]) for key in ("precision", "hardware"))]
        rows.append([arm["name"], *(cell or "not logged" for cell in cells)])
    return ["arm", "parameters", "projectors", "precision", "hardware"], rows


# ----------------------------------------------------------------------------------------------------------------------
# Sample grids


def sample_grids(arms: dict[str, list[Run]], warn: Callable[[str], None], most_steps: int = 3) -> dict | None:
    """Collects the sample grids of one run per arm, at up to `most_steps` common steps, beginning with the last step.

    Returns:
        a dictionary of `seeds`, `files` (`{step: {arm: path}}`) and `same_noise`, which is whether each position of the grids
        starts from the same noise; None if the arms have no common step. The noise is a function of the seed and of the
        grid's shape, so runs of the same seed are preferred.
    """
    common = set.intersection(*({run.seed for run in group} for group in arms.values()))
    seed = min(common, default=None)
    chosen = {name: next((r for r in group if r.seed == seed), group[0]) for name, group in arms.items()}
    grids = {
        name: {int(path.stem[5:]): path for path in run.folder.glob("samples/step-*.png") if path.stem[5:].isdigit()}
        for name, run in chosen.items()
    }
    steps = sorted(set.intersection(*(set(files) for files in grids.values())))
    if not steps:
        if any(grids.values()) and len(grids) > 1:
            warn("the arms have no sample grid of the same step")
        return None
    steps = steps[:: -math.ceil(len(steps) / most_steps)]
    settings = {tuple(str(run.options.get(name)) for name in NOISE) for run in chosen.values()}
    same = seed is not None and len(settings) == 1
    if not same:
        why = "no seed that all arms have" if seed is None else f"different {', '.join(NOISE)}"
        warn(f"the sample grids have {why}, so they do not start from the same noise")
    return {
        "seeds": {name: run.seed for name, run in chosen.items()},
        "same_noise": same,
        "files": {step: {name: files[step] for name, files in grids.items()} for step in steps},
    }


def small_image(path: Path, widest: int = 1320) -> str | None:
    """Encodes a picture as a data URI, or a large one as a JPEG of at most `widest` pixels in width.

    Returns None if the picture is damaged or huge.
    """
    if (
        path.is_symlink() or not path.is_file()
    ):  # in somebody else's folder, a link could show a private file, a pipe block
        return None
    try:
        data = path.read_bytes()
        with open_image(io.BytesIO(data)) as image:
            image.load()
            if image.width <= widest and len(data) < 400_000:
                return data_uri(data, "png")
            image.thumbnail((widest, 4 * widest), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="jpeg", quality=88)
    except (OSError, SyntaxError, ValueError):  # Pillow raises SyntaxError for some broken PNGs
        return None
    return data_uri(buffer.getvalue(), "jpeg")


# ----------------------------------------------------------------------------------------------------------------------
# Page


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def html_table(head: list[str], rows: list[list[str]]) -> str:
    def cells(tag: str, row: list[str]) -> str:
        classes = ("" if len(cell) < 36 else ' class="long"' for cell in row)
        return "<tr>" + "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for c, cell in zip(classes, row)) + "</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return f'<div class="wide"><table><thead>{cells("th", head)}</thead>\n<tbody>{body}</tbody></table></div>'


def html_plot(light: bytes, dark: bytes, alt: str) -> str:
    return (
        f'<figure><img class="light" src="{data_uri(light, "svg+xml")}" alt="{html.escape(alt)}">'
        f'<img class="dark" src="{data_uri(dark, "svg+xml")}" alt="{html.escape(alt)}"></figure>'
    )


def html_grids(grids: dict, warn: Callable[[str], None]) -> str:
    parts = []
    for step, files in grids["files"].items():
        figures = []
        for name, path in files.items():
            if (uri := small_image(path)) is None:
                warn(f"{path} is damaged and is not shown")
                continue
            caption = html.escape(f"{name}, seed {grids['seeds'][name]}")
            figures.append(
                f'<figure><img src="{uri}" alt="samples of {caption} at step {step}"><figcaption>{caption}</figcaption></figure>'
            )
        parts.append(f'<h3>Step {step:,}</h3>\n<div class="figures">{"".join(figures)}</div>')
    return "\n".join(parts)


def first_sentence(report: dict) -> str:
    """Says in one sentence what the page shows."""
    label, costs = metric_label(report["metric"]), listing([COST_WORDS[cost] for cost in report["costs"]])
    direction = "higher is better" if report["higher_is_better"] else "lower is better"
    count, kinds = sum(arm["n"] for arm in report["arms"]), len(report["arms"])
    runs = "one training run" if count == 1 else f"{count} training runs"
    what = f"shows {runs}" if kinds == 1 else f"compares {runs} of {kinds} kinds"
    return f"This page {what} by {'its' if count == 1 else 'their'} {label}, where {direction}, against {costs}."


def page(report: dict, plots: list[str], grids: str) -> str:
    """Renders `report.html`."""
    metric, label = report["metric"], metric_label(report["metric"])
    names = listing([arm["name"] for arm in report["arms"]])
    title = f"Training runs: {names}"
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(first_sentence(report))}</p>"]
    several = any(arm["n"] > 1 for arm in report["arms"])
    about_arms = " An arm consists of the runs that differ only in the seed; curves are their mean." if several else ""
    parts.append(
        f'<p class="faint">The metric is <code>{html.escape(metric)}</code> in metrics.jsonl.{about_arms}</p>'
    )
    if report["warnings"]:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in report["warnings"])
        parts.append(f'<div class="warnings"><strong>To keep in mind</strong><ul>{items}</ul></div>')
    if report["sentences"]:
        parts.append("<h2>Speed-up</h2>")
        parts += [f"<p>{html.escape(text.replace(metric, label))}</p>" for text in report["sentences"]]
    if report["speed_up"] and report["speed_up"]["reference"]:
        parts.append(html_table(*speed_up_table(report)))
        parts.append(
            '<p class="faint">Quality is interpolated linearly between evaluations. The last columns compare like with like: '
            "the cost until the baseline's mean first reaches the target, divided by the cost until the arm's mean does.</p>"
        )
    parts.append(
        f'<h2>{html.escape(label[0].upper() + label[1:])} against cost</h2>\n<div class="figures">{"".join(plots)}</div>'
    )
    parts.append(
        '<p class="faint">Lines are means over seeds, bands are one standard deviation, and markers are evaluations (if there are many, '
        "only some of them). Training time does not include checkpoints, sample grids and evaluations. FLOPs are those of "
        "transformer, projectors and encoders on all devices, without autoencoder, losses and optimizer.</p>"
    )
    parts.append("<h2>Arms</h2>")
    parts.append(html_table(*main_table(report)))
    parts.append(html_table(*hardware_table(report)))
    if report["options"]:
        parts.append("<h2>What differs</h2>")
        arms = [arm["name"] for arm in report["arms"]]
        rows = [[name, *(value or "not set" for value in values)] for name, values in report["options"].items()]
        if len(rows) < len(arms):  # transpose if that is narrower
            names, *rows = [list(column) for column in zip(*rows, strict=True)]
            parts.append(html_table(["arm", *names], [[arm, *row] for arm, row in zip(arms, rows)]))
        else:
            parts.append(html_table(["option", *arms], rows))
    if grids:
        noise = "start from the same noise" if report["grids"]["same_noise"] else "do not start from the same noise"
        parts.append(
            f'<h2>Samples</h2>\n<p class="faint">Each grid is of one run per arm; images at the same place {noise}.</p>\n{grids}'
        )
    parts.append("<h2>Runs</h2>")
    rows = [[a["name"], str(r["seed"]), f"{r['steps'][-1]:,}", r["folder"]] for a in report["arms"] for r in a["runs"]]
    parts.append(html_table(["arm", "seed", "last evaluation", "folder"], rows))
    template = Template(
        Path(__file__).parents[1].joinpath("reporting", "report_template.html").read_text(encoding="utf-8")
    )
    return template.substitute(title=html.escape(title), body="\n".join(parts))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="output folders of `vrpo train`")
    parser.add_argument(
        "--arms",
        nargs="+",
        action="extend",
        metavar="NAME=DIR,DIR",
        help="treat these runs as one arm called NAME; if not given, runs that differ only in the seed form an arm",
    )
    parser.add_argument(
        "--metric",
        default="fd",
        help="column of metrics.jsonl to compare, named in full or by the beginning of its part after the last slash",
    )
    parser.add_argument(
        "--higher_is_better",
        action="store_true",
        help="treat higher values of the metric as better, instead of lower ones",
    )
    parser.add_argument(
        "--baseline",
        metavar="ARM",
        help="arm with which the others are compared (an arm is a group of runs that differ only in the seed, or NAME of --arms)",
    )
    parser.add_argument(
        "--target",
        type=number_in(FINITE, float),
        help="value of the metric for which the report computes what each arm needs to reach it; if not given, the last value of "
        "the baseline",
    )
    parser.add_argument("--output_dir", default="report", help="folder to which the report is written")
    return parser


def collect(args: argparse.Namespace) -> tuple[dict, dict | None]:
    """Computes the content of `report.json`, and collects the `sample_grids`, for the options of the command.

    Raises:
        InputError: if a folder, metric or arm does not exist.
    """
    warnings: list[str] = []
    arms = group_runs(args.runs, args.arms or [], warnings.append)
    if args.baseline is not None and args.baseline not in arms:
        raise InputError("baseline", f"`baseline` {args.baseline} is not one of the arms; they are {', '.join(arms)}")
    metric = choose_metric([run for group in arms.values() for run in group], args.metric)
    report = compare(arms, metric, args.higher_is_better, args.baseline, args.target, warnings.append)
    grids = sample_grids(arms, warnings.append)
    report["grids"] = grids and {name: grids[name] for name in ("seeds", "same_noise")} | {
        "steps": list(grids["files"])
    }
    report["sentences"] = speed_up_sentences(report) if report["speed_up"] else []
    return report | {"warnings": warnings}, grids


def write_report(report: dict, grids: dict | None, output_dir: Path):
    """Writes the results of `collect`: the plots, `report.json` and `report.html`.

    Raises:
        InputError: if a file cannot be written, or would replace one that is not of a report.
    """
    metric, speed_up, goal = report["metric"], report["speed_up"], None
    if speed_up:
        goal = (speed_up["target"], "target" if speed_up["given"] else f"last value of {report['baseline']}")
    names = {"steps": "steps", "seconds": "time", "flops": "flops"}
    plots = {f"quality_vs_{names[cost]}": (curves, report["arms"], cost, metric, goal) for cost in report["costs"]}
    plots["final"] = (final_values, report["arms"], metric)
    inline, files = [], {}
    for name, (plot, *arguments) in plots.items():
        light = draw(plot, *arguments, theme="light", kinds=("png", "svg"))
        dark = draw(plot, *arguments, theme="dark", kinds=("svg",))
        files |= {f"{name}.{kind}": data for kind, data in light.items()}
        inline.append(html_plot(light["svg"], dark["svg"], f"{metric_label(metric)}: {name.replace('_', ' ')}"))
    pictures = html_grids(grids, report["warnings"].append) if grids else ""
    files["report.html"] = page(report, inline, pictures).encode()
    # This file is written first, because it marks the other files as those of a report.
    files = {"report.json": json.dumps(report, indent=1, allow_nan=False).encode()} | files
    refuse_other_files(output_dir, files)
    with writing_result("output_dir", output_dir):
        for name, data in files.items():
            write_atomically(output_dir / name, data)


def refuse_other_files(output_dir: Path, names: Iterable[str]):
    """Checks that a report would not replace files of the same names that are not a report's.

    Raises:
        InputError: if it would.
    """
    with contextlib.suppress(OSError, ValueError):
        read_object(output_dir / "report.json", {"metric": str, "arms": list, "warnings": list})
        return
    if found := [name for name in names if os.path.lexists(output_dir / name)]:
        raise InputError(
            "output_dir",
            f"`output_dir` {output_dir} holds {', '.join(found[:3])}, not written by `vrpo report`; choose another folder",
        )


def main(argv: list[str] | None = None, prog: str = "vrpo report"):
    """Runs the command; `prog` is its name in errors."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        check_writable("output_dir", "`output_dir`", args.output_dir)
        report, grids = collect(args)
        write_report(report, grids, prepare_output_dir(args.output_dir))
    for text in report["warnings"]:
        print(f"warning: {text}", file=sys.stderr)
    for arm in report["arms"]:
        final = arm["final"]
        print(
            f"{arm['name']} (n = {arm['n']}): {report['metric']} {number(final['mean'], final['std'])} at step {final['step']}"
        )
    print(
        "\n".join([*report["sentences"], f"wrote {Path(args.output_dir) / 'report.html'}, report.json and the plots"])
    )


if __name__ == "__main__":
    main()
