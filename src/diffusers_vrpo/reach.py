# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""Finds out whether the Hub can be reached, so that nothing waits for long retries when there is no connection."""

import contextlib
import errno
import os
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import get_session


WAITS = (0.5, 1.0)  # seconds between the attempts to connect
TIMEOUT = 10  # seconds
NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)


def is_out_of_reach(endpoint: str) -> bool:
    """Whether the host of an address cannot be reached.

    It cannot be reached if its name is unknown or connections are refused or have no route, even after two short
    retries, or if nothing answers for ten seconds. Behind a proxy, the Hub's client sends a request, since only the
    proxy can tell.

    Args:
        endpoint: an address such as https://huggingface.co.
    """
    parts = urlsplit(endpoint)
    if parts.hostname is None:
        return False
    proxies = urllib.request.getproxies()
    if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(parts.hostname):
        return not client_answers(endpoint)
    address = (parts.hostname, parts.port or (80 if parts.scheme == "http" else 443))
    give_up = time.monotonic() + TIMEOUT  # looking up an unknown name may take long
    for wait in (*WAITS, None):
        try:
            socket.create_connection(address, timeout=TIMEOUT).close()
            return False
        except TimeoutError:
            return True
        except OSError as error:
            # Other network errors are left to the Hub's client.
            if not isinstance(error, ConnectionRefusedError | socket.gaierror) and error.errno not in NO_ROUTE:
                return False
        if wait is None or time.monotonic() > give_up:
            return True
        time.sleep(wait)


def client_answers(endpoint: str) -> bool:
    """Whether the Hub's client gets any answer from an address, through the proxy that it uses."""
    try:
        get_session().head(endpoint, timeout=TIMEOUT)
    except Exception:  # the client's library depends on the version of huggingface_hub
        return False
    return True


@contextlib.contextmanager
def offline_if_out_of_reach(*sources: str | os.PathLike | None) -> Iterator[None]:
    """Works offline in the `with` block if the Hub cannot be reached, so that cached files are opened without delay.

    Args:
        sources: names or paths that will be opened. If all are folders, files or None, the Hub is not contacted.
    """
    names = [source for source in sources if source is not None and not os.path.exists(os.path.expanduser(source))]
    if not names or constants.HF_HUB_OFFLINE or not is_out_of_reach(constants.ENDPOINT):
        yield
        return
    # `datasets` keeps a copy of the setting, which matters only if the program has imported it.
    modules = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before):
            module.HF_HUB_OFFLINE = value
