# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
r"""Serve a web page that samples from a pipeline, for the browser of a computer or a phone.

    vrpo app outputs/digits
    vrpo app me/digits-vrpo --server_name 0.0.0.0          (a phone in the same network can open it)

The command prints the address of the page. The page can also run as a Space on the Hub, where the environment variable
VRPO_PIPELINE names the pipeline.
"""

import argparse
import os
import sys
from importlib import import_module

from ..command_line import OneLineErrorParser, number_in
from ..config import DTYPES, In
from ..files import packaged


def build_parser(prog: str) -> argparse.ArgumentParser:
    parser = OneLineErrorParser(prog=prog, description=__doc__)
    parser.add_argument(
        "pipeline",
        nargs="?",
        metavar="PIPELINE",
        default=argparse.SUPPRESS,
        help="output folder of a run, any other folder of a VRPOPipeline, or a name on the Hub; if not given, the value of the "
        "environment variable VRPO_PIPELINE",
    )
    parser.add_argument("--pipeline", default=os.environ.get("VRPO_PIPELINE"), help="another way to give PIPELINE")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="precision of the transformer; if not given, bfloat16 on a GPU and float32 on a CPU",
    )
    parser.add_argument(
        "--server_name",
        metavar="HOST",
        help="address at which the page is served: 0.0.0.0 for all devices in the same network; if not given, for this computer "
        "alone",
    )
    parser.add_argument(
        "--server_port",
        type=number_in(In(1, most=65535)),
        metavar="PORT",
        help="port of the page; the first free one from 7860 on if not given",
    )
    return parser


def parse_args(argv: list[str] | None = None, prog: str = "vrpo app") -> argparse.Namespace:
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    if not args.pipeline:
        parser.error(
            "PIPELINE is missing; give a folder or Hub repository, or set the environment variable VRPO_PIPELINE"
        )
    return args


def main(argv: list[str] | None = None, prog: str = "vrpo app"):
    """Runs the command; `prog` is its name in errors."""
    args = parse_args(argv, prog)
    sys.path.insert(0, str(packaged("space")))  # its modules import each other without a package, as in a Space
    import_module("app").serve(args, build_parser(prog))


if __name__ == "__main__":
    main()
