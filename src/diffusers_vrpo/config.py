import argparse


class VRPOConfig(argparse.Namespace):
    pass


def replace(args, **given):
    return VRPOConfig(**{**vars(args), **given})


def check_complete(args):
    pass
