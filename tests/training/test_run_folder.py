# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Output folders that hold something: what a run continues, refuses, replaces, and never touches."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from diffusers_vrpo import VRPOConfig
from diffusers_vrpo import trainer as trainer_module
from diffusers_vrpo.data.latent_cache import read_meta
from diffusers_vrpo.errors import InputError, TrainingStopped
from diffusers_vrpo.models.start import transformer_config
from diffusers_vrpo.training import checkpoints as training
from diffusers_vrpo.training.checkpoints import find_damage, list_checkpoints
from diffusers_vrpo.training.metrics import MetricsFile, read_metrics
from diffusers_vrpo.training.output_dir import claim_output_dir
from support.training import losses, options_in, run


pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps, with its checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    run(options_in(folder)(objective="none", encoder=None, projector_dim=None, max_train_steps=2))
    return folder / "run"


@pytest.fixture
def command(tmp_path):
    options = options_in(tmp_path)
    without = {"objective": "none", "encoder": None, "projector_dim": None, "max_train_steps": 2}
    return lambda **changes: options(**{**without, **changes})


@pytest.fixture
def folder(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def remove_checkpoints(folder: Path):
    for checkpoint in list_checkpoints(folder):
        shutil.rmtree(checkpoint)


def test_a_finished_run_without_its_checkpoints_is_not_begun_again(command, folder):
    remove_checkpoints(folder)
    before = contents(folder)
    refused = (
        "`output_dir` .*/run holds model_index.json, transformer, scheduler, but no checkpoint .* choose another folder, or give "
        "`overwrite_output_dir`"
    )
    with pytest.raises(InputError, match=refused) as error:
        run(command())
    assert error.value.field == "output_dir"
    assert contents(folder) == before


def test_metrics_of_a_longer_run_are_not_lost(command, folder):
    remove_checkpoints(folder)
    for name in ("transformer", "scheduler"):
        shutil.rmtree(folder / name)
    (folder / "model_index.json").unlink()
    run_config = folder / "train_config.yaml"
    run_config.write_text(run_config.read_text().replace("checkpointing_steps: 10000", "checkpointing_steps: 1"))
    before = contents(folder)
    with pytest.raises(InputError, match="holds .* but no checkpoint from which this run can continue"):
        run(command())
    assert contents(folder) == before


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(command, folder):
    remove_checkpoints(folder)
    for path in list(folder.iterdir()):
        if path.name not in ("train_config.yaml", "metrics.jsonl", "starts.jsonl", "samples"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "slurm-1.out").write_text("the launcher's log")
    run(command())
    assert len(losses(folder)) == 2


@pytest.mark.parametrize(
    "name", ["notes.txt", "model_index.json", "train_config.yaml", "README.md", "vae/config.json", "samples/1.png"]
)
def test_a_folder_with_other_files_is_refused(command, tmp_path, name):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InputError, match=f"holds .*{name.split('/')[0]}.* choose another folder, or give `overwrite"):
        run(command())
    assert file.read_text() == "mine" and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_overwriting_removes_what_training_wrote_and_nothing_else(command, folder):
    remove_checkpoints(folder)
    mine = {name: folder / name for name in ("notes.txt", "samples/mine.png", "data/0.png")}
    for file in mine.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    (folder / "lora").mkdir()
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_text("of an earlier run")
    run(command(max_train_steps=1) + ["--overwrite_output_dir"])
    assert losses(folder) == losses(folder)[:1] and (folder / "model_index.json").exists()
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1"]
    assert not (folder / "lora").exists() and len((folder / "starts.jsonl").read_text().splitlines()) == 1
    for name in ("notes.txt", "samples/mine.png", "data/0.png"):
        assert mine[name].read_text() == "mine"


def test_overwriting_keeps_checkpoints_of_other_programs(command, folder):
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "mine.pt").write_text("mine")
    before = contents(folder)
    with pytest.raises(InputError, match="holds checkpoint-9, which training has not written"):
        run(command(max_train_steps=1, resume_from_checkpoint="none") + ["--overwrite_output_dir"])
    assert contents(folder) == before


def test_overwriting_continues_where_it_can_unless_none_is_asked_for(command, folder):
    overwrite = ["--overwrite_output_dir"]
    run(command(max_train_steps=3) + overwrite)
    assert len((folder / "starts.jsonl").read_text().splitlines()) == 2 and len(losses(folder)) == 3
    with pytest.raises(InputError, match="add `overwrite_output_dir` to remove it"):
        run(command(max_train_steps=1, resume_from_checkpoint="none"))
    run(command(max_train_steps=1, resume_from_checkpoint="none") + overwrite)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-1"] and len(losses(folder)) == 1


