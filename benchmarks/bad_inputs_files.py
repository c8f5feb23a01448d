# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Writes the small files with which the cases of bad_inputs.py start: good ones in their places, damaged ones in `bad/`."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path


OPTIONS = (
    "--output_dir run --dataset_name digits --resolution 8 --vae none --model_config model.json --encoder digits "
    "--projector_dim 32 --train_batch_size 16 --max_train_steps 2 --logging_steps 1 --num_inference_steps 1 "
    "--num_validation_images 1 --dataloader_num_workers 0 --report_to none"
)


class RunsCode:
    """An object whose pickle creates a file called `ran-code` when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch ran-code",)


def npz_of_huge_array() -> bytes:
    """An npz whose header promises 10 TB of images."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (50000000, 256, 256, 3), }"
    header = header.ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("arr_0.npy", content)
    return buffer.getvalue()


def npz_of_zeros() -> bytes:
    """An npz of 1 MB that unpacks to 1 GB, as its header says."""
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (5000, 256, 256, 3), }".ljust(117) + "\n"
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file,
        file.open("arr_0.npy", "w", force_zip64=True) as out,
    ):
        out.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode())
        for _ in range(960):
            out.write(bytes(1 << 20))
    return buffer.getvalue()


def safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header


BAD = {
    "empty": b"",
    "garbage": bytes(range(256)) * 16,
    "zeros": bytes(4096),
    "text": b"These are not the weights that you are looking for.\n",
    "page": b"<!DOCTYPE html><html><body>404: not found</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 534695576\n",
    "json_list": b"[1, 2, 3]",
    "json_number": b"7",
    "json_cut": b'{"a": 1, "b": ',
    "json_deep": b"[" * 100_000 + b"]" * 100_000,
    "json_nan": b'{"num_layers": NaN}',
    "json_huge": b'{"num_layers": 1' + b"0" * 400 + b"}",
    "yaml_list": b"- seed\n- 0\n",
    "yaml_python": b"seed: !!python/object/apply:os.system ['touch ran-code']\n",
    "yaml_bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n".encode() for p, c in zip("abcdefgh", "bcdefghi")),
    "yaml_tab": b"seed:\t0\n\tresolution: 8\n",
    "yaml_latin": b"output_dir: caf\xe9\n",
    "metrics": b'{"step": 1, "loss_fm": 1.0}\n\xff\n{"step": 2, "loss_fm": 0.5}\n',
    "pickle": pickle.dumps({"model": RunsCode()}),
    "safetensors_huge": safetensors(b"", 1 << 62),
    "safetensors_lies": safetensors(
        b'{"x":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    ),
    "safetensors_list": safetensors(b"[]"),
    "zip_garbage": b"PK\x03\x04" + bytes(200),
    "parquet_cut": b"PAR1" + bytes(64) + b"PAR1",
    "tar": b"train.tar".ljust(512, b"\0"),
    "npz_huge": npz_of_huge_array,
    "npz_zeros": npz_of_zeros,
}


