# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.

import signal

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


class InputError(ValueError):
    """Input that cannot work.

    Args:
        field (`str`, *optional*): the argument or option that is wrong, such as `"encoder"`; None where the problem is
            not in one of them, such as a damaged file.
        message (`str`): one sentence that names the field, its value and what would work. Names of fields stand in
            backticks; the command line shows them as flags (`command_line.with_flags`).
    """

    def __init__(self, field: str | None, message: str):
        super().__init__(message)
        self.field = field

    def __reduce__(self):
        return type(self), (self.field, str(self))


UNKNOWN_TO_THE_HUB = "it is neither a folder here nor known to the Hub (a private one needs `hf auth login`)"
HUB_OUT_OF_REACH = (
    "it is neither a folder here nor in the cache, and the Hub cannot be reached; go online or give a folder"
)


def gated(page: str) -> str:
    return f"it is gated; accept its terms at https://huggingface.co/{page} and run `hf auth login` (or set HF_TOKEN)"


def causes(error: BaseException) -> list[BaseException]:
    """An exception and its causes."""
    chain = [error]
    while (parent := chain[-1].__cause__ or chain[-1].__context__) is not None and parent not in chain:
        chain.append(parent)
    return chain


def hub_problem(error: BaseException, page: str) -> str | None:
    """Explains a failed download from the Hub and what to do, from an exception or its causes; else None.

    Args:
        page: the address of the repository, relative to https://huggingface.co/.
    """

    def is_any(*types):
        return any(isinstance(link, types) for link in causes(error))

    if is_any(GatedRepoError):
        return gated(page)
    if is_any(RepositoryNotFoundError):
        return UNKNOWN_TO_THE_HUB
    if is_any(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return HUB_OUT_OF_REACH
    return None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, to quote in a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(" .:") if lines else type(error).__name__


class TrainingStopped(RuntimeError):
    """The run cannot continue; the message is one sentence about its state and the remedy."""


class TrainingInterrupted(TrainingStopped):
    """A signal has ended the run, after a checkpoint was saved; the same command continues it.

    Attributes:
        signum (`int`): the signal.
        step (`int`): the step of the checkpoint.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: the same command continues from step {step}")
        self.signum, self.step = signum, step
