# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Publish the folder of a pipeline or a run on the Hub, with a model card made from its files.

    vrpo push outputs/sit-xl --hub_model_id org/sit-xl-vrpo

Only the pipeline, its code, adapters, sample grid, curves, metrics and evaluations are published. The token is that of
`hf auth login` or HF_TOKEN.
"""

import errno
import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path

import jinja2
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.repocard import metadata_load

from ..errors import InputError, causes, first_line
from .card import public_json, public_name, pushes_adapters_only, read_mapping, read_run, render_card


logger = logging.getLogger(__name__)
WAITS = (2, 8, 30, 60)  # delays in seconds between retries after a transient error
RUN_FILES = ("samples.png", "training.png", "metrics.jsonl")
# Programming errors, which are neither retried nor explained as a problem of the Hub.
DEFECTS = (TypeError, LookupError, AttributeError, NameError, AssertionError, jinja2.TemplateError)
ADAPTERS = "pytorch_lora_weights.safetensors"
# Weights as diffusers and transformers name them: a variant such as .fp16, shards, and the shards' index.
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|pytorch_model|model)(?P<variant>\.[\w-]+?)??(-\d+-of-\d+)?\.(safetensors|bin)"
    r"(\.index(?P<index_variant>\.[\w-]+)?\.json)?"
)


# ----------------------------------------------------------------------------------------------------------------------
# What is published


def component_folders(folder: Path) -> list[str]:
    """The names of a pipeline's components in its index; names that could lead out of the folder are omitted."""
    index = read_mapping(folder / "model_index.json")
    components = {name for name, value in index.items() if isinstance(value, list) and value and value[0]}
    return [name for name in index if name in components and re.fullmatch(r"(?!_)\w+", name)]


def check_inside(folder: Path, file: Path):
    """Checks that a file of a folder is not a link to a file outside it, such as a private file of this machine.

    Links of the Hub's cache are allowed: a snapshot there consists of links to `blobs/` of the same repository.

    Raises:
        InputError: if the file is such a link.
    """
    target = file.resolve()
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise InputError(
            None, f"{file} is a link to {target} outside the folder, which is not published; replace it by a copy"
        )


