# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.

import signal

from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)


class InputError(ValueError):
    """Raised when an argument, an option or a file cannot be used.

    Args:
        field (`str`, *optional*): the name of the wrong argument or option, such as `"encoder"`; None if the problem
            is elsewhere, such as in a damaged file.
        message (`str`): one sentence that names the field, its value and what would work. Field names are in
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
    """Explains that a repository is gated and how to get access; `page` is its address as in `hub_problem`."""
    return f"it is gated; accept its terms at https://huggingface.co/{page} and run `hf auth login` (or set HF_TOKEN)"


def causes(error: BaseException) -> list[BaseException]:
    """Returns an exception, followed by the chain of its causes."""
    chain = [error]
    while (parent := chain[-1].__cause__ or chain[-1].__context__) is not None and parent not in chain:
        chain.append(parent)
    return chain


def hub_problem(error: BaseException, page: str) -> str | None:
    """Explains why a request to the Hub failed and what to do; None if the exception is of another kind.

    Args:
        error: the exception, whose causes are examined, too.
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
    """Raised when a run cannot continue. The message says in one sentence what happened and what to do."""


class TrainingInterrupted(TrainingStopped):
    """Raised when a signal has ended a run, after a checkpoint was saved. The same command continues the run.

    Attributes:
        signum (`int`): the number of the signal.
        step (`int`): the step at which the checkpoint was saved.
    """

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name}: the same command continues from step {step}")
        self.signum, self.step = signum, step
