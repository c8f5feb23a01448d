# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Publishes a run to the Hub from a background thread: training never waits for it and never stops because of it."""

import atexit
import json
import logging
import os
import re
import shlex
import shutil
import threading
from pathlib import Path

from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCardData, snapshot_download
from huggingface_hub.utils import disable_progress_bars, get_session, hf_raise_for_status
from safetensors.torch import load_file, save_file

from ..errors import InputError, first_line
from ..pipelines.pipeline_vrpo import VRPOPipeline
from ..training.callbacks import TrainerCallback
from ..training.checkpoints import find_damage, list_checkpoints
from ..training.distributed import run_and_share_errors
from ..training.interruption import Interruption
from ..training.output_dir import unwritable
from .card import STAGED
from .publish import (
    ADAPTERS,
    DEFECTS,
    check_base,
    commit,
    hub_sentence,
    is_passing,
    make_repository,
    open_repository,
    push_folder,
    with_retries,
)


logger = logging.getLogger(__name__)
KEPT_STATES = 2  # training states that are kept in the newest commit on the Hub
HISTORY = ("metrics.jsonl", "starts.jsonl")  # files of the output folder that are uploaded with a training state


def link_tree(source: Path, target: Path):
    """Copies a folder as hard links, or as copies if links are not supported, so that the files outlive `source`."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, copy)
            except OSError:
                shutil.copyfile(path, copy)


def stage_pipeline(pipeline: VRPOPipeline, checkpoint: Path, folder: Path):
    """Writes what is published of a checkpoint: the pipeline with the averaged weights, or its adapters.

    Args:
        pipeline: the pipeline in training; its transformer's weights are not changed.
        checkpoint: the folder `checkpoint-N` of the run.
        folder: a folder that does not exist yet.

    Raises:
        InputError: if the adapters cannot be used without the other weights of the run.
    """
    output_dir, step = checkpoint.parent, int(checkpoint.name.split("-")[1])
    folder.mkdir(parents=True)
    averaged = "transformer_ema" if list(checkpoint.glob("transformer_ema*")) else "transformer"
    if (checkpoint / averaged).is_dir():
        pipeline.save_config(folder)
        for name, component in pipeline.components.items():
            if name != "transformer" and component is not None:
                component.save_pretrained(folder / name)
        link_tree(checkpoint / averaged, folder / "transformer")
    else:
        if not getattr(pipeline.transformer, "adapters_suffice", False):
            raise InputError(
                None,
                "its adapters cannot be used without the rest of the pipeline, which is published at the end of the run",
            )
        weights = load_file(checkpoint / f"{averaged}.safetensors")
        adapters = {
            f"transformer.{name.replace('.default.', '.')}": tensor
            for name, tensor in weights.items()
            if ".lora_" in name
        }
        (folder / "lora").mkdir()
        save_file(adapters, folder / "lora" / ADAPTERS)
        pipeline.transformer.save_config(folder / "transformer")  # tells the model card what the model predicts
    (folder / STAGED).write_text(json.dumps({"step": step}))
    for name in ("train_config.yaml", *HISTORY):
        if (output_dir / name).is_file():
            shutil.copyfile(output_dir / name, folder / name)
    grids = [path for path in (output_dir / "samples").glob("step-*.png") if int(path.stem.split("-")[1]) <= step]
    if grids:
        shutil.copyfile(max(grids), folder / "samples.png")


def stage_state(checkpoint: Path, folder: Path):
    """Copies a complete checkpoint, together with the run's metrics and starts so far, which checkpoints do not have."""
    link_tree(checkpoint, folder)
    for name in HISTORY:
        if (checkpoint.parent / name).is_file():
            shutil.copyfile(checkpoint.parent / name, folder / name)


def push_state(folder: Path, repo_id: str):
    """Uploads a whole checkpoint to the repository of training states, which keeps it and the one before it.

    States of later steps are removed: they belong to another run, or this run was resumed from an earlier step.
    """
    files = {
        f"{folder.name}/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()
    }

    step = int(folder.name.split("-")[1])

    def outdated(there):
        steps = {int(found[1]) for path in there if (found := re.match(r"checkpoint-(\d+)/", path))} | {step}
        kept = [f"checkpoint-{n}" for n in sorted(n for n in steps if n <= step)[-KEPT_STATES:]]
        return [path for path in there if path.startswith("checkpoint-") and path.split("/")[0] not in kept]

    repo_id = with_retries(make_repository, repo_id, True)
    with_retries(commit, repo_id, files, f"Training state of step {step}", outdated)
    try:
        # Otherwise the repository's history would keep every state.
        with_retries(HfApi().super_squash_history, repo_id)
    except Exception as error:
        logger.warning(f"the older commits of {repo_id} could not be removed ({hub_sentence(error, repo_id)})")


