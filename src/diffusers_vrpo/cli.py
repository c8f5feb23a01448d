# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The command `vrpo`, which has all programs as subcommands."""

import difflib
import os
import sys
from importlib import import_module

from . import __version__
from .files import packaged


# The commands and their descriptions. A command calls `main(argv, prog)` of its module in `commands`.
COMMANDS = {
    "train": "train a transformer, with or without alignment",
    "plan": "compute the memory, disk and time that a training run needs, without a GPU",
    "prepare": "encode a data set once, for train --latents_dir",
    "latents": "verify what prepare has written, export it to the Hub, or import it",
    "sample": "draw many images from a pipeline, as PNG files or an .npz",
    "evaluate": "measure FID and other metrics of images against a reference",
    "fid": "sample and evaluate in one command",
    "probe": "measure linear probes and CKNNA of a transformer's blocks",
    "layers": "suggest which block to align with which layer of an encoder",
    "convert": "convert checkpoints of SiT, REPA, iREPA and DiT to pipelines, or back",
    "report": "compare training runs: quality against steps, time and FLOPs",
    "push": "publish a run or a pipeline on the Hub",
    "app": "open a page in the browser that samples from a pipeline",
}
# Commands that share their work among several processes.
LAUNCHED = ("train", "prepare", "sample", "evaluate", "fid", "probe")
# Commands whose options are parsed by a module that does not import torch, and the names of these modules.
PARSED_FIRST = {"train": "train", "sample": "sample_options"}
USAGE = """usage: vrpo COMMAND [options]
       vrpo {launched} [options of `accelerate launch`] -- [options]

Train, sample, measure and publish class-conditional diffusion transformers with representation alignment.

commands:
{commands}

`vrpo COMMAND --help` shows the options of a command, and `vrpo --version` the version.

A first run, which takes about five minutes on a CPU, and images from it:

    pip install 'diffusers-vrpo[train]'
    vrpo train --config digits
    vrpo sample outputs/digits --num_images 100 --output_dir samples

`train` uses all GPUs of the machine. Options before a -- are those of `accelerate launch`:

    vrpo train --num_processes 1 -- --config digits
    vrpo train --config_file fsdp2 --num_processes 8 -- --config sit-xl-2-vrpo
    vrpo sample --multi_gpu -- sit-xl --num_images 50000 --output_dir samples

Help texts and errors name pages such as docs/method.md. They are at
https://github.com/diffusers-vrpo/diffusers-vrpo/tree/main/docs"""


def launch(name: str, launcher: list[str], argv: list[str]):
    """Replaces this process by `accelerate launch`, so that signals and exit codes are those of the launcher.

    Args:
        name: the command.
        launcher: options of `accelerate launch`; its `--config_file` may also name a file of `configs/accelerate`.
        argv: the options of the command.
    """
    from .command_line import is_configured

    launcher = list(launcher)
    for i, word in enumerate(launcher[1:], 1):
        known = packaged("configs") / "accelerate" / f"{word}.yaml"
        if launcher[i - 1] == "--config_file" and not os.path.isfile(word) and known.is_file():
            launcher[i] = str(known)
    given = {word.split("=")[0].replace("-", "_").strip("_") for word in launcher}
    if "config_file" not in given and not is_configured():
        # These are accelerate's own defaults, which it would warn about if they were not given.
        for option, value in {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}.items():
            launcher += [] if option in given else [f"--{option}", value]
    # `-q` suppresses the launcher's traceback after the command's error message.
    module = ["-m", f"diffusers_vrpo.commands.{name}"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "-q", *launcher, *module, *argv]
    sys.stdout.flush()
    os.execv(command[0], command)


def run(name: str, argv: list[str]):
    """Runs a command in this process, or in as many processes as its launcher options ask for."""
    prog = f"vrpo {name}"
    if name in LAUNCHED and "--" in argv:
        split = argv.index("--")
        return launch(name, argv[:split], argv[split + 1 :])
    from .command_line import missing_extras

    with missing_extras(prog):
        # A wrong option or a call for help ends the process here, before torch is imported.
        if name in PARSED_FIRST:
            import_module(f"diffusers_vrpo.commands.{PARSED_FIRST[name]}").parse_args(argv, prog)
        command = import_module(f"diffusers_vrpo.commands.{name}")
        if name == "train":
            launcher = command.launcher_options()
            if launcher is not None:
                return launch(name, launcher, argv)
        command.main(argv, prog=prog)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        commands = "\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items())
        print(USAGE.format(commands=commands, launched="|".join(LAUNCHED)))
    elif name == "--version":
        print(__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
        sys.exit(f"vrpo: error: no command is named {name!r}; {hint}")
    else:
        run(name, rest)


if __name__ == "__main__":
    main()
