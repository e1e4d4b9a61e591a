"""ComfyUI's websocket, read on a thread with the standard library: enough of RFC 6455 to listen."""

from __future__ import annotations

import base64
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

_TEXT, _BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
_NODE_TEXT = 3
"""protocol.BinaryEventTypes.TEXT: a line that a node shows while it runs."""


@dataclass(frozen=True)
class Event:
    """One message: `kind` is ComfyUI's name ("progress", "executing", ...), or "text": a line on a node."""

    kind: str
    data: dict[str, Any]


class Events:
    """Messages for one client id, from entering the `with` on. Reading is safe at any time."""

    def __init__(self, url: str, client_id: str) -> None:
        self._address = (urlsplit(url).hostname, urlsplit(url).port)
        self._client_id = client_id
        self._seen: list[Event] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Events:
        self._socket = socket.create_connection(self._address, timeout=30)
        self._stream = self._socket.makefile("rb")
        self._shake_hands()
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._stream.close()
        self._socket.close()

    def of(self, kind: str, node_id: str | None = None) -> list[Event]:
        """Messages of one kind so far, of all nodes or one."""
        with self._changed:
            return [e for e in self._seen if e.kind == kind and node_id in (None, e.data.get("node"))]

    def texts(self, node_id: str) -> list[str]:
        """Lines shown on a node so far."""
        return [event.data["text"] for event in self.of("text", node_id)]

    def wait_for(self, match: Callable[[Event], bool], seconds: float = 60) -> Event:
        """The first message that matches, past or future; raises `TimeoutError`."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                found = next(filter(match, self._seen), None)
                if found is not None:
                    return found
                if not self._changed.wait(deadline - time.monotonic()):
                    raise TimeoutError(f"No such message in {seconds:.0f} s; the last were {self._seen[-5:]}.")

    def _shake_hands(self) -> None:
        host, port = self._address
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall(
            f"GET /ws?clientId={self._client_id} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        status = self._stream.readline()
        if b" 101 " not in status:
            raise ConnectionError(f"No websocket: {status!r}")
        while self._stream.readline().strip():
            pass

    def _listen(self) -> None:
        try:
            while (message := self._message()) is not None:
                self._take(*message)
        except (OSError, ValueError, struct.error):  # closed by either side
            return

    def _message(self) -> tuple[int, bytes] | None:
        """The next message, its fragments joined; None when the server closes."""
        kind, payload, final = 0, b"", False
        while not final:
            head, size = struct.unpack(">BB", self._stream.read(2))
            if size == 126:
                (size,) = struct.unpack(">H", self._stream.read(2))
            elif size == 127:
                (size,) = struct.unpack(">Q", self._stream.read(8))
            body, opcode = self._stream.read(size), head & 0x0F
            if opcode == _CLOSE:
                return None
            if opcode == _PING:
                self._pong(body)
                continue
            kind, payload, final = kind or opcode, payload + body, bool(head & 0x80)
        return kind, payload

    def _pong(self, body: bytes) -> None:
        mask = os.urandom(4)
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(body))
        self._socket.sendall(struct.pack(">BB", 0x80 | _PONG, 0x80 | len(body)) + mask + masked)

    def _take(self, opcode: int, payload: bytes) -> None:
        event = _json_event(payload) if opcode == _TEXT else _binary_event(payload)
        with self._changed:
            self._seen.append(event)
            self._changed.notify_all()


def _json_event(payload: bytes) -> Event:
    message = json.loads(payload)
    return Event(message["type"], message.get("data") or {})


def _binary_event(payload: bytes) -> Event:
    (kind,) = struct.unpack_from(">I", payload)
    if kind != _NODE_TEXT:
        return Event("binary", {"kind": kind, "size": len(payload) - 4})
    (size,) = struct.unpack_from(">I", payload, 4)
    return Event("text", {"node": payload[8 : 8 + size].decode(), "text": payload[8 + size :].decode()})
