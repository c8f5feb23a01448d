# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The page of space/: what its buttons do, the running server, and the page in a browser at two sizes."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from diffusers_vrpo import SiTSDEScheduler, VRPOPipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models import ddpm
from diffusers_vrpo.pipelines.sampling import SAMPLERS
from support.models import tiny_model
from support.paths import ROOT


SPACE = ROOT / "space"
NAMES = {0: "goldfish, Carassius auratus", 1: "crane", 2: "crane", 4: "great white shark"}
OPTIONS = {
    "classes": [4, 0],
    "images_per_class": 2,
    "steps": 5,
    "guidance_scale": 2.0,
    "guided_from": 0.2,
    "guided_to": 0.8,
    "sampler": "default",
    "seed": 7,
}


def load_module(name: str):
    spec = importlib.util.spec_from_file_location(f"space_{name}", SPACE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generation = load_module("generation")


def save_pipeline(folder: Path, names=NAMES, **config) -> str:
    is_epsilon = config.get("prediction_type") == "epsilon"
    betas = {key: ddpm.SCHEDULER_CONFIG[key] for key in ("beta_start", "beta_end")}
    scheduler = DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
    scheduler = scheduler if is_epsilon else FlowMatchEulerDiscreteScheduler()
    VRPOPipeline(tiny_model(in_channels=3, **config), scheduler, None, names).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_pipeline(tmp_path_factory.mktemp("app") / "tiny")


@pytest.fixture(scope="module")
def pipeline(folder):
    return generation.open_pipeline(folder)


def generate(pipeline, **changes) -> list:
    """Everything that the generator yields."""
    return list(generation.generate(pipeline, threading.Lock(), **{**OPTIONS, **changes}))


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def direct_call(folder: str, scheduler=None, **changes) -> np.ndarray:
    """The images of OPTIONS by the pipeline itself."""
    pipeline = VRPOPipeline.from_pretrained(folder)
    pipeline.scheduler = scheduler or pipeline.scheduler
    arguments = {"num_inference_steps": 5, "guidance_scale": 2.0, "guidance_interval": (0.2, 0.8), **changes}
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8, 7, 8)]
    return pixels(pipeline([4, 0], num_images_per_label=2, generator=generators, **arguments).images)


# ----------------------------------------------------------------------------------------------------------------------
# What the buttons do


def test_classes_have_names_where_there_are_names(pipeline, tmp_path):
    texts = ["goldfish, Carassius auratus (0)", "crane (1)", "crane (2)", "class 3", "great white shark (4)"]
    assert generation.class_choices(pipeline) == list(zip(texts, range(5)))
    assert [generation.class_name(pipeline, i) for i in (0, 3)] == ["goldfish", "class 3"]
    unnamed = generation.open_pipeline(save_pipeline(tmp_path, names=None))
    assert generation.class_choices(unnamed) == [(f"class {i}", i) for i in range(5)]


@pytest.mark.parametrize("sampler, scheduler", [("default", None), ("sde", SiTSDEScheduler())])
def test_samples_are_those_of_the_pipeline(pipeline, folder, sampler, scheduler):
    *progress, images = generate(pipeline, sampler=sampler)
    assert [(class_id, seed) for _, class_id, seed in images] == [(4, 7), (4, 8), (0, 7), (0, 8)]
    np.testing.assert_array_equal(pixels(image for image, _, _ in images), direct_call(folder, scheduler))
    assert progress == sorted(progress) and all(1 <= step <= of == 5 for step, of in progress)
    other = generate(pipeline, sampler=sampler, seed=8)[-1]
    assert not np.array_equal(other[0][0], images[0][0])


def test_a_caption_is_enough_to_get_an_image_again(pipeline):
    image = generate(pipeline)[-1][1][0]
    (alone, class_id, seed), *_ = generate(pipeline, classes=[4], images_per_class=1, seed=8)[-1]
    assert (class_id, seed) == (4, 8)
    # The batch has another size: sums may be rounded otherwise.
    np.testing.assert_allclose(np.asarray(alone).astype(int), np.asarray(image).astype(int), atol=1)


