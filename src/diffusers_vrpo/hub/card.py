# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Model cards, which are rendered from the files of a run or pipeline at every push."""

import json
import math
import re
from pathlib import Path

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import Resume, VRPOConfig, checked_value, names_marked, options_of
from ..errors import InputError
from ..files import packaged
from ..markup import code, one_line, quoted, shown
from ..schemas import METRICS_ROW, START_FACTS, merge_steps, read_rows


STAGED = "staged.json"  # holds the step of a checkpoint, in the folder from which it is uploaded
DISTANCE = "validation/fd_"  # the prefix of an encoder's name in `metrics.jsonl`
# Metrics in an evaluation file and in `metrics.jsonl`: their names for readers, and the Hub's names for its results index.
METRIC_NAMES = {
    "fid": ("FID", "fid"),
    "fd": ("FD", "frechet_distance"),
    "sfid": ("sFID", "sfid"),
    "inception_score": ("Inception Score", "inception_score"),
    "kid": ("KID", "kid"),
    "precision": ("Precision", "precision"),
    "recall": ("Recall", "recall"),
    "density": ("Density", "density"),
    "coverage": ("Coverage", "coverage"),
}
OBJECTIVES = {
    "none": "its own loss alone",
    "repi": "REPI's scaffold of encoder features",
    "repa": "REPA's representation alignment",
    "irepa": "iREPA's representation alignment",
    "rare": "RARE's representation alignment",
    "vrpo": "VRPO's reward-weighted representation alignment",
}
# How a card cites the work that an objective builds on; VRPO itself has a paragraph of its own.
CITATIONS = {
    "repa": "alignment: [REPA](https://arxiv.org/abs/2410.06940)",
    "irepa": "alignment: [iREPA](https://arxiv.org/abs/2512.10794), after [REPA](https://arxiv.org/abs/2410.06940)",
    "rare": "alignment: [RARE](https://arxiv.org/abs/2609.34732), after [REPA](https://arxiv.org/abs/2410.06940)",
    "repi": "scaffold: [REPI](https://arxiv.org/abs/2609.35292)",
    "vrpo": "alignment: [REPA](https://arxiv.org/abs/2410.06940)",
}


def is_hub_id(name) -> bool:
    """Whether a name looks like a model or data set on the Hub: `owner/name`."""
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))


def public_name(value, local: list[str] | None = None):
    """An option's value with local paths shortened to their last part.

    Args:
        local: the values that were files or folders on the machine of the run; None checks for them on this machine.
    """
    if isinstance(value, list):
        return [public_name(item, local) for item in value]
    if not isinstance(value, str) or re.fullmatch(r"(SiT|DiT)-\w+/\d+", value, re.IGNORECASE):
        return value
    if is_hub_id(value) and not (Path(value).exists() if local is None else value in local):
        return value
    if "://" in value:
        value = re.split("[?#]", value)[0]  # the rest may be a secret key
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def public_json(value):
    """Applies `public_name` to every string in a JSON value, including keys."""
    if isinstance(value, dict):
        return {public_name(key): public_json(item) for key, item in value.items()}
    return [public_json(item) for item in value] if isinstance(value, list) else public_name(value)


