#!/usr/bin/env python
# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Run bad inputs through all commands and Python calls, and count those that end in one sentence within ten seconds.

    python benchmarks/bad_inputs.py                    # all cases of bad_inputs_cases.py
    python benchmarks/bad_inputs.py --only train       # those whose name contains a text
    python benchmarks/bad_inputs.py --every 20         # a sample

Every case runs in a process that is forked from one that has imported everything, in its own copy of small files, with a
limit of time and memory and without the network. The ten seconds begin with the fork: importing torch and diffusers, which
every command does first, comes on top. The time in which the process could have run but other programs had all processors (the
second number of /proc/PID/schedstat) does not count; waiting for anything else does. A case ends in one of these ways:

- sentence: an error of this package (in Python also diffusers' OSError about a file that a pipeline lacks), whose last line is
  one sentence that names the option, argument or file;
- unclear: an error whose last line does not name what is wrong;
- traceback, accepted, too slow, killed;
- wrote: the case changed files that were there, wrote outside the working directory, or ran code from a file.

The program exits with 1 if fewer than 97 % of the cases end in a sentence, or if any case ends with a traceback, is accepted or
writes what it must not. Cases that should work with a warning are a group of their own.
"""

import argparse
import collections
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[1]
SCRATCH = Path(tempfile.mkdtemp(prefix="bad-inputs-"))
# Read when the libraries are imported: no network, no caches of this machine, one thread.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(SCRATCH / "hf"),
    "HOME": str(SCRATCH / "home"),
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
}
sys.path.insert(0, str(Path(__file__).parent))

from bad_inputs_cases import BASES, Case, all_cases  # noqa: E402
from bad_inputs_files import OPTIONS, change, write_bad_files, write_good_files  # noqa: E402


SECONDS = 10
MEMORY = 6 << 30  # bytes that a case may allocate beyond those of the process that it is forked from
SHARE = 0.97
MANY_LINES = 10  # a case whose sentence follows more lines of the log is shown, too
PASSING = ("sentence", "warned")


def import_everything():
    """Imports all modules of the package, so that forked processes need not import them."""
    import importlib
    import pkgutil

    import diffusers_vrpo

    for module in pkgutil.walk_packages(diffusers_vrpo.__path__, "diffusers_vrpo."):
        importlib.import_module(module.name)
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import peft  # noqa: F401
    import tensorboard  # noqa: F401


def command_line(case: Case) -> list[str]:
    """The words of a command: those of its base, with options that the case replaces, adds, or removes (`~--name`)."""
    positional, options = split_options(shlex.split(BASES[case.command]))
    own_positional, changes = split_options(shlex.split(case.changes))
    for name, values in changes.items():
        if name.startswith("~"):
            options.pop(name[1:], None)
        else:
            options[name] = values
    words = own_positional or positional
    return [*words, *(word for name, values in options.items() for word in (name, *values))]


def split_options(words: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words before the first flag, and the flags with their values."""
    positional: list[str] = []
    options: dict[str, list[str]] = {}
    current = positional
    for word in words:
        if re.match("~?--", word):
            name, equals, value = word.partition("=")
            current = options.setdefault(name, [])
            if equals:
                current.append(value)
        else:
            current.append(word)
    return positional, options


def run_command(case: Case):
    """Runs a command in this process, as its program does."""
    from diffusers_vrpo.cli import main

    main([*case.command.split(), *command_line(case)])


def run_python(case: Case):
    """Evaluates a Python call with the names of the package."""
    import numpy as np
    import torch

    import diffusers_vrpo
    from diffusers_vrpo.data.sources import load_training_data
    from diffusers_vrpo.evaluation import compare, image_encoders, metrics

    names = {name: getattr(diffusers_vrpo, name) for name in diffusers_vrpo.__all__}
    names |= {"np": np, "torch": torch, "metrics": metrics, "compare": compare, "image_encoders": image_encoders}
    names |= {"load_training_data": load_training_data, "nan": float("nan"), "inf": float("inf"), "Path": Path}

    def opened(folder="pipe"):
        pipeline = names["VRPOPipeline"].from_pretrained(folder)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    names["opened"] = opened
    names["train"] = lambda **options: names["VRPOTrainer"](
        args=names["VRPOConfig"](
            **{
                "output_dir": "out",
                "dataset_name": "digits",
                "resolution": 8,
                "vae": "none",
                "model_config": "model.json",
                "encoder": ["digits"],
                "max_train_steps": 1,
                "report_to": "none",
                "dataloader_num_workers": 0,
                **options,
            }
        )
    )
    try:
        eval(case.changes, names)
    except (ValueError, TypeError, OSError) as error:
        # The published files do not use the package and raise ValueError. Errors of other libraries do not count as sentences,
        # except the OSError of diffusers about a file or name, which people who open pipelines know.
        last = traceback.extract_tb(error.__traceback__)[-1]
        if "diffusers_vrpo" not in last.filename and not ("/diffusers/" in last.filename and type(error) is OSError):
            raise
        sys.exit(f"python: error: {error}")


def vm_size() -> int:
    """The address space of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def in_child(function, log: Path, folder: Path, seconds: float, memory: int | None) -> tuple[int | None, float]:
    """Runs a function in a forked process; returns its wait status, None if it took too long, and the seconds."""
    begin, crowded = time.monotonic(), 0.0
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(folder)
            if memory is not None:
                resource.setrlimit(resource.RLIMIT_AS, (vm_size() + memory,) * 2)
            function()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while (spent := time.monotonic() - begin - crowded) < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, spent
        crowded = seconds_ready(pid)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, spent


def seconds_ready(pid: int) -> float:
    """The seconds in which the main thread of a process was ready to run while other programs had all processors."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9


def snapshot(folder: Path) -> dict:
    """What identifies each file of a folder; links are not followed."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            about = path.lstat()
            found[str(path)] = (about.st_size, about.st_mtime_ns, about.st_ino)
    return found


def last_line(text: str) -> str:
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def run_case(case: Case, files: Path, folder: Path) -> tuple[str, str, float, int]:
    """Runs a case in a copy of the files; returns how it ended, its last line, the seconds, and the number of lines."""
    shutil.copytree(files, folder, symlinks=True)
    here = os.getcwd()
    os.chdir(folder)
    try:
        for given in case.given:
            change(given)
    finally:
        os.chdir(here)
    before = snapshot(folder)
    log = folder.with_suffix(".log")
    function = run_python if case.command == "python" else run_command
    status, seconds = in_child(lambda: function(case), log, folder, SECONDS, MEMORY)
    text = log.read_text(errors="replace")
    after = snapshot(folder)
    # A run that is refused may have locked its folder.
    changed = [name for name, about in before.items() if after.get(name) != about and not name.endswith("/.lock")]
    outside = [name for name in after.keys() - before.keys() if "/outside/" in name]
    shutil.rmtree(folder, ignore_errors=True)
    lines, line = len(text.splitlines()), last_line(text)
    if status is None:
        return "too slow", line, seconds, lines
    if os.WIFSIGNALED(status):
        return "killed", f"signal {os.WTERMSIG(status)}; {line}", seconds, lines
    refused = os.waitstatus_to_exitcode(status) != 0
    ran_code = any(name.endswith("ran-code") for name in after)
    if outside or ran_code or (changed and (refused or not case.may_write)):
        where = ", ".join(map(str, ["ran code"] * ran_code + outside + changed))[:300]
        return "wrote", f"{where}; {line}", seconds, lines
    if "Traceback (most recent call last)" in text:
        return "traceback", line, seconds, lines
    if not refused:
        is_warned = case.expected == "warned" and re.search(case.names, text)
        return "warned" if is_warned else "accepted", line, seconds, lines
    is_sentence = re.match(r"[\w./ -]+: error: \S", line) and len(line) < 1500
    return "sentence" if is_sentence and re.search(case.names, line) else "unclear", line, seconds, lines


def make_files(folder: Path):
    """Writes the files that all cases copy, in a forked process, so that this process has no threads."""
    folder.mkdir()

    def make():
        write_bad_files()
        write_good_files()
        run_command(Case("train", OPTIONS, ""))

    status, _ = in_child(make, folder.with_suffix(".log"), folder, 300, None)
    if status != 0:
        sys.exit(f"the files cannot be made:\n{folder.with_suffix('.log').read_text()[-3000:]}")


def run_all(cases: list[Case], show=print) -> dict[str, collections.Counter]:
    """Runs the cases and shows those that do not end as expected; returns how many ended in each way, by expectation."""
    import_everything()
    files = SCRATCH / "files"
    make_files(files)
    counts: dict[str, collections.Counter] = {"sentence": collections.Counter(), "warned": collections.Counter()}
    for number, case in enumerate(cases):
        ended, line, seconds, lines = run_case(case, files, SCRATCH / f"case-{number}")
        counts[case.expected][ended] += 1
        if ended != case.expected or (ended == "sentence" and lines > MANY_LINES):
            about = f"{seconds:.1f} s, {lines} lines"
            show(f"{ended} ({about}), item {case.item}: {case}\n    {line[:400]}", flush=True)
    return counts


def verdict(counts: dict[str, collections.Counter]) -> tuple[float, bool]:
    """The share of refused inputs that end in a sentence, and whether that and all others are good enough."""
    refused = counts["sentence"]
    share = refused["sentence"] / max(1, refused.total())
    never = [refused[kind] for kind in ("traceback", "accepted", "wrote")]
    never += [counts["warned"][kind] for kind in ("traceback", "wrote")]
    return share, share >= SHARE and not any(never)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the cases whose command and options contain this text")
    parser.add_argument("--every", type=int, default=1, help="run every n-th case")
    parser.add_argument("--first", type=int, default=0, help="number of the first case to run, counted from 0")
    args = parser.parse_args()
    cases = [case for case in all_cases() if args.only in str(case)][args.first :: args.every]
    try:
        counts = run_all(cases)
    finally:
        shutil.rmtree(SCRATCH, ignore_errors=True)
    share, is_good = verdict(counts)
    for expected, ways in counts.items():
        print(
            f"expected: {expected}: {ways.total()} cases; {', '.join(f'{n} {way}' for way, n in ways.most_common())}"
        )
    print(f"{100 * share:.1f} % end in one sentence within {SECONDS} s")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