@pytest.mark.parametrize("of", ["", "transformer", "checkpoint-2/transformer"])
@pytest.mark.parametrize("more", [[], ["--lora_rank", "2"], ["--overwrite_output_dir"]])
def test_the_base_is_not_the_output(command, folder, of, more):
    if of.startswith("checkpoint") and "--overwrite_output_dir" not in more:
        pytest.skip("a run may start from a checkpoint's weights that it does not remove")
    before = contents(folder)
    with pytest.raises(InputError, match="would overwrite `pretrained_model_name_or_path` .*; choose another folder"):
        run(command(model_config=None, pretrained_model_name_or_path=folder / of) + more)
    assert contents(folder) == before


@pytest.mark.parametrize(
    "name",
    ["train_config.yaml", "metrics.jsonl", "starts.jsonl", ".lock", "samples.png", "checkpoint-2/manifest.json"],
)
def test_nothing_is_written_or_read_through_a_link(command, folder, tmp_path, name):
    target = tmp_path / "private"
    target.write_text("private")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    with pytest.raises(InputError, match=rf"{name} is a link to .*private, which this program does not follow"):
        run(command(max_train_steps=3))
    assert target.read_text() == "private"


@pytest.mark.parametrize("name", ["transformer", "samples", "checkpoint-2"])
def test_no_folder_is_a_link(command, folder, tmp_path, name):
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{name} is a link to .*elsewhere"):
        run(command(max_train_steps=3))
    assert contents(tmp_path / "elsewhere") == before


@pytest.mark.parametrize("name", [".lock", "train_config.yaml", "metrics.jsonl", "checkpoint-2/training_state.json"])
def test_a_pipe_does_not_hang_a_run(command, folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is a pipe or device"):
        run(command(max_train_steps=3))


@pytest.mark.parametrize("name", ["../../private", "/etc/passwd", "..", ""])
def test_a_manifest_names_only_files_of_its_checkpoint(folder, tmp_path, name):
    (tmp_path / "private").write_text("private")
    checkpoint = folder / "checkpoint-2"
    (checkpoint / "manifest.json").write_text(json.dumps({"size and CRC-32": {name: [7, 0]}}))
    assert "outside of the checkpoint" in find_damage(checkpoint)


@pytest.mark.parametrize(
    "table", ['{"size and CRC-32": 3}', "[1]", '{"size and CRC-32": {"a": 5}}', "[" * 100000, "\xff"]
)
def test_a_manifest_of_another_type_is_damage(folder, table):
    (folder / "checkpoint-2" / "manifest.json").write_text(table)
    assert find_damage(folder / "checkpoint-2")


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"step": "2"}, "step must be a whole number, not"),
        ({"step": True}, "step must be a whole number, not true"),
        ({"settings": [1]}, r"settings must be an object, not \[1\]"),
        ({"train_seconds": None}, "train_seconds must be a number, not null"),
        ({"callbacks": "generative_policy"}, "callbacks must be a list, not"),
        ({"lr_scheduler": None}, "lr_scheduler must be an object, not null"),
    ],
)
def test_a_training_state_of_other_types_is_named(command, folder, changes, problem):
    checkpoint = folder / "checkpoint-2"
    file = checkpoint / "training_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    training.write_manifest(checkpoint)
    with pytest.raises(InputError, match=rf"checkpoint-2 is damaged \(training_state.json: {problem}"):
        run(command(max_train_steps=3))


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe", b"[1, 2]\n", b'{"step": "1"}\n', b"null\n", b'{"loss_fm": 1}\n', b'{"step"']
)
def test_one_bad_row_of_the_metrics_does_not_end_a_run(tmp_path, bad):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss_fm": 2.0}\n' + bad + b'\n{"step": 2, "loss_fm": 1.0}\n{"step": 3}\n')
    MetricsFile(file, resume_step=2).log({"loss_fm": 0.5}, step=3)
    assert [row["step"] for row in read_metrics(file)] == [1, 2, 3]


