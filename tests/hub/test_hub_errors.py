# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Names on the Hub: what a user reads when one cannot be had, asked of a small local server over HTTP."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.hub_server import Hub, serve
from support.paths import ROOT, SRC, TRAINING_SCRIPT


# Each asks a process that imports everything.
pytestmark = pytest.mark.slow

OPTIONS = ["--objective", "none", "--output_dir", "run", "--resolution", "8"]
CASES = {
    "gated data": ["--dataset_name", "gated/imagenet", "--vae", "none"],
    "unknown data": ["--dataset_name", "no/such-data", "--vae", "none"],
    "gated vae": ["--dataset_name", "digits", "--vae", "gated/vae"],
    "gated weights": ["--dataset_name", "digits", "--vae", "none", "--pretrained_model_name_or_path", "gated/sit"],
    "unknown weights": ["--dataset_name", "digits", "--vae", "none", "--pretrained_model_name_or_path", "no/sit"],
}
# One process for all: most of the time goes into imports.
ALL_CASES = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train_vrpo
from diffusers_vrpo.errors import InputError
for name, options in json.loads(sys.argv[2]).items():
    try:
        train_vrpo.main(train_vrpo.parse_args(options))
    except InputError as error:
        print(json.dumps([name, str(error)]))
"""


def run(hub: Hub, folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = hub.environment(folder / "home") | {"PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, cwd=folder)


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("errors")
    cases = {name: [*options, *OPTIONS] for name, options in CASES.items()}
    with serve() as hub:  # everything of the user `gated` is gated, and there is nothing else
        done = run(hub, folder, "-c", ALL_CASES, str(ROOT), json.dumps(cases))
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_gated_and_unknown_data_sets(messages):
    assert messages["gated data"] == (
        "`dataset_name` gated/imagenet: it is gated; accept its terms at "
        "https://huggingface.co/datasets/gated/imagenet and run `hf auth login` (or set HF_TOKEN)"
    )
    unknown = "`dataset_name` no/such-data: it is neither a folder here nor known to the Hub"
    assert messages["unknown data"].startswith(unknown)


def test_a_gated_autoencoder(messages):
    terms = "`vae` gated/vae: it is gated; accept its terms at https://huggingface.co/gated/vae"
    assert messages["gated vae"].startswith(terms)


def test_gated_and_unknown_weights_to_start_from(messages):
    for case, problem in (
        ("gated weights", "`pretrained_model_name_or_path` gated/sit: it is gated; accept its terms"),
        ("unknown weights", "`pretrained_model_name_or_path` no/sit: it is neither a folder here nor known"),
    ):
        assert messages[case].startswith(problem)


def test_hub_out_of_reach(tmp_path):
    hub = Hub()
    hub.url = "http://127.0.0.1:9"
    done = run(hub, tmp_path, str(TRAINING_SCRIPT), "--dataset_name", "some/data", "--vae", "none", *OPTIONS)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "train_vrpo.py: error: --dataset_name some/data: it is neither a folder here nor in the cache, and the Hub cannot "
            "be reached"
        )
    )
