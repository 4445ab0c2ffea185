import socket

import pytest

from dflare.apps import server_process
from dflare.errors import DFlareError


def test_a_port_that_is_taken_is_not_chosen(monkeypatch):
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        monkeypatch.setattr(server_process, "_PORTS", range(port, port + 1))
        with pytest.raises(DFlareError, match="all 1 ports tried"):
            server_process.free_port()
        two.bind(("127.0.0.1", 0))
        free = two.getsockname()[1]
        two.close()
        monkeypatch.setattr(server_process, "_PORTS", [port, free])
        assert {server_process.free_port() for _ in range(8)} == {free}