def fetch_state(repo_id: str, output_dir: Path):
    """Downloads the newest intact training state from the Hub, unless the output folder has one that is at least as new.

    The metrics and starts of the run are downloaded with it.

    Raises:
        InputError: if the Hub has training states, but all are damaged, and the output folder has no intact checkpoint.
    """
    there = with_retries(HfApi().list_repo_files, repo_id)
    steps = sorted({int(found[1]) for path in there if (found := re.match(r"checkpoint-(\d+)/", path))}, reverse=True)
    local = [path for path in list_checkpoints(output_dir) if find_damage(path) is None]
    newest_here = int(local[-1].name.split("-")[1]) if local else -1
    for step in steps:
        if step <= newest_here:
            return
        download = output_dir / ".hub" / "download"
        shutil.rmtree(download, ignore_errors=True)
        name = f"checkpoint-{step}"
        with_retries(snapshot_download, repo_id, allow_patterns=f"{name}/*", local_dir=download)
        damage = find_damage(download / name)
        if damage is None:
            shutil.rmtree(output_dir / name, ignore_errors=True)
            for history in HISTORY:
                if (download / name / history).is_file():
                    os.replace(download / name / history, output_dir / history)
            os.replace(download / name, output_dir / name)
            shutil.rmtree(download, ignore_errors=True)
            logger.info(f"downloaded the training state of step {step} from {repo_id}")
            return
        logger.warning(f"{name} in {repo_id} is damaged ({damage}); trying the one before it")
    if steps and not local:
        raise InputError(
            "resume_from_checkpoint",
            f"`resume_from_checkpoint` hub: every training state of {repo_id} is damaged; remove the option to start a new run",
        )
    if not steps:
        logger.info(f"{repo_id} has no training state yet; starting a new run")


def check_license(license: str):
    """Asks the Hub whether it accepts a license, as it checks at every push.

    Raises:
        InputError: if the Hub does not.
    """
    card = {"repoType": "model", "content": f"---\n{ModelCardData(license=license).to_yaml()}\n---\n"}
    answer = get_session().post(f"{HfApi().endpoint}/api/validate-yaml", json=card)
    if answer.status_code == 400:
        raise InputError(
            "hub_license",
            f"`hub_license` {license} is not known to the Hub; give one such as apache-2.0, mit, cc-by-nc-4.0 or other",
        )
    hf_raise_for_status(answer)