def test_what_one_user_chooses_does_not_stay_for_the_next(pipeline):
    own, config = pipeline.scheduler, dict(pipeline.scheduler.config)
    first = generate(pipeline)[-1]
    generate(pipeline, sampler="heun", steps=3)
    assert pipeline.scheduler is own and dict(own.config) == config
    np.testing.assert_array_equal(pixels(i[0] for i in generate(pipeline)[-1]), pixels(i[0] for i in first))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_every_sampler_that_is_offered_works(pipeline, tmp_path, kind):
    if kind == "epsilon":
        pipeline = generation.open_pipeline(save_pipeline(tmp_path, prediction_type="epsilon", learn_sigma=True))
    results = [pixels(image for image, _, _ in generate(pipeline, sampler=name)[-1]) for name in SAMPLERS[kind]]
    assert all(images.shape == (4, 8, 8, 3) and images.std() > 0 for images in results)
    assert not np.array_equal(results[0], results[-1])
    if kind == "epsilon":
        with pytest.raises(InputError, match="^Steps 7: diffusers' DDIM needs a divisor of 1000"):
            generate(pipeline, sampler="ddim", steps=7)
        with pytest.raises(InputError, match="^Sampler ode cannot be combined with .* which predicts noise"):
            generate(pipeline, sampler="ode")


def test_without_a_null_class_there_is_no_guidance(tmp_path):
    pipeline = generation.open_pipeline(save_pipeline(tmp_path, class_dropout_prob=0.0))
    with pytest.raises(InputError, match="^Guidance scale 2.0 needs a null class, .* pass guidance_scale=1$"):
        generate(pipeline)
    images = pixels(image for image, _, _ in generate(pipeline, guidance_scale=1)[-1])
    np.testing.assert_array_equal(images, direct_call(str(tmp_path), guidance_scale=1.0))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"classes": []}, "Choose at least one class"),
        ({"classes": "all"}, "Choose at least one class"),
        ({"steps": True}, "Steps must be a whole number from 1 to 250, not True"),
        ({"classes": [5]}, "5 is not a class; this model has 5"),
        ({"images_per_class": 17}, "Images per class must be a whole number from 1 to 16, not 17"),
        ({"classes": [0, 1, 2, 3, 4], "images_per_class": 16}, "more than 64 images"),
        ({"steps": 2.5}, "Steps must be a whole number from 1 to 250, not 2.5"),
        ({"steps": 1, "sampler": "sde"}, "^Steps 1: .* at least 2"),
        ({"guidance_scale": float("nan")}, "Guidance scale must be a number from 1 to 8, not nan"),
        ({"guided_from": 0.9}, "Guided to t must be a number from 0.9 to 1, not 0.8"),
        ({"seed": None}, "Seed must be a whole number from 0 to 4294967295, not None"),
        ({"sampler": "ddim"}, "Sampler ddim cannot be combined with .* predicts velocities; use ode"),
    ],
)
def test_bad_input_gets_a_sentence(pipeline, changes, sentence):
    with pytest.raises(InputError, match=sentence):
        generate(pipeline, **changes)


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    pipeline = generation.open_pipeline(save_pipeline(tmp_path))
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(InputError, match="The numbers of step 1 are not finite"):
        generate(pipeline)


def test_a_closed_run_ends_after_a_step(pipeline):
    turn, calls = threading.Lock(), []
    hook = pipeline.transformer.register_forward_hook(lambda *_: calls.append(time.sleep(0.02)))
    try:
        run = generation.generate(pipeline, turn, **{**OPTIONS, "steps": 250})
        step, _ = next(run)
        assert turn.locked()
        run.close()
        assert turn.acquire(timeout=10)
        assert step <= len(calls) <= step + 5
        turn.release()
        assert len(list(generation.generate(pipeline, turn, **OPTIONS))[-1]) == 4
    finally:
        hook.remove()


def test_runs_take_turns_and_a_client_has_few():
    turns = generation.Turns(most=3, most_per_client=2, longest_wait=0.01)
    with turns.place("a") as first, turns.place("a"):
        assert list(turns.wait(first)) == []
        with pytest.raises(InputError, match="^You already have 2 runs here"), turns.place("a"):
            pass
        with turns.place("b") as third:
            with pytest.raises(InputError, match="^3 runs are already waiting here"), turns.place("c"):
                pass
            waiting = turns.wait(third)
            assert next(waiting) == 2
            with pytest.raises(InputError, match="^There are too many runs before this one"):
                next(waiting)
    patient = generation.Turns()
    with patient.place("a"):
        before = patient.place("a")
        before.__enter__()
        with patient.place("b") as place:
            waiting = patient.wait(place)
            assert next(waiting) == 2
            # A run that ends, or is given up, wakes those behind it.
            threading.Timer(0.05, before.__exit__, (None, None, None)).start()
            begin = time.monotonic()
            assert next(waiting) == 1 and time.monotonic() - begin < 0.9
    assert turns.places == patient.places == []


