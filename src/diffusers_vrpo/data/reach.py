# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Whether the Hub can be reached, so that nothing waits for long retries of a connection that is refused."""

import contextlib
import socket
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

import datasets.config
from huggingface_hub import constants


WAITS = (0.5, 1.0)  # seconds between the attempts to connect


def is_refused(endpoint: str) -> bool:
    """Whether connections to the host of an address are refused, or its name is unknown, also after two short retries.

    Args:
        endpoint: an address such as https://huggingface.co; behind a proxy the answer is False, since the proxy knows.
    """
    parts = urlsplit(endpoint)
    if parts.hostname is None or parts.scheme in urllib.request.getproxies():
        return False
    address = (parts.hostname, parts.port or (80 if parts.scheme == "http" else 443))
    for wait in (*WAITS, 0):
        try:
            socket.create_connection(address, timeout=5).close()
            return False
        except (ConnectionRefusedError, socket.gaierror):
            time.sleep(wait)
        except OSError:  # slow or odd networks are left to the Hub's client
            return False
    return True


@contextlib.contextmanager
def offline_if_refused() -> Iterator[None]:
    """Works offline inside the `with` block if the Hub refuses connections: what is in the cache is used at once."""
    if constants.HF_HUB_OFFLINE or not is_refused(constants.ENDPOINT):
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
