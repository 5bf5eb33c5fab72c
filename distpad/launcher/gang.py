"""A gang: pods that start together and end together.

TensorFlow's workers wait for one another at the start and in each collective, possibly forever if one is gone. The
pods' entry points therefore keep a register, which pod 0 serves. Training starts when all pods are present. If one pod
fails or is lost, all pods end. No pod succeeds before all have succeeded. A replacement pod is admitted once the other
pods have been replaced as well. The messages are lines of JSON over TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from distpad.launcher import times


class Register:
    """The register of present pods. Pod 0 serves it, and is a member like the other pods."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.present: dict[int, asyncio.StreamWriter] = {}
        self.done: set[int] = set()
        self.begun = False
        self.over = False
        self.reason = ""  # why the gang will end
        self.server: asyncio.Server | None = None
        self.beat: asyncio.Future[None]

    async def open(self, port: int) -> None:
        """Start to serve."""
        self.server = await asyncio.start_server(self._member, port=port)
        self.beat = asyncio.ensure_future(self._beat())

    async def close(self) -> None:
        """Stop serving, after the last messages have been forwarded, those of this pod included."""
        if self.server is None:
            return
        self.server.close()
        end = time.monotonic() + times.FLUSH_S
        while 0 in self.present and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.beat.cancel()
        await asyncio.gather(*map(close_writer, list(self.present.values())))

    def missing(self) -> list[str]:
        return [name for index, name in enumerate(self.names) if index not in self.present]

    async def _member(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one pod's connection."""
        index: int | None = None
        try:
            hello = await receive(reader)
            if hello.get("workers") != len(self.names):
                mine = f"{self.names[0]} is configured for {len(self.names)} workers"
                why = f"{mine}, {hello.get('name')} for {hello.get('workers')}"
                return send(writer, {"is": "refused", "why": why})
            number = hello.get("index")
            if not isinstance(number, int) or not 0 <= number < len(self.names):
                return None
            if self.begun or number in self.present:  # pods of an earlier start are still present
                return send(writer, {"is": "later"})
            index = number
            self.present[index] = writer
            if not self.missing():
                self.begun = True
                self._send_all({"is": "start"})
            while True:
                self._learn(index, await receive(reader))
        except (OSError, asyncio.CancelledError):  # the pod is gone, or the register closes
            self._leave(index)
        finally:
            writer.close()

    def _learn(self, index: int, message: dict[str, Any]) -> None:
        what = message["is"]
        if what == "done":
            self.done.add(index)
            if len(self.done) == len(self.names):
                self.over = True
                self._send_all({"is": "all done"})
        elif what == "failed":
            self._end(f"{self.names[index]} failed (exit code {message.get('code')})")
        elif what == "term":
            self.reason = self.reason or f"{self.names[index]} was terminated"
            self._send_all({"is": "term", "who": self.names[index]})

    def _leave(self, index: int | None) -> None:
        if index is None:
            return
        self.present.pop(index).close()
        if self.begun:
            self._end(f"{self.names[index]} was lost")

    def _end(self, why: str) -> None:
        """End the gang. Only the first reason counts."""
        if not self.over:
            self.over = True
            self._send_all({"is": "ended", "why": self.reason or why})

    def _send_all(self, message: dict[str, Any]) -> None:
        for writer in list(self.present.values()):
            send(writer, message)

    async def _beat(self) -> None:
        while True:
            self._send_all({"is": "beat", "missing": self.missing()})
            await asyncio.sleep(times.here().beat_s)


class Membership:
    """A pod's connection to the register.

    Attributes:
      events: events of the other pods after the start: ("ended", reason), ("term", pod) or ("all done", "").
    """

    def __init__(self, names: Sequence[str], index: int, port: int) -> None:
        self.names, self.index, self.port = names, index, port
        self.events: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Future[Any]] = []
        self.waits_for = "all"  # text for reports

    async def join(self, report: Callable[[str], None]) -> None:
        """Wait until all pods are present. Periodically report the missing pods, which ``waits_for`` describes.

        Raises:
          ValueError: pod 0 refuses this pod.
        """
        reported = time.monotonic()
        joined = asyncio.ensure_future(self._join())
        try:
            while not (await asyncio.wait([joined], timeout=times.JOIN_AGAIN_S))[0]:
                if time.monotonic() > reported + times.here().report_s:
                    reported = time.monotonic()
                    report(f"waiting for {self.waits_for}")
            joined.result()
        finally:
            joined.cancel()

    async def _join(self) -> None:
        unresolved = list(self.names)
        while unresolved := await unknown(unresolved):
            self.waits_for = f"{few(unresolved)} (name does not resolve)"
            await asyncio.sleep(times.JOIN_AGAIN_S)
        first = self.names[0]
        self.waits_for = f"{first} (no answer on port {self.port})"
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                host = first if self.index else "localhost"
                reader, writer = await asyncio.wait_for(asyncio.open_connection(host, self.port), times.here().lost_s)
                self.writer = writer
                if await self._wait_for_start(reader):
                    self.tasks = [asyncio.ensure_future(task) for task in (self._listen(reader), self._beat())]
                    return
                writer.close()
            await asyncio.sleep(times.JOIN_AGAIN_S)

    async def _wait_for_start(self, reader: asyncio.StreamReader) -> bool:
        hello = {"is": "hello", "index": self.index, "name": self.names[self.index], "workers": len(self.names)}
        self.send(**hello)
        beat = asyncio.ensure_future(self._beat())
        try:
            while True:
                message = await receive(reader)
                if message["is"] == "start":
                    return True
                if message["is"] == "refused":
                    raise Refused(f"pod: {message['why']}, expected the same. Compare DISTPAD_WORKERS of both.")
                if message["is"] == "later":
                    self.waits_for = "the pods of an earlier start to end"
                    return False
                if message["is"] == "beat" and message["missing"]:
                    self.waits_for = few(message["missing"])
        finally:
            beat.cancel()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        why = f"{self.names[0]} was lost"
        with contextlib.suppress(OSError):
            while True:
                message = await receive(reader)
                if message["is"] in ("ended", "term", "all done"):
                    self.events.put_nowait((message["is"], message.get("why") or message.get("who") or ""))
        self.events.put_nowait(("ended", why))  # nothing reads the queue after "all done"

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(times.here().beat_s)
            self.send(**{"is": "beat"})

    def send(self, **message: Any) -> None:
        assert self.writer is not None
        send(self.writer, message)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.writer is not None:
            await close_writer(self.writer)


class Refused(ValueError):
    """Pod 0 is configured differently from this pod."""


async def unknown(names: Sequence[str]) -> list[str]:
    """The names that do not resolve, such as those of pods that are not scheduled yet."""
    loop = asyncio.get_running_loop()
    found = await asyncio.gather(*(loop.getaddrinfo(name, None) for name in names), return_exceptions=True)
    return [name for name, answer in zip(names, found) if isinstance(answer, socket.gaierror)]


async def receive(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Return the next message.

    Raises:
      ConnectionError: the connection is lost, or carries something other than messages.
    """
    try:
        message = json.loads(await asyncio.wait_for(reader.readline(), times.here().lost_s))
        return {"is": message["is"], **message}
    except (asyncio.TimeoutError, ValueError, TypeError, KeyError) as error:
        raise ConnectionError("no message") from error


def send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # a lost peer is detected by its silence
        writer.write(json.dumps(message).encode() + b"\n")


async def close_writer(writer: asyncio.StreamWriter) -> None:
    """Close a connection after its last messages have been sent."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), times.FLUSH_S)


def few(names: Sequence[str]) -> str:
    """A short text of names: at most 8, and the number of the others."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
