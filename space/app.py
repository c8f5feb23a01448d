# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""A web page that samples from a pipeline, for the browser of a computer or a phone.

    vrpo app outputs/digits

This file is also the `app.py` of a Space on the Hub, where the environment variable VRPO_PIPELINE names the repository of the
pipeline. docs/app.md says more.
"""

import argparse
import html
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from generation import (
    MAX_GUIDANCE_SCALE,
    MAX_IMAGES_PER_CLASS,
    MAX_RUN,
    MAX_RUNS,
    MAX_SEED,
    MAX_STEPS,
    Turns,
    check_choices,
    class_choices,
    class_name,
    generate,
    open_pipeline,
)
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from diffusers_vrpo import VRPOPipeline
from diffusers_vrpo.commands.app import build_parser, parse_args
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.models.autoencoder import side_factor
from diffusers_vrpo.pipelines.sampling import SAMPLERS


SAMPLER_NAMES = {
    "default": "the pipeline's own",
    "ode": "Euler",
    "heun": "Heun (two evaluations a step)",
    "sde": "SDE (Euler-Maruyama)",
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpmsolver++": "DPM-Solver++",
    "unipc": "UniPC",
}
# The page uses the fonts of the device, because those of gradio's themes would be fetched from Google. Small text and the
# main button have a contrast of at least 4.5 to 1, which gradio's own greys and indigo do not reach.
THEME = gr.themes.Default(
    primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_hover_dark="*primary_500",
)
STYLE = Path(__file__).parent / "style.css"
MAX_BODY = 64 * 1024  # bytes in a request; the largest requests of the page have a few hundred
# There is a thread for each waiting run, and some more. The page accepts no files, so their limit is the smallest possible.
LAUNCH = {"max_file_size": 1, "max_threads": MAX_RUNS + 32, "ssr_mode": False}
logger = logging.getLogger("app")


class BodyTooLong(Exception):
    """A request has more than `MAX_BODY` bytes."""


class Guard:
    """Middleware that refuses long requests and uploads, which the page does not use, and logs each failure in one line.

    The line contains nothing that the sender wrote, neither the requested address nor the content.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        answered, received = False, 0

        async def counted_receive():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise BodyTooLong
            return message

        async def noted_send(message):
            nonlocal answered
            if received <= MAX_BODY:  # otherwise this is FastAPI's own answer to BodyTooLong
                answered = True
                await send(message)

        async def refuse(status: int, reason: str):
            logger.warning(f"rejected a request: {reason}")
            if not answered:
                await PlainTextResponse(f"{reason}\n", status, {"connection": "close"})(scope, receive, send)

        length = dict(scope["headers"]).get(b"content-length", b"0")
        if scope["path"].rstrip("/").endswith("/upload"):
            return await refuse(403, "this page accepts no files")
        if not length.isdigit() or len(length) > 12 or int(length) > MAX_BODY:
            return await refuse(413, f"a request may have at most {MAX_BODY} bytes")
        failure = None
        try:
            await self.app(scope, counted_receive, noted_send)
        except Exception as error:
            failure = error
        if received > MAX_BODY:
            await refuse(413, f"a request may have at most {MAX_BODY} bytes")
        elif failure is not None:
            await refuse(500, f"the request cannot be answered ({origin(failure)})")


class Page(gr.Blocks):
    """`gr.Blocks` that logs each failed call in one line, without anything that the sender wrote."""

    async def process_api(self, *arguments, **options):
        try:
            return await super().process_api(*arguments, **options)
        except gr.Error as error:
            logger.warning(f"rejected a call: {origin(error.__cause__ or error)}")
            error.print_exception = False
            raise
        except Exception as error:
            logger.warning(f"rejected a call: {origin(error)}")
            raise gr.Error("The page cannot do that.", print_exception=False) from error


def origin(error: BaseException) -> str:
    """The kind of an error and the line of code that raised it, without its message."""
    *_, last = traceback.extract_tb(error.__traceback__) or [None]
    return f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}" if last else type(error).__name__


def client_of(request: gr.Request) -> str:
    """The address of a client. In a Space, where all requests come from the Hub's proxy, it is the one that the proxy names."""
    passed_on = request.headers.get("x-forwarded-for", "") if "SPACE_ID" in os.environ else ""
    return passed_on.split(",")[0].strip() or (request.client.host if request.client else "")


