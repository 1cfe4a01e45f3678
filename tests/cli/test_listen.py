"""The listening socket."""

from __future__ import annotations

import socket

import pytest

from vllm_mlx.cli.listen import listen, url_of
from vllm_mlx.core.errors import ConfigError


def test_port_zero_is_a_free_port_that_accepts() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener) == f"http://127.0.0.1:{port}"
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


def test_taken_port_is_a_clear_error() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--port: {port} is already in use on 127\.0\.0\.1; .*another port$"):
            listen("127.0.0.1", port)


def test_port_is_free_again_after_closing() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port), timeout=5)
        accepted, _ = first.accept()
        accepted.close()
        client.close()
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["192.0.2.1", "not a host", "\udcff"])
def test_foreign_host_is_a_clear_error(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^--host: .* is not an address of this machine$"):
        listen(host, 0)


def test_url_of_every_address_is_one_that_can_be_opened() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert url_of(listener).startswith("http://127.0.0.1:")