def read_mapping(file: Path) -> dict:
    """Reads the mapping in a JSON or YAML file; returns an empty one if the file cannot be read."""
    if not file.is_file():  # reading a pipe would block
        return {}
    # JSON is not parsed as YAML, which reads 1e-06 as text.
    parse = json.loads if file.suffix == ".json" else yaml.safe_load
    try:
        content = parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def is_finite(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def mapping(value) -> dict:
    """Returns a value from a file if it is a mapping, and an empty mapping otherwise."""
    return value if isinstance(value, dict) else {}


def known_options(given: dict, local: list[str] | None) -> dict:
    """The options in a run's record that a card may show: known ones with an allowed value, without local folders.

    Args:
        given: the content of `train_config.yaml`.
        local: the argument of `public_name`.
    """
    known, private = {}, names_marked(Resume.MACHINE)
    for name, option in options_of(VRPOConfig).items():
        value = given.get(name)
        if value is None or name in private:
            continue
        if option.many and isinstance(value, str):
            value = [value]  # older records have a single value here
        try:
            value = public_name(checked_value(option, value), local)
        except InputError:
            continue
        if option.kind is str:
            value = [one_line(item) for item in value] if option.many else one_line(value)
        known[name] = value
    return known


def known_facts(start: dict) -> dict:
    """The facts of a line of `starts.jsonl` that a card may show; those of a wrong type are dropped."""
    numbers = ("parameters", "projector_parameters", "global_batch_size", "num_processes", "max_train_steps")
    facts = {name: start[name] for name in numbers if is_finite(start.get(name))}
    texts = ("hardware", "mixed_precision", "prediction_type")
    facts |= {name: start[name] for name in texts if isinstance(start.get(name), str)}
    if isinstance(start.get("local"), list):
        facts["local"] = [item for item in start["local"] if isinstance(item, str)]
    return facts | {"adapters_suffice": start.get("adapters_suffice") is True}


def evaluations(folder: Path) -> list[dict]:
    """Reads the `evaluation*.json` of `vrpo evaluate` as rows: metric, value, encoder, samples, reference, file."""
    rows = []
    for file in sorted(folder.glob("evaluation*.json")):
        report = read_mapping(file)
        samples, reference = mapping(report.get("samples")), mapping(report.get("reference"))
        for encoder, values in mapping(report.get("metrics")).items():
            for name, (title, metric) in METRIC_NAMES.items():
                if is_finite(mapping(values).get(name)):
                    rows.append(
                        {
                            "title": title,
                            "metric": metric,
                            "value": values[name],
                            "encoder": public_name(encoder),
                            "samples": samples.get("count"),
                            "reference": public_name(reference.get("source")),
                            "file": file.name,
                        }
                    )
    return rows


def read_run(folder: str | Path) -> dict:
    """Reads the facts about a run or pipeline for the template; facts that no file has are None or empty."""
    folder = Path(folder)
    given = read_mapping(folder / "train_config.yaml")
    rows, starts = (
        read_rows(file, wanted)[0] if (file := folder / name).is_file() else []
        for name, wanted in (("metrics.jsonl", METRICS_ROW), ("starts.jsonl", START_FACTS))
    )
    rows, starts = merge_steps(rows), [known_facts(start) for start in starts]
    start = starts[-1] if starts else {}
    options = known_options(given, start.get("local"))
    # The last finite number of each column with its step, because columns such as validation have separate rows.
    columns = {name: (row["step"], value) for row in rows for name, value in row.items() if is_finite(value)}

    def last(name):
        return columns[name][1] if name in columns else None

    rewards = [name.split("/", 1)[1] for name in columns if name.startswith("reward/")]
    # Image rewards have one more column, and neither std nor weight.
    of_images = [name for name in rewards if f"image_share/{name}" in columns]
    rewards = [name for name in rewards if name not in of_images]
    hardware = [
        f"{number(start.get('num_processes', 1))} × {start['hardware']}" for start in starts if "hardware" in start
    ]
    staged_step = read_mapping(folder / STAGED).get("step")
    objective = options.get("objective")
    return {
        "options": options,
        "objective": objective,
        "objective_in_words": OBJECTIVES.get(objective),
        "transformer": read_mapping(folder / "transformer" / "config.json"),
        "index": read_mapping(folder / "model_index.json"),
        "start": start,
        "hardware": list(dict.fromkeys(hardware)),
        # A staged checkpoint has its own step; the metrics may end earlier.
        "step": staged_step if is_finite(staged_step) else last("step"),
        "max_train_steps": start.get("max_train_steps", options.get("max_train_steps")),
        "samples_seen": last("samples_seen"),
        "train_seconds": last("train_seconds"),
        "train_flops": last("train_flops"),
        "loss": columns.get("loss_fm"),
        "rewards": [
            {"name": name, **{key: last(f"{key}/{name}") for key in ("reward", "std", "weight", "share")}}
            for name in rewards
        ],
        "rewards_step": max((columns[f"reward/{name}"][0] for name in rewards), default=None),
        "image_rewards": [
            {"name": name, "reward": last(f"reward/{name}"), "share": last(f"image_share/{name}")}
            for name in of_images
        ],
        "image_rewards_step": max((columns[f"reward/{name}"][0] for name in of_images), default=None),
        "distances": [
            {"encoder": name.removeprefix(DISTANCE), "step": step, "value": value}
            for name, (step, value) in columns.items()
            if name.startswith(DISTANCE)
        ],
        "evaluations": evaluations(folder),
        "has_samples": (folder / "samples.png").is_file(),
        "has_curves": (folder / "training.png").is_file(),
        "lora_rank": options.get("lora_rank"),
    }


def pushes_adapters_only(run: dict) -> bool:
    """Whether only the adapters of a run are published, because its record of starts says that they suffice."""
    return bool(run["lora_rank"]) and bool(run["start"].get("adapters_suffice"))


def foreign_class(run: dict) -> str | None:
    """The class of a transformer from another package; None for this package's own."""
    name = run["transformer"].get("_class_name")
    known = name in (None, "SiTTransformer2DModel") or not re.fullmatch(r"\w+", str(name))
    return None if known else str(name)


def predicts_noise(run: dict) -> bool:
    """Whether the model predicts noise instead of velocities."""
    preset, said = str(run["options"].get("preset") or ""), run["start"].get("prediction_type")
    return "epsilon" in (run["transformer"].get("prediction_type"), said) or preset.startswith("DiT")


def kind(run: dict) -> str:
    """The architecture's name; a transformer of this package is a DiT if it predicts noise, and a SiT otherwise."""
    if name := foreign_class(run):
        return re.sub(r"(Transformer)?(2D)?Model$", "", name) or name
    return "DiT" if predicts_noise(run) else "SiT"


def card_data(run: dict, repo_id: str, license: str | None) -> ModelCardData:
    """The card's metadata, in the Hub's vocabulary."""
    options, name = run["options"], repo_id.split("/")[-1]
    base, dataset = options.get("pretrained_model_name_or_path"), options.get("dataset_name")
    tags = ["diffusers", "image-generation", "class-conditional", kind(run).lower(), "diffusers-vrpo"]
    tags += ["diffusers-training"] if options else []
    tags += [] if predicts_noise(run) else ["flow-matching"]
    if run["objective"] in OBJECTIVES and run["objective"] != "none":
        tags += [run["objective"], "representation-alignment"]
    tags += ["lora"] if run["lora_rank"] else []
    if license is None and options:  # weights without a record of a run get no default
        license = "other" if base else "apache-2.0"
    known = options.get("dataset_name") or options.get("train_data_dir") or options.get("latents_dir") or "unknown"
    where = {"dataset_type": dataset if is_hub_id(dataset) else "custom", "dataset_name": one_line(known)}
    task = {"task_type": "unconditional-image-generation", "task_name": "Class-conditional image generation"}
    results = [
        EvalResult(
            **task,
            **where,
            metric_type=row["metric"],
            metric_value=row["value"],
            metric_name=one_line(f"{row['title']} ({row['encoder']}, {row['samples']} samples)"),
        )
        for row in run["evaluations"]
    ] + [
        EvalResult(
            **task,
            **where,
            metric_type="frechet_distance",
            metric_value=row["value"],
            metric_name=one_line(f"FD ({row['encoder']}, step {row['step']}, in training)"),
        )
        for row in run["distances"]
    ]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=license and one_line(license),
        base_model=base if is_hub_id(base) else None,
        base_model_relation=("adapter" if run["lora_rank"] else "finetune") if is_hub_id(base) else None,
        datasets=[dataset] if is_hub_id(dataset) else None,
        tags=tags,
        metrics=sorted({row["metric"] for row in run["evaluations"]}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def number(value) -> str:
    """Formats a number for readers: four digits, with commas between thousands."""
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.4g}"


def summary(run: dict) -> str:
    """The card's first sentence."""
    options, config = run["options"], run["transformer"]
    base = options.get("pretrained_model_name_or_path")
    is_unconditional = config.get("num_classes") == 1
    conditional = "unconditional" if is_unconditional else "class-conditional"
    text = f"{conditional.capitalize()} {kind(run)} diffusion transformer"
    if pushes_adapters_only(run):
        link = f"[{shown(base)}](https://huggingface.co/{base})" if is_hub_id(base) else shown(base)
        text = f"Low-rank adapters for {link}, {'an' if is_unconditional else 'a'} {conditional} {kind(run)}"
    if run["start"].get("parameters"):
        text += f" of {number(run['start']['parameters'] / 1e6)} M parameters"
    if is_finite(config.get("num_classes")) and not is_unconditional:
        text += f" with {number(config['num_classes'])} classes"
        if trained := trained_labels(run["index"]):
            text += f" ({number(len(trained))} of which had training images)"
    if options.get("resolution"):
        text += f", images of {options['resolution']}×{options['resolution']} pixels"
    if run["objective"] in OBJECTIVES:
        text += f", trained with {OBJECTIVES[run['objective']]}"
    return text + "."


def trained_labels(index: dict) -> list[int]:
    """The ids of the classes that had images in training; empty if the pipeline's index does not list them."""
    found = index.get("trained_labels")
    return [label for label in found if type(label) is int] if isinstance(found, list) else []


def optimizer(run: dict) -> str:
    """The optimizer's settings, as a line of the table."""
    options, start = run["options"], run["start"]
    name = shown(options.get("optimizer") or "adamw")
    text = f"{'AdamW' if name == 'adamw' else name}, learning rate {options.get('learning_rate')}"
    if start.get("global_batch_size"):
        text += f", {number(start['global_batch_size'])} samples a step"
    if start.get("mixed_precision") not in (None, "no"):
        text += f", {shown(start['mixed_precision'])}"
    if options.get("use_ema"):
        text += f", weights averaged with decay {options.get('ema_decay')}"
    return text


def render_card(folder: str | Path, repo_id: str, license: str | None = None, **extra) -> str:
    """Renders the model card for the folder of a run or pipeline from its files.

    Args:
        folder: a folder with `model_index.json` or `lora/`, and perhaps `train_config.yaml`, `metrics.jsonl`,
            `starts.jsonl`, `samples.png`, `training.png`, `evaluation*.json`.
        repo_id: `owner/name` of the repository.
        license: license of the weights, as the Hub spells it. By default `apache-2.0` for weights trained from scratch,
            `other` for weights that continue others, and none for a pipeline without the record of a run.
        extra: more variables of the template: `recipe`, the command of a card without weights; `measured`, a paragraph;
            `tagged`, whether the repository has tags `step-N`.
    """
    run = read_run(folder)
    options, objective = run["options"], run["objective"]
    labels, trained = mapping(run["index"].get("id2label")), trained_labels(run["index"])
    is_unconditional = run["transformer"].get("num_classes") == 1
    # The example draws a class that had training images.
    first = trained[0] if trained else 0
    named = labels.get(str(first), next(iter(labels.values()), None))
    options_as_yaml = yaml.safe_dump(options).strip()
    base, encoders = options.get("pretrained_model_name_or_path"), options.get("encoder") or []
    run |= {
        "name": repo_id.split("/")[-1],
        "repo_id": repo_id,
        "kind": kind(run),
        "foreign_class": foreign_class(run),
        "predicts_noise": predicts_noise(run),
        "pipeline_class": run["index"].get("_class_name"),
        "summary": summary(run),
        "has_scaffold": objective == "repi" or options.get("scaffold_layer") is not None,
        "citation": CITATIONS.get(objective),
        "optimizer": optimizer(run),
        "adapters_only": pushes_adapters_only(run),
        "base_model": base,
        "encoders": ", ".join([encoders] if isinstance(encoders, str) else encoders),
        "data": options.get("dataset_name") or options.get("train_data_dir") or options.get("latents_dir"),
        "example_label": quoted(str(named).split(",")[0]) if labels else str(first),
        "has_labels": bool(labels),
        "is_unconditional": is_unconditional,
        "example_scale": "1.0" if is_unconditional else "1.5",
        "number": number,
        "options_as_yaml": options_as_yaml,
        # The fence of the code block is longer than any run of backticks inside it.
        "fence": "`" * max([3, *(1 + len(ticks) for ticks in re.findall("`+", options_as_yaml))]),
        "card_data": card_data(run, repo_id, license).to_yaml(),
    }
    template = (packaged("model_cards") / "template.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "code": code, "quoted": quoted}
    card = environment.from_string(template).render(**run | extra)
    # The card is parsed here, so that invalid metadata raise an error before the upload.
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", card).rstrip() + "\n"))
