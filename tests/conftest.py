"""The suite runs offline, on one thread, with checked shapes and a cache of its own."""

import os
import socket

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["ACCELERATE_USE_CPU"] = "true"

import pytest
import torch
from jaxtyping import install_import_hook

# The numeric tower: an integer is a float, as Python's type checkers have it.
install_import_hook(
    "promptkd", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Teacher responses of one test are no other test's."""
    directory = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("PROMPTKD_CACHE", str(directory))
    return directory


@pytest.fixture(autouse=True)
def closed_sockets(monkeypatch):
    """Nothing outside this machine can be reached."""
    connect = socket.socket.connect

    def refuse_outside(self, address):
        host = address[0] if isinstance(address, tuple) else "localhost"
        if host not in ("localhost", "::1") and not host.startswith("127."):
            raise OSError(f"the tests are offline, but something connects to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse_outside)