class HubPublisher(TrainerCallback):
    """Publishes a run: its checkpoints during training, and its result at the end.

    Only the main process uploads. A push that fails is retried, and then logged as a warning. If checkpoints are saved faster
    than they can be uploaded, only the newest is uploaded. Uploads are staged in `.hub/` of the output folder, as hard links,
    so that training does not wait for the network.

    Args:
        args (`HubConfig`): what to publish, and where.
        accelerator: the accelerator of the training.
        output_dir: the output folder of the run.
        interruption: the run's record of signals; once it has a signal, nothing waits for uploads.

    Raises:
        InputError: before training, if the token may not write, or a new run cannot reach the Hub.
    """

    def __init__(self, args, accelerator: Accelerator, output_dir: Path, interruption: Interruption):
        self.args = args
        self.output_dir = output_dir
        self.interruption = interruption
        self.staging = output_dir / ".hub"
        self.sends = accelerator.is_main_process
        self.repo_id = args.hub_model_id or output_dir.resolve().name
        self.missing: dict[str, str] = {}  # the names of what is not on the Hub, and why
        self._last_step = 0
        self._waiting, self._working = None, None  # jobs, each a name and a function, or None
        self._changed = threading.Condition()
        run_and_share_errors(accelerator, self._open, where=self.sends)

    def on_save(self, trainer, checkpoint: Path):
        if self.sends:
            self.push_checkpoint(trainer.pipeline, checkpoint)

    def _open(self):
        shutil.rmtree(self.staging, ignore_errors=True)
        disable_progress_bars()
        try:
            private = self.args.hub_private_repo or None
            self.repo_id = with_retries(open_repository, self.repo_id, private, retries=1)
            try:
                check_base(self.repo_id, vars(self.args))
            except InputError as error:
                raise InputError("hub_model_id", f"`hub_model_id` {error}") from error
            if self.args.hub_license:
                with_retries(check_license, self.args.hub_license, retries=1)
            if self.args.push_training_state:
                state = with_retries(open_repository, f"{self.repo_id}-state", True, retries=1)
                if self.args.resume_from_checkpoint == "hub":
                    fetch_state(state, self.output_dir)
        except (InputError, *DEFECTS):
            raise
        except Exception as error:
            problem = f"`push_to_hub`: {hub_sentence(error, self.repo_id)}"
            if not is_passing(error) or not list_checkpoints(self.output_dir):
                raise InputError(
                    None, f"{problem}; or train without `push_to_hub` and publish the result later: {self._command()}"
                ) from error
            logger.warning(f"{problem}; the run continues and tries again at its next push")
        # It is a daemon thread, so that a run that ends early does not wait for it.
        threading.Thread(target=self._work, daemon=True, name="hub").start()
        atexit.register(self._say_what_is_left)

    # Main thread

    def push_checkpoint(self, pipeline: VRPOPipeline, checkpoint: Path):
        """Uploads a checkpoint that was just saved, if the options request it; returns immediately."""
        wanted = self.args.hub_push_checkpoints or self.args.push_training_state
        step = int(checkpoint.name.split("-")[1])
        if not wanted or step == self._last_step:
            return
        self._last_step, folder = step, self.staging / f"step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        parts = []
        if self.args.push_training_state:
            target = folder / checkpoint.name
            parts.append((f"the training state of step {step}", target, lambda: stage_state(checkpoint, target)))
        if self.args.hub_push_checkpoints:
            staged = folder / "pipeline"
            parts.append((f"step {step}", staged, lambda: stage_pipeline(pipeline, checkpoint, staged)))
        for name, part, stage in parts:
            try:
                stage()
            except Exception as error:  # for example on a full disk; training continues
                self._failed(name, unwritable(error) or first_line(error))
                shutil.rmtree(part, ignore_errors=True)
        if not any(part.is_dir() for _, part, _ in parts):
            return
        with self._changed:
            if self._waiting is not None:
                self.missing[self._waiting[0]] = "a newer one came before it could be sent"
                shutil.rmtree(self.staging / self._waiting[0].replace(" ", "-"), ignore_errors=True)
            self._waiting = (f"step {step}", lambda: self._send_checkpoint(folder, step))
            self._changed.notify_all()

    def push_result(self):
        """Publishes the output folder, after a waiting checkpoint, and waits for the end.

        Failures are logged in one line and not raised.
        """
        if not self.sends:
            return
        with self._changed:
            while self._waiting and not self.interruption.signum:
                self._changed.wait(0.2)
            self._waiting = ("the result", self._send_result)
            self._changed.notify_all()
            while (self._waiting or self._working) and not self.interruption.signum:
                self._changed.wait(0.2)
            for job in (self._waiting, self._working):
                if job is not None:
                    self.missing[job[0]] = "interrupted"
        if self.missing:
            what = ", ".join(f"{name} ({why})" for name, why in self.missing.items())
            remedy = f". The result is safe in {self.output_dir}; publish it with `{self._command()}`"
            logger.warning(f"not on the Hub: {what}{remedy if 'the result' in self.missing else ''}")
        else:
            logger.info(f"published: {HfApi().endpoint}/{self.repo_id}")
        if not self.interruption.signum:
            shutil.rmtree(self.staging, ignore_errors=True)

    def _command(self) -> str:
        """The command that publishes the result later, as this run would."""
        words = ["vrpo", "push", str(self.output_dir), "--hub_model_id", self.repo_id]
        words += ["--hub_private_repo"] if self.args.hub_private_repo else []
        words += ["--hub_license", self.args.hub_license] if self.args.hub_license else []
        return shlex.join(words)

    def _say_what_is_left(self):
        """Warns about unfinished uploads when the run ends early."""
        for job in (self._working, self._waiting):
            if job is not None:
                logger.warning(f"{job[0]} was not uploaded to the Hub completely; the next push replaces it")

    # The thread

    def _work(self):
        while True:
            with self._changed:
                while self._waiting is None:
                    self._changed.wait()
                self._working, self._waiting = self._waiting, None
                self._changed.notify_all()
            name, send = self._working
            try:
                send()
            except Exception as error:
                self._failed(name, hub_sentence(error, self.repo_id))
            with self._changed:
                self._working = None
                self._changed.notify_all()

    def _failed(self, name: str, why: str):
        self.missing[name] = why
        if name != "the result":  # `push_result` reports it
            logger.warning(f"{name} could not be sent to the Hub: {why}; training is not affected")

    def _send_checkpoint(self, folder: Path, step: int):
        # The training state comes first, because a run needs it to resume. The failure of one does not block the other.
        try:
            if (folder / f"checkpoint-{step}").is_dir():
                push_state(folder / f"checkpoint-{step}", f"{self.repo_id}-state")
                logger.info(f"the training state of step {step} is on the Hub")
        except Exception as error:
            self._failed(f"the training state of step {step}", hub_sentence(error, f"{self.repo_id}-state"))
        try:
            if (folder / "pipeline").is_dir():
                push_folder(
                    folder / "pipeline",
                    self.repo_id,
                    private=self.args.hub_private_repo or None,
                    license=self.args.hub_license,
                    commit_message=f"Step {step}",
                    tag=f"step-{step}",
                )
                logger.info(f"step {step} is on the Hub")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send_result(self):
        push_folder(
            self.output_dir,
            self.repo_id,
            private=self.args.hub_private_repo or None,
            license=self.args.hub_license,
            commit_message="Result",
        )
