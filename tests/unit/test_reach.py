# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""A Hub that cannot be reached: it is asked briefly, and then the cache is used."""

import errno
import os
import socket
from types import SimpleNamespace

import datasets.config
import pytest
from huggingface_hub import constants

from diffusers_vrpo import reach
from diffusers_vrpo.alignment.encoders import load_encoder
from diffusers_vrpo.commands.probe import open_pipeline
from diffusers_vrpo.commands.sample import load_pipeline
from diffusers_vrpo.errors import InputError
from diffusers_vrpo.evaluation.image_encoders import load_image_encoder
from diffusers_vrpo.models.autoencoder import load_vae
from diffusers_vrpo.models.official_checkpoints import convert_with_projectors


@pytest.fixture
def attempts(monkeypatch) -> list:
    """The waits after failed connections to a Hub at a port where nothing listens, without a proxy."""
    waited = []
    monkeypatch.setattr(reach.time, "sleep", waited.append)
    monkeypatch.setattr(reach.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return waited


def test_a_refused_connection_is_tried_three_times_and_then_the_cache_is_used(attempts):
    with pytest.raises(ZeroDivisionError), reach.offline_if_out_of_reach("some/model"):
        assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not constants.HF_HUB_OFFLINE and not datasets.config.HF_HUB_OFFLINE
    assert attempts == [0.5, 1.0]


def test_a_hub_that_answers_is_used(attempts, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with reach.offline_if_out_of_reach("some/model"):
            assert not constants.HF_HUB_OFFLINE
    assert not attempts


@pytest.mark.parametrize("sources", [(), (None,), (os.curdir, None), (__file__,)])
def test_nothing_is_asked_for_what_is_here(attempts, sources):
    with reach.offline_if_out_of_reach(*sources):
        assert not constants.HF_HUB_OFFLINE
    assert not attempts


@pytest.mark.parametrize(
    "error, out_of_reach, waits",
    [
        (socket.gaierror(), True, 2),
        (OSError(errno.ENETUNREACH, "no network"), True, 2),
        (OSError(errno.EHOSTUNREACH, "no route"), True, 2),
        (TimeoutError(), True, 0),
        (OSError(), False, 0),
    ],
)
def test_what_counts_as_out_of_reach(attempts, monkeypatch, error, out_of_reach, waits):
    def connect(*args, **kwargs):
        raise error

    monkeypatch.setattr(reach.socket, "create_connection", connect)
    assert reach.is_out_of_reach("https://huggingface.co") is out_of_reach
    assert len(attempts) == waits


@pytest.mark.parametrize("name", ["http", "all"])
@pytest.mark.parametrize("answers", [True, False])
def test_a_proxy_is_not_passed_by(attempts, monkeypatch, name, answers):
    def head(address, timeout):
        asked.append(address)
        if not answers:
            raise ConnectionError

    asked = []
    monkeypatch.setattr(reach.urllib.request, "getproxies", lambda: {name: "http://proxy:1"})
    monkeypatch.setattr(reach, "get_session", lambda: SimpleNamespace(head=head))
    assert reach.is_out_of_reach("http://127.0.0.1:9") is not answers
    assert asked == ["http://127.0.0.1:9"] and not attempts
    # Hosts that the proxy is not for are asked directly.
    monkeypatch.setattr(reach.urllib.request, "proxy_bypass", lambda host: True)
    assert reach.is_out_of_reach("http://127.0.0.1:9") and len(asked) == 1


@pytest.mark.parametrize(
    "load",
    [
        load_vae,
        lambda name, folder: load_encoder(name, (2, 2), cache_dir=folder),
        lambda name, folder: load_image_encoder(name, cache_dir=folder),
        lambda name, folder: convert_with_projectors(name, cache_dir=folder),
        lambda name, folder: load_pipeline(name, None, None, folder),
        open_pipeline,
    ],
)
def test_models_are_refused_at_once(attempts, tmp_path, caplog, load):
    with pytest.raises(InputError, match="nor in the cache, and the Hub cannot be reached"):
        load("someone/a-model", str(tmp_path))
    assert attempts == [0.5, 1.0] and "Retrying" not in caplog.text
