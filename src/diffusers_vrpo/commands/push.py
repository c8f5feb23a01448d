# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Publish a run or a pipeline on the Hub, with a model card.

    vrpo push outputs/digits --hub_model_id me/digits-vrpo

Log in with `hf auth login` first.
"""

import logging
from pathlib import Path

from ..command_line import OneLineErrorParser, add_options, one_line_errors
from ..config import HubConfig
from ..errors import InputError
from ..hub.publish import DEFECTS, hub_sentence, push_folder


def main(argv: list[str] | None = None, prog: str = "vrpo push"):
    """Runs the command; `prog` is its name in errors."""
    parser = OneLineErrorParser(prog=prog, description=__doc__)
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a run, or any saved VRPOPipeline")
    add_options(parser, HubConfig, ["hub_model_id", "hub_private_repo", "hub_license"])
    parser.add_argument("--commit_message", default="Upload pipeline", help="message of the commit")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if args.hub_model_id is not None and not args.hub_model_id.strip():
        parser.error("--hub_model_id is empty; give OWNER/NAME, or remove it")
    if not args.folder or not Path(args.folder).is_dir():
        parser.error(f"OUTPUT_DIR {args.folder} is not a folder; give the output folder of a run or a saved pipeline")
    repo_id = args.hub_model_id or Path(args.folder).resolve().name
    with one_line_errors(parser):
        try:
            done = push_folder(
                args.folder,
                repo_id,
                private=args.hub_private_repo or None,
                license=args.hub_license,
                commit_message=args.commit_message,
            )
        except (InputError, *DEFECTS):
            raise
        except Exception as error:
            problem = f"`hub_model_id` {repo_id}: {hub_sentence(error, repo_id)}"
            raise InputError("hub_model_id", problem) from error
    print(f"published: {done.commit_url}")


if __name__ == "__main__":
    main()
