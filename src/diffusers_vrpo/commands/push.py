# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Publish a run or a pipeline on the Hub."""

import logging
import sys
from pathlib import Path

from ..command_line import HelpFormatter, OneLineErrorParser, with_flags
from ..errors import InputError
from ..hub.publish import DEFECTS, add_push_options, hub_sentence, push_folder


def main(argv: list[str] | None = None, prog: str = "vrpo push"):
    """The command line; what cannot work ends it in one sentence."""
    parser = OneLineErrorParser(
        prog=prog,
        description=__doc__,
        formatter_class=lambda prog: HelpFormatter(prog, max_help_position=36, width=118),
    )
    parser.add_argument("folder", metavar="OUTPUT_DIR", help="output folder of a run, or any saved VRPOPipeline")
    add_push_options(parser)
    parser.add_argument("--commit_message", default="Upload pipeline", help="of the commit")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    if not Path(args.folder).is_dir():
        parser.error(f"OUTPUT_DIR {args.folder} is no folder")
    repo_id = args.hub_model_id or Path(args.folder).resolve().name
    try:
        done = push_folder(
            args.folder,
            repo_id,
            private=args.hub_private_repo or None,
            license=args.hub_license,
            commit_message=args.commit_message,
        )
    except InputError as error:
        sys.exit(f"{prog}: error: {with_flags(error, vars(args))}")
    except DEFECTS:
        raise
    except Exception as error:
        sys.exit(f"{prog}: error: --hub_model_id {repo_id}: {hub_sentence(error, repo_id)}")
    print(f"published: {done.commit_url}")


if __name__ == "__main__":
    main()