def published_files(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that are published, as paths on the Hub and local files. All other files are ignored.

    Raises:
        InputError: if the folder has neither a pipeline nor adapters, or has a link to a file outside.
    """
    folder = Path(folder)
    files = {}
    if (folder / "lora" / ADAPTERS).is_file():
        files[ADAPTERS] = folder / "lora" / ADAPTERS
    if not (files and pushes_adapters_only(read_run(folder))):
        for name in ("model_index.json", "pipeline_vrpo.py"):
            if (folder / name).is_file():
                files[name] = folder / name
        for name in component_folders(folder):
            for path in sorted((folder / name).rglob("*")):
                hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
                if path.is_file() and not hidden and path.suffix != ".lock":
                    files[path.relative_to(folder).as_posix()] = path
        if "model_index.json" not in files:
            raise InputError(
                None, f"{folder} has no pipeline (no model_index.json); give the output folder of a finished run"
            )
        if not component_folders(folder):
            raise InputError(
                None,
                f"{folder}/model_index.json is damaged, because it names no component; give the folder of a saved pipeline",
            )
    for path in [folder / name for name in RUN_FILES] + sorted(folder.glob("evaluation*.json")):
        if path.is_file():
            files[path.name] = path
    for path in files.values():
        check_inside(folder, path)
    return files


def without_paths(path: str, file: Path, local: list[str] | None = None) -> Path | bytes:
    """Prepares a file for the Hub by removing local folders from the content of reports and configurations.

    Args:
        path: the path on the Hub.
        file: the local file.
        local: the values of options that were files or folders, as the run's record says (`public_name`).

    Returns:
        the file itself, or its changed content.
    """
    content = read_mapping(file) if path.endswith(".json") else {}
    if path.startswith("evaluation"):
        return json.dumps(public_json(content), indent=2).encode() + b"\n"
    if isinstance(content.get("_name_or_path"), str):  # the path from which diffusers loaded the component
        content["_name_or_path"] = public_name(content["_name_or_path"], local)
        return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"
    return file


def variant_of(path: str) -> str | None:
    """The variant of a weights file or of its index, such as `.fp16`; "" if it has none, None for other files."""
    match = WEIGHTS.fullmatch(path.split("/")[-1])
    return None if match is None else match["index_variant"] or match["variant"] or ""


def outdated_files(there: list[str], files: dict[str, Path], folders: list[str], replace_variants: bool) -> list[str]:
    """Weights on the Hub that the new ones replace: other shards, or variants of earlier weights.

    Args:
        there: paths on the Hub.
        files: the result of `published_files`.
        folders: the folders of the components.
        replace_variants: whether all variants are replaced, instead of only those in `files`.
    """
    new = {variant_of(path) for path in files}
    outdated = []
    for path in there:
        variant = variant_of(path)
        ours = path.split("/")[0] in folders and path.count("/") == 1
        if variant is not None and ours and path not in files and (replace_variants or variant in new):
            outdated.append(path)
    return outdated


# ----------------------------------------------------------------------------------------------------------------------
# Errors of the Hub


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an exception, or None."""
    found = [link.response.status_code for link in causes(error) if getattr(link, "response", None) is not None]
    return found[0] if found else None


def disk_is_full(error: BaseException) -> bool:
    return any(getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for link in causes(error))


def is_passing(error: BaseException) -> bool:
    """Whether an error is transient, unlike a refusal, bad metadata or a missing local file."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 409, 412, 425, 429)
    # A proxy has answered with a page of its own, or the Hub has not answered and the cache lacks the file.
    if "JSONDecodeError" in type(error).__name__ or isinstance(error, LocalEntryNotFoundError):
        return True
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled, *DEFECTS)) or disk_is_full(error):
        return False
    return not isinstance(error, InputError | ValueError | FileNotFoundError | IsADirectoryError | PermissionError)


def hub_sentence(error: BaseException, repo_id: str) -> str:
    """Explains why a push failed and what to do, without the exception's own text, which may hold signed addresses."""
    status = status_of(error)
    if isinstance(error, LocalTokenNotFoundError):
        return "no token was found; run `hf auth login` or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return "that is not the name of a repository; give owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which forbids access to the Hub; unset it"
    if status == 401 and not isinstance(error, RepositoryNotFoundError):
        return "the Hub does not know the token (401); run `hf auth login` again or set HF_TOKEN to another token"
    if status == 403:
        return f"the token may not write to {repo_id} (403); use one with write access to it"
    if status == 404 or isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist for this token ({status}); check the name and the token's access"
    if status is not None and status < 500 and status != 429:
        said = next((link.server_message for link in causes(error) if getattr(link, "server_message", None)), "")
        return f"the Hub refuses it ({status}{': ' + said.splitlines()[0][:200] if said else ''})"
    if status is not None:
        return f"the Hub answers {status}"
    if disk_is_full(error):
        return "the local disk is full; make room"
    if isinstance(error, DEFECTS):
        return f"this program has failed ({type(error).__name__}: {first_line(error)})"
    if isinstance(error, InputError | ValueError) and not isinstance(error, LocalEntryNotFoundError):
        return first_line(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    return f"the Hub cannot be reached ({type(error).__name__})"


def with_retries(action: Callable, *arguments, retries: int | None = None, **options):
    """Calls `action` and returns its result, retrying transient errors after the first `retries` delays of `WAITS`.

    Args:
        retries: the number of retries; by default as many as `WAITS` has delays.

    Raises:
        Exception: the last error of `action`, or its first one that is not transient.
    """
    for wait in (*WAITS[:retries], None):
        try:
            return action(*arguments, **options)
        except Exception as error:
            if wait is None or not is_passing(error):
                raise
            logger.info(f"{hub_sentence(error, 'the repository')}; trying again in {wait} s")
            time.sleep(wait)


def without_signature(record: logging.LogRecord) -> bool:
    """A logging filter that removes the query strings of addresses."""
    record.msg, record.args = re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", record.getMessage()), ()
    return True


def keep_addresses_private():
    """Keeps signed addresses of uploads out of the log, because anyone who reads them could use them."""
    for name in ("httpx", "httpx2", "httpcore", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub.utils._http").addFilter(without_signature)


# ----------------------------------------------------------------------------------------------------------------------
# Pushing


def make_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Creates the repository if needed, and returns its full name.

    Raises:
        InputError: if `private` is set and the repository exists and is public.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id).private:
        raise InputError(
            None, f"{repo_id} already exists and is public; make it private on its page, or choose another name"
        )
    return repo_id


def open_repository(repo_id: str, private: bool | None = None, token: str | None = None) -> str:
    """Creates the repository if needed, checks that the token may write to it, and returns its full name.

    Raises:
        InputError: if the token may not, or the Hub refuses for another reason.
    """
    keep_addresses_private()
    api = HfApi(token=token)
    try:
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise InputError(None, "the token may only read; use one with write access")
        repo_id = make_repository(repo_id, private, token)
        # Ask how a file would be uploaded, which requires write access.
        api.preupload_lfs_files(repo_id, [CommitOperationAdd("README.md", b"-")])
        return repo_id
    except DEFECTS:
        raise
    except Exception as error:
        if not is_passing(error):
            raise InputError("hub_model_id", f"`hub_model_id` {repo_id}: {hub_sentence(error, repo_id)}") from error
        raise


def commit(
    repo_id: str,
    files: dict[str, Path | bytes],
    message: str,
    outdated: Callable[[list[str]], list[str]] = lambda there: [],
    token: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Makes one commit that adds `files` and removes the paths that `outdated` selects.

    Large files are uploaded first, one by one, so that a retry skips finished ones and no threads are left behind.
    """
    keep_addresses_private()
    api = HfApi(token=token)
    adds = [CommitOperationAdd(path, file if isinstance(file, bytes) else str(file)) for path, file in files.items()]
    for addition in adds:
        if addition.upload_info.size > 1 << 20:
            api.preupload_lfs_files(repo_id, [addition], create_pr=create_pr, free_memory=False)
    deletes = [CommitOperationDelete(path) for path in outdated(api.list_repo_files(repo_id))]
    return api.create_commit(repo_id, [*adds, *deletes], commit_message=message, create_pr=create_pr)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    license: str | None = None,
    commit_message: str = "Upload pipeline",
    create_pr: bool = False,
    subfolder: str | None = None,
    tag: str | None = None,
    replace_variants: bool = True,
) -> CommitInfo:
    """Publishes the folder of a pipeline or a run, with a new model card, in one commit.

    The commit also removes weights on the Hub that the new ones replace. An existing card is kept if the folder has no
    record of a run.

    Example:

    ```python
    # not run: needs an account on the Hub
    from diffusers_vrpo import push_folder

    push_folder("outputs/digits", "me/digits-vrpo", private=True)
    ```

    Args:
        folder: the folder that `save_pretrained` or a run has written; other files in it are ignored.
        repo_id: `owner/name`; the repository is created if needed.
        private: whether a new repository is private; None (the default) uses the owner's setting.
        token: token to use instead of that of `hf auth login` or HF_TOKEN.
        license: license of the weights, as the Hub spells it; by default as in `render_card`.
        commit_message: message of the commit.
        create_pr: whether to open a pull request with the commit instead of committing to the main branch.
        subfolder: folder in the repository for all files; no model card is then written.
        tag: a tag for the commit; an existing tag is moved.
        replace_variants: whether to remove variants, such as `fp16`, that the folder does not have.

    Returns:
        the commit, with its address as `commit_url`.

    Raises:
        InputError: if the folder is not a pipeline, adapters would be pushed to the repository of the weights that they
            adapt, or the Hub refuses.
        HfHubHTTPError, OSError, RuntimeError: if the Hub could not be reached after all retries.
    """
    keep_addresses_private()
    folder = Path(folder)
    run = read_run(folder)
    local = run["start"].get("local")
    files = {path: without_paths(path, file, local) for path, file in published_files(folder).items()}
    # If only adapters are pushed, they replace no weights, because the folder's pipeline is not pushed.
    folders = component_folders(folder) if "model_index.json" in files and not subfolder else []
    if subfolder:
        files = {f"{subfolder}/{path}": file for path, file in files.items()}

    def outdated(there):
        return outdated_files(there, files, folders, replace_variants)

    try:
        repo_id = with_retries(make_repository, repo_id, private, token)
        check_base(repo_id, run["options"])
        if not subfolder:
            card = None if run["options"] else with_retries(card_there, repo_id, license, token)
            if card is None:
                tagged = tag is not None or with_retries(has_step_tags, repo_id, token)
                card = render_card(folder, repo_id, license, tagged=tagged)
            files["README.md"] = card.encode()
        done = with_retries(commit, repo_id, files, commit_message, outdated, token, create_pr)
        if tag is not None:
            with_retries(move_tag, repo_id, tag, done.oid, token)
    except Exception as error:
        if is_passing(error) or isinstance(error, DEFECTS):
            raise
        raise InputError("hub_model_id", f"`hub_model_id` {repo_id}: {hub_sentence(error, repo_id)}") from error
    return done


def check_base(repo_id: str, options: dict):
    """Checks that a run may be published in a repository.

    Raises:
        InputError: if the run has adapters and the repository is that of the weights that they adapt.
    """
    if options.get("lora_rank") and options.get("pretrained_model_name_or_path") == repo_id:
        raise InputError(
            None, f"{repo_id} has the weights that the adapters change; publish the adapters under another name"
        )


def card_there(repo_id: str, license: str | None = None, token: str | None = None) -> str | None:
    """Downloads a repository's model card, removes repeated tags and sets `license` if given; None if there is no card."""
    api = HfApi(token=token)
    if "README.md" not in api.list_repo_files(repo_id):
        return None
    file = Path(api.hf_hub_download(repo_id, "README.md"))
    text, metadata = file.read_text(encoding="utf-8"), metadata_load(file) or {}
    tags = metadata.get("tags") or []
    if len(tags) == len(dict.fromkeys(tags)) and license in (None, metadata.get("license")):
        return text
    card = ModelCard(text, ignore_metadata_errors=True)  # parsing removes repeated tags
    card.data.license = license or card.data.license
    return str(card)


def has_step_tags(repo_id: str, token: str | None = None) -> bool:
    """Whether the repository has tags `step-N`, which are set by runs that push their checkpoints."""
    return any(tag.name.startswith("step-") for tag in HfApi(token=token).list_repo_refs(repo_id).tags)


def move_tag(repo_id: str, tag: str, revision: str, token: str | None = None):
    """Sets a tag, or moves it if it already exists."""
    api = HfApi(token=token)
    try:
        api.create_tag(repo_id, tag=tag, revision=revision)
    except HfHubHTTPError as error:
        if status_of(error) != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=revision)