def write_files(images: list, pipeline: VRPOPipeline, folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Writes the images of `generate` as PNG files, and all of them into a .zip file.

    Returns:
        `(path, caption)` of each image, and the path of the .zip file.
    """
    shown, archive = [], folder / "samples.zip"
    with zipfile.ZipFile(archive, "w") as files:
        for image, class_id, seed in images:
            name = class_name(pipeline, class_id)
            file = folder / f"{class_id:04d}-{re.sub('[^a-zA-Z0-9]+', '-', name)[:50]}-seed-{seed}.png"
            image.save(file)
            files.write(file, file.name)
            shown.append((str(file), f"{name} · seed {seed}"))
    return shown, str(archive)


def examples(pipeline: VRPOPipeline) -> list[tuple[str, list[int], int]]:
    """The examples that the page offers: for each its text, its classes and the number of images per class."""
    ids, found = pipeline.trained_labels, []
    spread = [ids[i * len(ids) // 4] for i in range(min(4, len(ids)))]
    for class_id in dict.fromkeys([spread[0], spread[-1]]):
        found.append((f"8 × {class_name(pipeline, class_id)}", [class_id], 8))
    if len(spread) > 2:
        found.append((f"{len(spread)} classes", spread, 2))
    return found


def introduction(pipeline: VRPOPipeline, title: str, name: str | None) -> str:
    """The head of the page as Markdown: title, purpose, facts about the model, and a link to its card on the Hub."""
    config, side = pipeline.transformer.config, pipeline.transformer.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    factor = 1 if pipeline.vae is None else side_factor(pipeline.vae)
    pixels = "" if factor is None else f"{width * factor} × {height * factor} pixels · "
    kind = "SiT (it predicts velocities)" if config.prediction_type == "velocity" else "DiT (it predicts noise)"
    facts = f"{len(pipeline.trained_labels)} classes · {pixels}{kind}"
    on_hub = name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    card = f" · [model card](https://huggingface.co/{name})" if on_hub else ""
    return f"# {html.escape(title)}\nNew images of the classes that you choose, drawn by a diffusion transformer.\n\n{facts}{card}"


def build_app(pipeline: VRPOPipeline, title: str, name: str | None = None) -> gr.Blocks:
    """Builds the page, which `serve` starts.

    Args:
        title: the title of the page.
        name: the folder or Hub repository of the pipeline; the page links to the model card of a Hub repository.
    """
    config, turn, turns = pipeline.transformer.config, threading.Lock(), Turns()
    choices = class_choices(pipeline)
    samplers = [(SAMPLER_NAMES.get(key, key), key) for key in ("default", *SAMPLERS[config.prediction_type])]
    is_guidable = pipeline.transformer.null_class_id is not None
    height = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    few_pixels = pipeline.vae is None and height < 128

    def on_generate(stopped, classes, count, steps, scale, low, high, sampler, seed, is_random, request: gr.Request):
        seed, begin = secrets.randbelow(1_000_000) if is_random else seed, time.monotonic()
        try:
            check_choices(classes, count, steps, scale, low, high, seed)
            with turns.place(client_of(request)) as place:
                for before in turns.wait(place):
                    yield f"<p>Runs before this one: {before}</p>", gr.skip(), gr.skip(), seed
                    if stopped is not None and stopped.is_set():
                        yield "<p>Stopped.</p>", gr.skip(), gr.skip(), gr.skip()
                        return
                begin = time.monotonic()
                yield "<p>Waiting for the first step …</p>", gr.skip(), gr.skip(), seed
                for item in generate(pipeline, turn, classes, count, steps, scale, low, high, sampler, seed):
                    if stopped is not None and stopped.is_set():
                        yield "<p>Stopped.</p>", gr.skip(), gr.skip(), gr.skip()
                        return
                    if time.monotonic() - begin > MAX_RUN:
                        raise InputError(
                            None,
                            f"The run took more than {MAX_RUN // 60} minutes and was stopped; choose fewer images",
                        )
                    if isinstance(item, tuple):
                        bar = "<progress value={0} max={1} aria-label='steps'></progress><p>Step {0} of {1}</p>"
                        yield bar.format(*item), gr.skip(), gr.skip(), gr.skip()
        except InputError as error:
            raise gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False) from error
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the files before this generator continues
            shown, archive = write_files(item, pipeline, Path(folder))
            status = f"<p>{len(shown)} images in {time.monotonic() - begin:.1f} s, from seed {seed}</p>"
            yield status, shown, archive, seed

    with Page(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as app:
        gr.Markdown(introduction(pipeline, title, name), elem_id="head")
        with gr.Row(elem_id="page"):
            with gr.Column(elem_id="pick"):
                info = "Type a part of a name, or an id."
                classes = gr.Dropdown(choices, value=[choices[0][1]], multiselect=True, label="Classes", info=info)
                count = gr.Slider(1, MAX_IMAGES_PER_CLASS, 4, step=1, label="Images per class", buttons=[])
                with gr.Row(elem_id="examples"):
                    tried = [gr.Button(text, size="sm", min_width=80) for text, *_ in examples(pipeline)]
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", min_width=120)
                    stop = gr.Button("Stop", variant="stop", min_width=120, interactive=False)
            with gr.Column(elem_id="results"):
                status = gr.HTML("<p>No images yet.</p>", elem_id="status")
                gallery = gr.Gallery(
                    show_label=False,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                    elem_classes=["pixels"] if few_pixels else None,
                )
                download = gr.DownloadButton("Download all (.zip)", interactive=False)
            with gr.Column(elem_id="settings"):
                steps = gr.Slider(1, MAX_STEPS, 50, step=1, label="Steps", buttons=[])
                info = f"The pipeline's own is {type(pipeline.scheduler).__name__}."
                sampler = gr.Dropdown(samplers, value="default", label="Sampler", info=info)
                seed = gr.Number(0, precision=0, minimum=0, maximum=MAX_SEED, label="Seed")
                is_random = gr.Checkbox(True, label="A new seed every time")
                guided = {"visible": is_guidable, "buttons": []}
                if not is_guidable:
                    gr.Markdown("This model was trained without a null class, so it cannot be guided.")
                scale = gr.Slider(
                    1,
                    MAX_GUIDANCE_SCALE,
                    1.5 if is_guidable else 1,
                    step=0.1,
                    label="Guidance scale (1: off)",
                    **guided,
                )
                low = gr.Slider(0, 1, 0, step=0.01, label="Guided from t", info="1 is noise, 0 the image", **guided)
                high = gr.Slider(0, 1, 1, step=0.01, label="Guided to t", **guided)

        def buttons(is_running: bool):
            return gr.Button(interactive=not is_running), gr.Button(interactive=is_running)

        def on_press(count):
            # Each class has a row of its own if that fits.
            columns = min(int(count), 8) if count > 2 else 4
            return *buttons(True), threading.Event(), gr.Gallery(columns=columns)

        # Each press of Generate makes an event that the session keeps. The run checks it after every step.
        stopped = gr.State(None)
        quick = {"queue": False, "api_visibility": "private"}
        for button, (_, of_classes, each) in zip(tried, examples(pipeline)):
            button.click(lambda chosen=of_classes, each=each: (chosen, each), None, [classes, count], **quick)
        busy = start.click(on_press, count, [start, stop, stopped, gallery], **quick)
        running = busy.then(
            on_generate,
            [stopped, classes, count, steps, scale, low, high, sampler, seed, is_random],
            [status, gallery, download, seed],
            api_name="generate",
            concurrency_limit=MAX_RUNS,  # `turns` lets one run compute at a time
            show_progress="minimal",
            show_progress_on=status,
        )
        running.then(
            lambda images: (*buttons(False), gr.DownloadButton(interactive=bool(images))),
            gallery,
            [start, stop, download],
            **quick,
        )
        # `then` does not run after a failure (gradio 6.31).
        running.failure(lambda: (*buttons(False), "<p>No images were made.</p>"), None, [start, stop, status], **quick)
        stop.click(lambda event: event.set() or gr.Button(interactive=False), stopped, stop, **quick)
    return app.queue(max_size=MAX_RUNS)


def serve(args: argparse.Namespace, parser: argparse.ArgumentParser):
    """Opens a pipeline and serves its page until the process ends; `parser` reports errors."""
    if host := (args.server_name or "").strip("[]"):
        try:  # gradio would try a hundred ports of an address that cannot be listened on
            family = socket.getaddrinfo(host, None)[0][0]
            socket.create_server((host, 0), family=family).close()
        except OSError as error:
            parser.error(f"--server_name {args.server_name}: {error.strerror or error}; choose another")
    try:
        pipeline = open_pipeline(args.pipeline, args.dtype)
    except InputError as error:
        parser.error(str(error))
    app = build_app(pipeline, title=Path(args.pipeline).resolve().name, name=args.pipeline)
    try:
        app.launch(
            server_name=args.server_name,
            server_port=args.server_port,
            theme=THEME,
            css_paths=STYLE,
            app_kwargs={"middleware": [Middleware(Guard)]},
            **LAUNCH,
        )
    except OSError as error:
        parser.error(f"{str(error).split('. ')[0]}; choose another --server_port or --server_name")


def main(argv: list[str] | None = None):
    serve(parse_args(argv, "app.py"), build_parser("app.py"))


if __name__ == "__main__":
    main()