def write_images(folder: Path, names: list[str], size=(12, 12), first: int = 0):
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names, first):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def write_good_files():
    """Writes the good files into the working directory."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler

    import diffusers_vrpo
    from diffusers_vrpo import SiTTransformer2DModel, VRPOPipeline
    from diffusers_vrpo.cli import main
    from diffusers_vrpo.models import ddpm

    tiny = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    Path("model.json").write_text(json.dumps(tiny))
    for name in ("cat", "dog"):
        write_images(Path("images") / name, [f"{i}.png" for i in range(6)], first=10 * len(name) + ord(name[0]))
    write_images(Path("flat"), [f"{i}.png" for i in range(16)], (8, 8))
    write_images(Path("flat2"), [f"{i}.png" for i in range(16)], (8, 8), first=100)
    write_images(Path("mixed"), ["0.png"], (8, 8))
    write_images(Path("mixed"), ["1.png"], (9, 7))
    np.savez("samples.npz", arr_0=np.random.default_rng(0).integers(0, 255, (16, 8, 8, 3), dtype=np.uint8))
    np.savez("floats.npz", arr_0=np.full((16, 8, 8, 3), np.nan))
    np.savez("object.npz", arr_0=np.array([RunsCode()], dtype=object))
    np.savez("other_key.npz", images=np.zeros((2, 8, 8, 3), np.uint8))

    torch.manual_seed(0)
    sizes = {**tiny, "sample_size": 8, "num_classes": 10}
    for name, config in (
        ("pipe", {"in_channels": 3}),
        ("latent_pipe", {"in_channels": 4}),
        ("unguided_pipe", {"in_channels": 3, "class_dropout_prob": 0.0}),
        ("noise_pipe", {"in_channels": 3, "prediction_type": "epsilon"}),
    ):
        model = SiTTransformer2DModel(**sizes, **config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        betas = {key: ddpm.SCHEDULER_CONFIG[key] for key in ("beta_start", "beta_end")}
        scheduler = FlowMatchEulerDiscreteScheduler()
        if name == "noise_pipe":
            scheduler = DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
        VRPOPipeline(model, scheduler, id2label={i: f"digit {i}" for i in range(10)}).save_pretrained(name)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).save_pretrained("vae")
    shutil.copytree(Path(diffusers_vrpo.__file__).parent / "assets" / "digits_encoder", "encoder")

    png = Path("flat/0.png").read_bytes()
    images = pa.array([{"bytes": png, "path": None}] * 6, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    tables = {
        "table": {"image": images, "label": [0, 1, 0, 1, 0, 1]},
        "table_other_columns": {"picture": images, "kind": [0, 1] * 3},
        "table_gaps": {"image": images, "label": [0, 1, 7, 7, 1, 0]},
        "table_negative": {"image": images, "label": [0, -1] * 3},
        "table_null": {"image": images, "label": [0, None] * 3},
        "table_float": {"image": images, "label": [0.5, 1.5] * 3},
        "table_text_images": {"image": ["a.png"] * 6, "label": [0, 1] * 3},
        "table_path": {
            "image": [{"bytes": None, "path": str(Path("outside/secret.png").resolve())}] * 6,
            "label": [0, 1] * 3,
        },
        "table_zero_device": {"image": [{"bytes": None, "path": "/dev/zero"}] * 6, "label": [0, 1] * 3},
        "table_garbage": {"image": [{"bytes": b"garbage", "path": None}] * 6, "label": [0, 1] * 3},
    }
    for name, columns in tables.items():
        Path(name).mkdir()
        # As `datasets` writes it: the column holds images, and other columns say their own type.
        table = pa.table(columns)
        if isinstance(columns.get("image"), pa.Array):
            kind = {"_type": "Value", "dtype": str(table["label"].type).replace("double", "float64")}
            metadata = {
                "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": kind}}})
            }
            table = table.replace_schema_metadata(metadata)
        pq.write_table(table, f"{name}/train.parquet")

    for argv in (
        "convert pipe official.pt --to sit",
        "prepare --train_data_dir images --vae vae --resolution 8 --output_dir cache --dataloader_num_workers 0",
        "latents export --latents_dir cache --output_dir export",
    ):
        try:
            main(argv.split())
        except SystemExit as error:
            if error.code:
                raise RuntimeError(f"{argv}: {error.code}") from error
    state = torch.load("official.pt", weights_only=True)
    name = next(iter(state))
    torch.save({**state, name: torch.full_like(state[name], torch.nan)}, "nan.pt")
    torch.save({key: value.long() for key, value in state.items()}, "integers.pt")
    torch.save({key: value for key, value in state.items() if key != name}, "lacking.pt")
    torch.save({**state, "foreign.weight": torch.zeros(3)}, "foreign.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save({"epoch": 3, "lr": 0.1}, "numbers.pt")


def write_bad_files():
    """Writes `bad/` and `outside/` into the working directory."""
    Path("bad").mkdir()
    for name, content in BAD.items():
        (Path("bad") / name).write_bytes(content() if callable(content) else content)
    outside = Path("outside")
    write_images(outside, ["secret.png"], (8, 8))
    (outside / "private.txt").write_text("private\n")


def change(given: str):
    """Changes a file: `A = B` copies B to A, `A -> B` makes a link, `A : text` writes, `A -` removes, `A |` makes a fifo.

    `{private}` is the path of a file outside the working directory.
    """
    target, operator, source = (given + " ").split(" ", 2)
    path, source = Path(target), source.strip().replace("{private}", str(Path("outside/private.txt").resolve()))
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if operator == "=":
        shutil.copytree(source, path) if Path(source).is_dir() else shutil.copyfile(source, path)
    elif operator == "->":
        path.symlink_to(source)
    elif operator == ":":
        path.write_text(source.encode().decode("unicode_escape"))
    elif operator == "|":
        os.mkfifo(path)
    elif operator != "-":
        raise ValueError(given)