def test_what_cannot_be_opened_gets_a_sentence(tmp_path):
    with pytest.raises(InputError, match="has no model_index.json, so it is not a pipeline"):
        generation.open_pipeline(str(tmp_path))
    latents = VRPOPipeline(tiny_model(), FlowMatchEulerDiscreteScheduler())
    latents.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="needs the autoencoder of these 4-channel latents"):
        generation.open_pipeline(str(tmp_path))


def test_the_space_is_whole():
    _, metadata, _ = (SPACE / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["sdk"] == "gradio" and (SPACE / metadata["app_file"]).is_file()
    assert {"title", "emoji", "colorFrom", "colorTo", "license"} <= set(metadata)
    assert len(metadata["short_description"]) <= 60
    project = (ROOT / "pyproject.toml").read_text()
    floor = re.search(r'^app = \["gradio>=([\d.]+)"\]', project, re.M)[1]
    assert [int(n) for n in metadata["sdk_version"].split(".")] >= [int(n) for n in floor.split(".")]
    # The Space carries the package as files, so what that needs must be listed.
    needed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.M | re.S)[1]
    assert set(re.findall('"(.*)"', needed)) <= set((SPACE / "requirements.txt").read_text().splitlines())


# ----------------------------------------------------------------------------------------------------------------------
# The server


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """The address and log of the page, run as a command; the requests that it makes to elsewhere are refused, and counted."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
    proxy = socket.create_server(("127.0.0.1", 0))
    proxy.setblocking(False)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    elsewhere = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY"], f"http://127.0.0.1:{proxy.getsockname()[1]}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")}
    environment |= {**elsewhere, "NO_PROXY": "127.0.0.1,localhost", "VRPO_PIPELINE": folder}
    environment |= {"GRADIO_TEMP_DIR": str(tmp_path_factory.mktemp("gradio")), "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "app.log"
    with log.open("w") as file:
        app = subprocess.Popen(
            [sys.executable, SPACE / "app.py", "--server_port", str(port)], env=environment, stdout=file, stderr=file
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert app.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(address).close()
                break
            except OSError:
                time.sleep(0.1)
        yield SimpleNamespace(address=address, log=log)
        with pytest.raises(BlockingIOError):  # nobody called
            proxy.accept()
    finally:
        app.terminate()
        app.wait(timeout=30)
        proxy.close()


@pytest.fixture(scope="module")
def client(server):
    return pytest.importorskip("gradio_client").Client(server.address, verbose=False, analytics_enabled=False)


def call(client, submit=False, **changes):
    """(status, images, archive, seed) of the page's function; or the job."""
    arguments = [*{**OPTIONS, **changes}.values()]
    function = client.submit if submit else client.predict
    return function(*arguments, *([] if "is_random" in changes else [False]), api_name="/generate")


@pytest.mark.slow
def test_the_server_gives_the_same_images_with_captions_and_an_archive(client, folder):
    status, images, archive, seed = call(client)
    assert "4 images" in status and seed == 7
    captions = ["great white shark · seed 7", "great white shark · seed 8", "goldfish · seed 7", "goldfish · seed 8"]
    assert [entry["caption"] for entry in images] == captions
    shown = pixels(Image.open(entry["image"]) for entry in images)
    np.testing.assert_array_equal(shown, direct_call(folder))
    with zipfile.ZipFile(archive) as files:
        names = ["0004-great-white-shark-seed-7", "0004-great-white-shark-seed-8", "0000-goldfish-seed-7"]
        assert files.namelist() == [f"{name}.png" for name in [*names, "0000-goldfish-seed-8"]]
        np.testing.assert_array_equal(pixels(Image.open(files.open(name)) for name in files.namelist()), shown)
    seeds = {call(client, is_random=True)[3] for _ in range(3)}
    assert len(seeds) > 1


@pytest.mark.slow
def test_the_server_answers_bad_input_with_the_sentence(client):
    with pytest.raises(Exception, match="Choose at least one class"):
        call(client, classes=[])
    with pytest.raises(Exception, match="Guided to t must be a number from 0.9 to 1"):
        call(client, guided_from=0.9)


@pytest.mark.slow
def test_the_server_runs_one_at_a_time_and_a_cancelled_run_ends(server, client):
    function = next(f for f in client.config["dependencies"] if f["api_name"] == "generate")
    assert client.config["analytics_enabled"] is False and function["queue"] is not False
    long = call(client, submit=True, steps=250, classes=[0, 1, 2, 3], images_per_class=16, sampler="heun")
    while not any("Step" in update[0] for update in long.outputs()):
        time.sleep(0.05)
    # Of another session: gradio cancels all runs of a session together.
    other = type(client)(server.address, verbose=False, analytics_enabled=False)
    waiting = call(other, submit=True, seed=9)
    time.sleep(0.3)
    assert not waiting.done() and not long.done()
    long.cancel()
    assert "4 images" in waiting.result(timeout=20)[0]
    assert "64 images" not in long.outputs()[-1][0]