def test_a_run_is_not_resumed_beyond_its_end(command, folder):
    before = contents(folder)
    with pytest.raises(InputError, match="`max_train_steps` 1 is below step 2 of .*checkpoint-2; give at least 2"):
        run(command(max_train_steps=1))
    assert contents(folder) == before


def fails_at(monkeypatch, step: int):
    """Lets the checkpoint of one step fail as on a full disk."""
    original = training.write_manifest

    def full(folder):
        if folder.name == f".checkpoint-{step}.tmp":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(folder)

    monkeypatch.setattr(training, "write_manifest", full)


def test_a_checkpoint_that_fails_can_stop_a_run(command, tmp_path, monkeypatch):
    fails_at(monkeypatch, 1)
    options = command(checkpointing_steps=1, max_train_steps=2)
    with pytest.raises(
        TrainingStopped, match="the checkpoint of step 1 could not be saved; make room and repeat the command"
    ):
        run(options + ["--stop_on_failed_checkpoint"])
    run(options)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.parametrize("action", ["renamed", "removed", "read-only"])
def test_a_folder_that_goes_away_is_a_sentence(command, tmp_path, monkeypatch, action):
    folder = tmp_path / "run"
    original = trainer_module.save_checkpoint

    def gone(*args):
        if action == "renamed":
            folder.rename(tmp_path / "elsewhere")
        elif action == "removed":
            shutil.rmtree(folder)
        else:
            refuse = OSError(errno.EROFS, os.strerror(errno.EROFS))
            monkeypatch.setattr(Path, "mkdir", lambda *a, **k: (_ for _ in ()).throw(refuse))
            monkeypatch.setattr(os, "access", lambda *a: False)
        return original(*args)

    monkeypatch.setattr(trainer_module, "save_checkpoint", gone)
    what = "could not be saved; (the folder has disappeared: put it back|make the folder writable)"
    with pytest.raises(TrainingStopped, match=what):
        run(command(max_train_steps=1))


def test_a_line_of_metrics_is_not_written_into_a_new_folder(tmp_path):
    (tmp_path / "run").mkdir()
    file = MetricsFile(tmp_path / "run" / "metrics.jsonl")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    with pytest.raises(TrainingStopped, match="the folder has disappeared: put it back or mount it again"):
        file.log({"loss_fm": 1.0}, step=1)
    assert not list((tmp_path / "run").iterdir())


def test_what_harms_nothing_may_be_in_a_new_folder(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "config.yaml").touch()
    claim_output_dir(VRPOConfig(output_dir=str(tmp_path), config=str(tmp_path / "config.yaml")), tmp_path, None)


@pytest.mark.slow
@pytest.mark.parametrize("refused", ["a file", "a link", "too few steps"])
def test_all_processes_agree_on_a_refusal(command, trainers, folder, tmp_path, refused):
    changes = {"train_batch_size": 8, "dataloader_num_workers": 0}
    if refused == "a file":
        remove_checkpoints(folder)
    elif refused == "a link":
        (folder / "samples.png").unlink()
        (folder / "samples.png").symlink_to(tmp_path / "private")
    else:
        changes["max_train_steps"] = 1
    before = contents(folder)
    trainer = trainers(command(**changes), processes=2)
    assert trainer.wait() == [1, 1]
    assert trainer.log.read_text().count("ended by InputError: `") == 2
    assert contents(folder) == before


# Commands beside training


PREPARE = [
    "--dataset",
    "digits",
    "--vae",
    "none",
    "--encoder",
    "digits",
    "--resolution",
    "8",
    "--dataloader_num_workers",
    "0",
]
SAMPLE = ["--num_images", "32", "--num_inference_steps", "1", "--output_format", "npz", "--batch_size", "32"]


@pytest.mark.parametrize("name", ["report", "sample", "prepare"])
def test_a_full_disk_ends_a_command_in_a_sentence(trainers, finished, tmp_path, name):
    target = tmp_path / "result"
    arguments = {"report": [finished, "--metric", "loss_fm"], "sample": [finished, *SAMPLE], "prepare": PREPARE}[name]
    command = [*arguments, "--output_dir", target]
    process = trainers(command, hook="no room at all", program=f"diffusers_vrpo.commands.{name}")
    assert process.wait() == [1]
    log = process.log.read_text()
    assert "Traceback" not in log, log
    assert f"error: --output_dir {target} cannot be written (" in log, log
    assert not [path for path in target.rglob("*.tmp")]
    trainers(command, program=f"diffusers_vrpo.commands.{name}").finish()


