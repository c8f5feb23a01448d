"""Data set names on the Hub: what a user reads when one cannot be had, asked of a small local server over HTTP."""

import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Every data set of the user `gated` is gated, and there is nothing else."""

    def do_GET(self):
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def train(endpoint, tmp_path, name, vae="none", *more) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT / "src")}
    options = [
        "--dataset_name",
        name,
        "--vae",
        vae,
        "--objective",
        "none",
        "--output_dir",
        str(tmp_path / "run"),
        *more,
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_vrpo.py"), *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def test_gated_and_unknown_data_sets(endpoint, tmp_path):
    assert train(endpoint, tmp_path, "gated/imagenet") == (
        "train_vrpo.py: error: --dataset_name gated/imagenet: it is gated; accept its terms at "
        "https://huggingface.co/datasets/gated/imagenet and run `hf auth login` (or set HF_TOKEN)"
    )
    assert "--dataset_name no/such-data: it is neither a folder here nor known to the Hub" in train(
        endpoint, tmp_path, "no/such-data"
    )


def test_a_gated_autoencoder(endpoint, tmp_path):
    message = train(endpoint, tmp_path, "digits", vae="gated/vae")
    assert "--vae gated/vae: it is gated; accept its terms at https://huggingface.co/gated/vae" in message


def test_hub_out_of_reach(tmp_path):
    message = train("http://127.0.0.1:9", tmp_path, "some/data")
    assert (
        "--dataset_name some/data: it is neither a folder here nor in the cache, and the Hub cannot be reached"
        in message
    )


def test_gated_and_unknown_weights_to_start_from(endpoint, tmp_path):
    for name, problem in (
        ("gated/sit", "it is gated; accept its terms"),
        ("no/sit", "neither a folder here nor known"),
    ):
        error = train(
            endpoint, tmp_path, "digits", "none", "--pretrained_model_name_or_path", name, "--resolution", "8"
        )
        assert f"error: --pretrained_model_name_or_path {name}: " in error and problem in error
