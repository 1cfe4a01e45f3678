"""Messages between a server and its engine process: two ZeroMQ sockets in one private folder, msgpack on them.

Each side binds the socket it reads and connects the one it writes: a connected PUSH socket keeps messages until the
other side is there. Queues have no limit, so sending never waits; what is in flight is limited by the requests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import msgspec
import zmq

from vllm_mlx.core.messages import Failed, FromEngine, ToEngine
from vllm_mlx.engine.token_blocks import BlockReader, SentSubmit, sent

TO_ENGINE = "to-engine"
FROM_ENGINE = "from-engine"
LINGER_MS = 2000
"""How long a child that ends waits for its last messages to be taken."""


class ServerChannel:
    """The server's side. `on_message` is called on the running event loop for every message from the engine.

    Raises:
        OSError: the sockets cannot be opened.
    """

    def __init__(self, folder: str, on_message: Callable[[FromEngine], None]) -> None:
        self._on_message = on_message
        self._encode = msgspec.msgpack.Encoder().encode
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        try:
            self._pull = _socket(self._context, zmq.PULL, linger_ms=0)
            self._push = _socket(self._context, zmq.PUSH, linger_ms=0)
            self._pull.bind(_address(folder, FROM_ENGINE))
            self._push.connect(_address(folder, TO_ENGINE))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, f"no sockets in {folder}: {error.strerror}") from error
        self._loop.add_reader(self._pull.fileno(), self.drain)

    def send(self, message: ToEngine) -> None:
        """Queue a message for the engine; never waits."""
        self._push.send(self._encode(sent(message)), zmq.NOBLOCK)

    def drain(self) -> None:
        """Hand on every message that is here. ZeroMQ's descriptor signals changes only, so nothing may be left."""
        while not self._pull.closed:
            try:
                data = self._pull.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_message(self._decoder.decode(data))

    def close(self) -> None:
        """No message is handed on after this."""
        if self._pull.closed:
            return
        self._loop.remove_reader(self._pull.fileno())
        self._pull.close()
        self._push.close()
        self._context.term()


class SocketInbox:
    """The engine's `Inbox`. Used by the thread that made it only."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[ToEngine | SentSubmit] = msgspec.msgpack.Decoder(ToEngine | SentSubmit)
        self._blocks = BlockReader()
        self._pull = _socket(context, zmq.PULL, linger_ms=0)
        self._pull.bind(_address(folder, TO_ENGINE))

    def receive(self, timeout_s: float | None) -> list[ToEngine]:
        """Every message that is here; with none, wait up to `timeout_s` for the first (None: as long as it takes)."""
        if timeout_s != 0:
            self._pull.poll(None if timeout_s is None else math.ceil(timeout_s * 1000))
        messages: list[ToEngine] = []
        while True:
            try:
                messages.append(self._blocks.read(self._decoder.decode(self._pull.recv(zmq.NOBLOCK))))
            except zmq.Again:
                return messages

    def close(self) -> None:
        """Take no more messages."""
        self._pull.close()


class SocketOutbox:
    """The engine's `Outbox`. Used by the thread that made it only; each thread makes its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], folder: str) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._push = _socket(context, zmq.PUSH, linger_ms=LINGER_MS)
        self._push.connect(_address(folder, FROM_ENGINE))
        self.has_failed = False
        """Whether `Failed` was sent."""

    def send(self, message: FromEngine) -> None:
        """Queue a message for the server; never waits."""
        self.has_failed = self.has_failed or isinstance(message, Failed)
        self._push.send(self._encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """What is queued still goes out while the context is terminated."""
        self._push.close()


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int, *, linger_ms: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.linger = linger_ms
    return socket


def _address(folder: str, name: str) -> str:
    return f"ipc://{folder}/{name}"