SENDERS_TEXT = "text-of-the-sender"


def status_of(server, path: str, body: bytes, **headers) -> int:
    """The status with which the server answers a POST."""
    request = urllib.request.Request(server.address + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_the_server_takes_no_files_and_no_long_requests(server, client):
    form = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{SENDERS_TEXT}"\r\n\r\nabc\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    for path in ("/gradio_api/upload", "/gradio_api/upload/", f"/gradio_api/upload?upload_id={SENDERS_TEXT}"):
        assert status_of(server, path, form.encode(), **kind) == 403
    for path in ("/gradio_api/queue/join", "/gradio_api/call/generate", "/gradio_api/component_server"):
        assert status_of(server, path, b"x" * 70_000) == 413
    # A length that is not said beforehand is counted.
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = "POST /gradio_api/queue/join HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        connection.sendall(b"8000\r\n" + b"x" * 0x8000 + b"\r\n" + b"8001\r\n" + b"x" * 0x8001 + b"\r\n0\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
    lines = server.log.read_text().splitlines()
    assert sum("rejected a request: this page accepts no files" in line for line in lines) == 3
    assert sum("rejected a request: a request may have at most 65536 bytes" in line for line in lines) == 4


@pytest.mark.slow
def test_the_server_logs_a_rejected_call_in_one_line_without_its_text(server, client):
    before = len(server.log.read_text().splitlines())
    for changes in (
        {"sampler": SENDERS_TEXT},
        {"classes": [SENDERS_TEXT]},
        {"classes": SENDERS_TEXT},
        {"steps": SENDERS_TEXT},
        {"steps": {SENDERS_TEXT: 1}},
        {"seed": SENDERS_TEXT},
        {"guidance_scale": 99},
    ):
        with pytest.raises(Exception, match=r"\w"):
            call(client, **changes)
    lines = server.log.read_text().splitlines()[before:]
    lines = [line for line in lines if "public link" not in line]  # a hint of the start, which may come late
    assert len(lines) == 7 and all("rejected a call: " in line for line in lines), lines
    for body in (
        b"{",
        b"[]",
        f'{{"data": ["{SENDERS_TEXT}"], "fn_index": 999}}'.encode(),
        b"\xff",
        b'{"fn_index": "a"}',
    ):
        kind = {"Content-Type": "application/json"}
        assert status_of(server, "/gradio_api/queue/join", body, **kind) >= 400
        assert status_of(server, f"/gradio_api/call/{SENDERS_TEXT}", body, **kind) >= 400
    log = server.log.read_text()
    assert SENDERS_TEXT not in log and "Traceback" not in log


@pytest.mark.slow
def test_a_client_has_few_runs_at_a_time(client):
    long = {"steps": 250, "classes": [0, 1, 2, 3], "images_per_class": 16, "sampler": "heun"}
    runs = [call(client, submit=True, **long) for _ in range(generation.MAX_RUNS_PER_CLIENT + 1)]
    refused = []
    for _ in range(200):
        refused = [run for run in runs if run.done()]
        if refused:
            break
        time.sleep(0.05)
    assert "You already have 4 runs here" in str(refused[0].exception())
    for run in runs:
        run.cancel()
    # Those that were given up leave their places.
    assert "4 images" in call(client)[0]


def test_the_head_of_the_page_and_its_examples(monkeypatch, pipeline, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
    monkeypatch.syspath_prepend(SPACE)
    app = load_module("app")
    monkeypatch.chdir(tmp_path)
    head = app.introduction(pipeline, "flowers <1>", "me/flowers")
    assert head.startswith("# flowers &lt;1&gt;\nNew images of the classes that you choose")
    assert "5 classes · 8 × 8 pixels · SiT (it predicts velocities)" in head
    assert head.endswith(" · [model card](https://huggingface.co/me/flowers)")
    (tmp_path / "me" / "flowers").mkdir(parents=True)  # a folder has no page on the Hub
    assert all("model card" not in app.introduction(pipeline, "x", name) for name in ("me/flowers", "run", None))
    expected = [("8 × goldfish", [0], 8), ("8 × class 3", [3], 8), ("4 classes", [0, 1, 2, 3], 2)]
    assert app.examples(pipeline) == expected
    # Both ends of a slider are shown on a phone, where gradio's own style hides them.
    assert "#page .min_value, #page .max_value { display: inline; }" in (SPACE / "style.css").read_text()


def test_the_command_line_answers_in_a_line(capsys, monkeypatch, tmp_path, folder):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[app]'")
    monkeypatch.syspath_prepend(SPACE)
    monkeypatch.delenv("VRPO_PIPELINE", raising=False)
    app = load_module("app")
    taken = socket.create_server(("127.0.0.1", 0))
    for arguments, sentence in [
        ([], "PIPELINE is missing; give a folder or Hub repository, or set the environment variable VRPO_PIPELINE"),
        (["--pipline", "x"], "unrecognized arguments: --pipline"),
        (["--pipeline", str(tmp_path / "none")], "none is not a folder"),
        (["--pipeline", str(tmp_path), "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--pipeline", folder, "--server_port", str(taken.getsockname()[1])], "; choose another --server_port"),
        (["--pipeline", folder, "--server_port", "99999"], "--server_port 99999 must be at least 1 and at most 65535"),
        (
            ["--pipeline", folder, "--server_name", "192.0.2.1"],
            "--server_name 192.0.2.1: Cannot assign requested address",
        ),
    ]:
        with pytest.raises(SystemExit):
            app.main(arguments)
        error = capsys.readouterr().err
        line = error.splitlines()[-1]
        assert sentence in line and line.startswith("app.py: error: ") and "Traceback" not in error
    taken.close()


# ----------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def browser(server):
    playwright = pytest.importorskip("playwright.sync_api", reason="the test of the page needs playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
    binary = os.environ.get("CHROME_BIN") or next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip("no browser: set CHROME_BIN to a Chromium, or put one on the PATH")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=binary, args=["--no-sandbox"])
        yield browser
        browser.close()


def overlap(first: dict, second: dict) -> bool:
    return all(
        first[side] < second[side] + second[length] and second[side] < first[side] + first[length]
        for side, length in (("x", "width"), ("y", "height"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("width, height, scheme", [(390, 844, "dark"), (1280, 800, "light")])
def test_the_page_in_a_browser(server, browser, width, height, scheme):
    is_phone = width < 900
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone
    )
    requests, problems = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.address)
    press = lambda name: page.get_by_role("button", name=name, exact=True)  # noqa: E731
    press("Generate").wait_for()

    # A class is found by a part of its name; the results stand below the picker, or beside it.
    page.get_by_label("Classes").first.click()
    page.keyboard.type("white")
    option = page.get_by_role("option", name="great white shark (4)")
    assert option.bounding_box()["height"] >= 40
    option.click()
    page.keyboard.press("Escape")
    pick, results, settings = (page.locator(f"#{name}").bounding_box() for name in ("pick", "results", "settings"))
    assert (results["y"] > pick["y"] + 100) == is_phone and (results["x"] > pick["x"] + 100) != is_phone
    assert not any(overlap(*pair) for pair in ((pick, results), (results, settings), (pick, settings)))
    assert press("Generate").bounding_box()["height"] >= 44 and press("Stop").is_disabled()

    # Four images of each of two classes, nothing of them cut off.
    press("Generate").click()
    page.get_by_text("8 images in").wait_for(timeout=30_000)
    assert page.locator("#gallery .caption-label").first.inner_text().startswith("goldfish · seed")
    boxes = [image.bounding_box() for image in page.locator("#gallery img").all()]
    assert len(boxes) == 8 and all(b["x"] >= 0 and b["x"] + b["width"] <= width and b["width"] > 80 for b in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    cut = "[...document.querySelectorAll('#gallery .caption-label')].filter(c => c.scrollWidth > c.clientWidth).length"
    assert page.evaluate(cut) == 0
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")
    with page.expect_download() as download:
        page.get_by_text("Download all").click()
    assert len(zipfile.ZipFile(download.value.path()).namelist()) == 8

    # Stop ends a long run (Heun's 250 steps are 499), and the next one works.
    page.get_by_label("Sampler").first.click()
    page.get_by_role("option", name="Heun").click()
    page.get_by_label("number input for Steps").fill("250")
    page.get_by_label("number input for Images per class").fill("16")
    press("Generate").click()
    page.get_by_text("of 499").wait_for(timeout=30_000)
    press("Stop").click()
    page.get_by_text("Stopped.").wait_for(timeout=5_000)
    page.get_by_label("number input for Steps").fill("5")
    press("Generate").click()
    page.get_by_text("32 images in").wait_for(timeout=30_000)

    # Without a class the sentence is shown, and the button is ready again.
    page.get_by_title("Clear").click()
    press("Generate").click()
    page.get_by_text("Choose at least one class").wait_for(timeout=10_000)
    press("Generate").click(timeout=10_000)
    assert [url for url in requests if not url.startswith((server.address, "data:", "blob:"))] == problems == []
    page.close()
