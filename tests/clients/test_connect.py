"""A Ray that listens on loopback alone is joined there; others are left to Ray."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cluster.errors import AppNotFound
from deployments import client

SETTING = client._LOOPBACK_SETTING


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "ray")
    monkeypatch.setenv(SETTING, "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Other tests' Rays run on this machine as well.
    monkeypatch.setattr(client, "_RAYLET", re.compile(rb"/raylet-of-this-test\0(?:.*\0)?--gcs-address=([^\0]+)"))


@pytest.fixture(params=["127.0.0.1", "0.0.0.0"])
def listener(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    with socket.socket() as listening:
        listening.bind((request.param, 0))
        listening.listen()
        yield listening


def _has_another_address() -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return False
        return not str(probe.getsockname()[0]).startswith("127.")


@pytest.mark.parametrize("is_running", [False, True], ids=["named", "this machine's"])
def test_only_a_ray_on_loopback_alone_needs_the_setting(
    is_running: bool, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, port = listener.getsockname()
    if host == "0.0.0.0" and not _has_another_address():
        pytest.skip("this machine has no other address")
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        if is_running:
            waiting = [sys.executable, "-c", "input()", "/raylet-of-this-test", f"--gcs-address={address}"]
            raylet = stack.enter_context(subprocess.Popen(waiting, stdin=subprocess.PIPE))
            stack.callback(raylet.kill)
        else:
            monkeypatch.setenv("RAY_ADDRESS", address)
        client._allow_loopback()
    assert os.environ[SETTING] == ("0" if host == "127.0.0.1" else "1")


@pytest.mark.parametrize("address", ["", "auto", "10.0.0.5:6379", "ray://127.0.0.1:10001"])
def test_other_addresses_are_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    client._allow_loopback()
    assert os.environ[SETTING] == "1"


def test_a_process_that_has_imported_ray_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setitem(sys.modules, "ray", socket)  # any module
        with pytest.raises(AppNotFound, match=f"listens on loopback alone: set {SETTING}=0 before ray is imported"):
            client._allow_loopback()
        monkeypatch.setenv(SETTING, "0")
        client._allow_loopback()
