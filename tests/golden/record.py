# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Writes the golden records: `python tests/golden/record.py [help] [recipes] [runs] [NAME OF A RUN ...] [folders]`.

Without names everything but `folders`, which are of version 0.1 and are not made by later versions.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
import rows


def compact(value, depth: int) -> str:
    """JSON with a line for each entry down to `depth`, and each deeper one on the line of what holds it."""

    def write(value, depth, indent):
        if depth == 0 or not isinstance(value, dict) or not value:
            return json.dumps(value)
        space = " " * (indent + 1)
        lines = [f"{space}{json.dumps(key)}: {write(each, depth - 1, indent + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{' ' * indent}}}"

    return write(value, depth, 0) + "\n"


def record_runs(names: list[str]):
    """Runs rows and puts them into runs.json, beside those that are there from the same conditions."""
    file = rows.GOLDEN / "runs.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    runs = known["runs"] if known.get("conditions") == rows.conditions() else {}
    for name in names:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = rows.run_row(name, Path(folder))
        tensors = runs[name]["tensors"]
        if tensors.get("average") == tensors["pipeline"]:
            tensors["average"] = "pipeline"  # is not written down twice
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
    ordered = {name: runs[name] for name in rows.ROWS if name in runs}
    file.write_text(compact({"conditions": rows.conditions(), "runs": ordered}, 5))


def record_folders():
    """Trains 20 steps; keeps the run as it was after 10 of them, its pipeline, and numbers of the rest."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "model.json").write_text(json.dumps(rows.MODEL))
        rows.train(rows.to_argv(rows.RESUMED), folder)
        run = folder / "run"
        record = {"conditions": rows.conditions(), **rows.read_run(run, 20)}
        record["metrics"] = {name: values[10:] for name, values in record["metrics"].items()}

        pipeline = rows.FOLDERS / "pipeline"
        shutil.rmtree(pipeline, ignore_errors=True)
        pipeline.mkdir(parents=True)
        shutil.copy(run / "model_index.json", pipeline)
        for part in ("transformer", "scheduler"):
            # Without the copy of its class, which those read who have not installed the package.
            shutil.copytree(run / part, pipeline / part, ignore=shutil.ignore_patterns("*.py"))
        record["images"] = [round(float(value), 7) for value in rows.sample(pipeline).flatten()]

        stopped = rows.FOLDERS / "training"
        shutil.rmtree(stopped, ignore_errors=True)
        (stopped / "run").mkdir(parents=True)
        shutil.copy(folder / "model.json", stopped)
        for name in ("train_config.yaml", "starts.jsonl"):
            shutil.copy(run / name, stopped / "run")
        shutil.copytree(run / "checkpoint-10", stopped / "run" / "checkpoint-10")
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= 10]
        (stopped / "run" / "metrics.jsonl").write_text("".join(kept))
    (rows.GOLDEN / "folders.json").write_text(compact(record, 3))


def main(names: list[str]):
    names = names or ["help", "recipes", "runs"]
    if unknown := set(names) - {"help", "recipes", "runs", "folders", *rows.ROWS}:
        sys.exit(f"record.py: error: {', '.join(sorted(unknown))}: no such record; runs are {', '.join(rows.ROWS)}")
    if "help" in names:
        commands = {name: rows.describe_command(name) for name in rows.COMMANDS}
        (rows.GOLDEN / "help.json").write_text(compact(commands, 3))
    if "recipes" in names:
        recipes = {name: rows.parse_recipe(name) for name in rows.recipe_names()}
        (rows.GOLDEN / "recipes.json").write_text(compact(recipes, 2))
    if "folders" in names:
        record_folders()
    if runs := [name for name in rows.ROWS if "runs" in names or name in names]:
        record_runs(runs)


if __name__ == "__main__":
    main(sys.argv[1:])