def test_a_result_that_cannot_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    from diffusers_vrpo.commands.evaluate import refuse_other_report, write_report
    from diffusers_vrpo.training.output_dir import writing_result

    file = tmp_path / "fid.json"
    write_report(file, '{"samples": {}, "metrics": {}, "settings": {}}')
    refuse_other_report(str(file))
    before = file.read_text()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = r"`output_file` .*fid.json cannot be written \(No space left on device\)"
        with pytest.raises(InputError, match=message), writing_result("output_file", file):
            write_report(file, "new")
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", ["mine", "[1]", '{"metrics": 3}', '{"accuracy": 0.9}'])
def test_evaluate_does_not_replace_another_file(tmp_path, content):
    from diffusers_vrpo.commands.evaluate import refuse_other_report

    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(
        InputError, match="mine.json already exists and is not a result of `vrpo evaluate`; choose another file"
    ):
        refuse_other_report(str(tmp_path / "mine.json"))


def test_a_report_does_not_replace_other_files_nor_follow_links(finished, folder, tmp_path):
    from diffusers_vrpo.commands.report import main

    arguments = ["--metric", "loss_fm", "--output_dir", str(tmp_path / "report")]
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "final.png").write_text("mine")
    with pytest.raises(SystemExit, match="--output_dir .*report holds final.png, not written by `vrpo report`"):
        main([str(finished), *arguments])
    assert (tmp_path / "report" / "final.png").read_text() == "mine"
    (tmp_path / "report" / "final.png").unlink()
    main([str(finished), *arguments])
    main([str(finished), *arguments])  # its own files are replaced
    grid = next((folder / "samples").glob("*.png"))
    grid.rename(tmp_path / "private.png")
    grid.symlink_to(tmp_path / "private.png")
    main([str(folder), *arguments])
    assert "data:image/png" not in (tmp_path / "report" / "report.html").read_text().split("<h2>Samples</h2>")[-1]
    for name in ("train_config.yaml", "metrics.jsonl", "starts.jsonl"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(SystemExit, match="cannot be read .*it is a link to another file"):
            main([str(folder), *arguments])
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)


@pytest.mark.parametrize("name", ["manifest.json", "000003.png", "parts"])
def test_samples_are_not_written_through_links(finished, tmp_path, name):
    from diffusers_vrpo.commands.sample import main

    target = tmp_path / "samples"
    command = [str(finished), "--num_images", "2", "--num_inference_steps", "1", "--output_dir", str(target)]
    main(command)
    (tmp_path / "private").write_text("private")
    (target / name).unlink(missing_ok=True)
    (target / name).symlink_to(tmp_path / "private")
    with pytest.raises(SystemExit, match="is a link to"):
        main(command)
    assert (tmp_path / "private").read_text() == "private"


@pytest.mark.parametrize(
    "changes",
    [{"options": 3}, {"options": {"num_images": "2"}}, {"versions": []}, {"format": "1"}, {"pipeline_checksum": None}],
)
def test_a_manifest_of_samples_of_other_types_is_named(finished, tmp_path, changes):
    from diffusers_vrpo.commands.sample import main
    from diffusers_vrpo.pipelines.sample_folder import FORMAT

    options = {"num_images": 2, "batch_size": 2, "output_format": "png"}
    manifest = {"format": FORMAT, "options": options, "versions": {}, "pipeline_checksum": 1, "labels": []} | changes
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SystemExit, match=f"manifest.json is not a manifest of samples .*{next(iter(changes))}"):
        main(
            [
                str(finished),
                "--num_images",
                "2",
                "--num_inference_steps",
                "1",
                "--output_dir",
                str(tmp_path / "samples"),
            ]
        )


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"transformer": 3}, "transformer must be"),
        ({"transformer": ["diffusers_vrpo"]}, "transformer must be"),
        ({"transformer": [1, 2]}, "transformer must be"),
        ({"id2label": ["a"]}, "id2label must map class ids to names"),
        ({"id2label": {"cat": "0"}}, 'id2label has the key "cat"'),
        ({"id2label": {"0": 1}}, "id2label 0 must be text, not 1"),
    ],
)
def test_a_model_index_of_other_types_is_named(folder, tmp_path, changes, problem):
    from diffusers_vrpo.commands.sample import main

    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SystemExit, match=f"model_index.json is not that of a pipeline: {problem}"):
        main([str(folder), "--num_images", "1", "--output_dir", str(tmp_path / "samples")])


