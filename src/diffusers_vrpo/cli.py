# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The command `vrpo`, with all programs as subcommands."""

import difflib
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path


# Commands and their descriptions. Each calls `main(argv, prog)` of its module; `train` runs `accelerate launch`.
COMMANDS = {
    "train": "train a transformer, with or without alignment (train_vrpo.py)",
    "plan": "compute memory, disk and time of a training, without a GPU",
    "prepare": "encode a data set once, for train --latents_dir",
    "latents": "verify what prepare has written, export it to the Hub, import it",
    "sample": "draw many images from a pipeline, as PNG files or an .npz",
    "evaluate": "measure FID and other metrics of images against a reference",
    "probe": "measure linear probes and CKNNA of a transformer's blocks",
    "layers": "suggest which block to align with which layer of an encoder",
    "convert": "convert checkpoints of SiT, REPA, iREPA and DiT to pipelines and back",
    "report": "compare training runs: quality against steps, time and FLOPs",
    "push": "publish a run or a pipeline on the Hub",
}
USAGE = """usage: vrpo COMMAND [options]
       vrpo train [options of `accelerate launch` --] [options]

Train, sample, measure and publish class-conditional diffusion transformers with representation alignment.

commands:
{commands}

`vrpo COMMAND --help` shows the options of a command, `vrpo --version` the version.

    vrpo train --config configs/digits.yaml
    vrpo train --multi_gpu --num_processes 8 -- --dataset_name ILSVRC/imagenet-1k --vae stabilityai/sd-vae-ft-ema ...
    vrpo sample outputs/digits --num_images 100 --output_dir samples"""


def train_script() -> Path:
    """The path of `train_vrpo.py`: in the package if installed from a wheel, else at the top of the checkout."""
    beside = Path(__file__).with_name("train_vrpo.py")
    return beside if beside.is_file() else Path(__file__).parents[2] / "train_vrpo.py"


def train(argv: list[str]):
    """Replaces this process by `accelerate launch`, so that signals and exit codes are those of the launcher."""
    split = argv.index("--") if "--" in argv else 0
    launcher, options = argv[:split], argv[split + ("--" in argv) :]
    command = [sys.executable, str(train_script()), *options]
    if not {"-h", "--help"} & set(options):
        # `-q` suppresses the launcher's traceback after the trainer's error message.
        command[1:1] = ["-m", "accelerate.commands.launch", "-q", *launcher]
    sys.stdout.flush()
    os.execv(command[0], command)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE.format(commands="\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())))
    elif name == "--version":
        print(version("diffusers-vrpo"))
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        sys.exit(f"vrpo: error: no command is named {name!r}; {hint}")
    elif name == "train":
        train(rest)
    else:
        import_module(f"diffusers_vrpo.commands.{name}").main(rest, prog=f"vrpo {name}")


if __name__ == "__main__":
    main()