@pytest.mark.parametrize("text", ["[1]", "3", "null", '"text"', "{", "\xff"])
def test_a_model_index_that_is_no_object_is_a_sentence(folder, tmp_path, text):
    from diffusers_vrpo.commands.sample import main

    (folder / "model_index.json").write_text(text, encoding="latin-1")
    with pytest.raises(SystemExit, match="error: PIPELINE|error: .*model_index.json"):
        main([str(folder), "--num_images", "1", "--output_dir", str(tmp_path / "samples")])


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"num_layers": "2"}, 'num_layers must be a whole number, not "2"'),
        ({"num_layers": 2.5}, "num_layers must be a whole number"),
        ({"num_layers": True}, "num_layers must be a whole number"),
        ({"num_attention_heads": [2]}, "num_attention_heads must be a whole number"),
    ],
)
def test_a_model_config_of_other_types_is_named(command, tmp_path, changes, problem):
    options = command()
    (tmp_path / "model.json").write_text(json.dumps(json.loads((tmp_path / "model.json").read_text()) | changes))
    with pytest.raises(InputError, match=f"`model_config` .*model.json: {problem}"):
        run(options)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"num_layers": -1}, "num_layers -1 must be a whole number from 1"),
        ({"num_layers": 10**6}, "num_layers 1000000 must be"),
        ({"patch_size": 0}, "patch_size 0 must be"),
        ({"mlp_ratio": -1.0}, "mlp_ratio -1.0 must be a number above 0"),
        (
            {"num_layers": 900, "attention_head_dim": 4096, "num_attention_heads": 64},
            "num_layers 900 of width .* billion",
        ),
    ],
)
def test_sizes_in_a_model_config_are_judged_before_anything_is_built(tmp_path, changes, problem):
    (tmp_path / "model.json").write_text(json.dumps(changes))
    with pytest.raises(InputError, match=f"`model_config` .*model.json: {problem}"):
        transformer_config(None, str(tmp_path / "model.json"))


def test_a_model_config_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("pipe", ".", "nowhere.json"):
        with pytest.raises(InputError, match="`model_config` .* cannot be read"):
            transformer_config(None, str(tmp_path / path))


META = {
    "format": 1,
    "complete": True,
    "config": {
        "count": 1,
        "chunk_rows": 1,
        "kind": "latents",
        "latent_shape": [3, 8, 8],
        "flip": False,
        "images": "none",
        "features": [],
    },
    "about": {"vae": "none", "num_classes": 1, "class_names": None},
    "corrupt_rows": [],
    "checksums": [1],
}


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"config": []}, r"config must be an object, not \[\]"),
        ({"config": META["config"] | {"latent_shape": "3x8x8"}}, "config.latent_shape must be a list"),
        ({"about": {"vae": "none"}}, "about.num_classes is missing"),
        ({"about": META["about"] | {"class_names": "cat"}}, "about.class_names must be a list or null"),
        ({"complete": "yes"}, "complete must be true or false"),
        ({"checksums": ["a"]}, r"checksums\[0\] must be a whole number"),
        ({"checksums": None}, "checksums must be a list"),
        ({"format": "1"}, "format must be a whole number"),
    ],
)
def test_the_meta_of_a_cache_of_other_types_is_named(tmp_path, changes, problem):
    (tmp_path / "meta.json").write_text(json.dumps(META | changes))
    with pytest.raises(InputError, match=f"meta.json is damaged .*{problem}"):
        read_meta(tmp_path, "latents_dir")
    (tmp_path / "meta.json").unlink()
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(InputError, match="meta.json is damaged .*not a regular file"):
        read_meta(tmp_path, "latents_dir")


def test_only_a_finished_cache_needs_checksums(tmp_path):
    meta = {name: value for name, value in META.items() if name not in ("checksums", "corrupt_rows")}
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"complete": False}))
    assert read_meta(tmp_path, "latents_dir")["config"] == META["config"]
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="meta.json is damaged .corrupt_rows is missing"):
        read_meta(tmp_path, "latents_dir")


def test_the_meta_of_a_cache_may_be_a_link_of_the_hubs_folder(tmp_path):
    (tmp_path / "blob").write_text(json.dumps(META))
    (tmp_path / "meta.json").symlink_to(tmp_path / "blob")
    assert read_meta(tmp_path, "dataset") == META
