"""Pods that start together, end together, and of which none goes on without the others.

TensorFlow's workers wait for one another: at the start, in each collective, and where one is gone, at worst forever.
So the pods' entry points keep a register, in pod 0: a training starts when all are there; each pod hears of the first
that fails or is lost, and ends; and none succeeds before all have. A pod that replaces a failed one is let in when the
others have been replaced, too. They speak in lines of JSON over TCP.
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
    """Who is there, kept by pod 0, which is itself one of those who come."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.there: dict[int, asyncio.StreamWriter] = {}
        self.done: set[int] = set()
        self.begun = False
        self.over = False
        self.reason = ""  # for the end that is to come
        self.server: asyncio.Server | None = None
        self.beat: asyncio.Future[None]

    async def open(self, port: int) -> None:
        """Serve from now on."""
        self.server = await asyncio.start_server(self._member, port=port)
        self.beat = asyncio.ensure_future(self._beat())

    async def close(self) -> None:
        """Serve no more, after what was said last, by this pod too, has been passed on."""
        if self.server is None:
            return
        self.server.close()
        end = time.monotonic() + times.FLUSH_S
        while 0 in self.there and time.monotonic() < end:
            await asyncio.sleep(0.01)
        self.beat.cancel()
        await asyncio.gather(*map(part, list(self.there.values())))

    def missing(self) -> list[str]:
        return [name for index, name in enumerate(self.names) if index not in self.there]

    async def _member(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One pod's connection."""
        index: int | None = None
        try:
            hello = await hear(reader)
            if hello.get("workers") != len(self.names):
                told = f"{self.names[0]} was told of {len(self.names)} workers"
                why = f"{told}, {hello.get('name')} of {hello.get('workers')}"
                return say(writer, {"is": "refused", "why": why})
            number = hello.get("index")
            if not isinstance(number, int) or not 0 <= number < len(self.names):
                return None
            if self.begun or number in self.there:  # of an earlier start, of which somebody is left
                return say(writer, {"is": "later"})
            index = number
            self.there[index] = writer
            if not self.missing():
                self.begun = True
                self._tell_all({"is": "start"})
            while True:
                self._learn(index, await hear(reader))
        except (OSError, asyncio.CancelledError):  # it is gone, or all is over
            self._leave(index)
        finally:
            writer.close()

    def _learn(self, index: int, message: dict[str, Any]) -> None:
        what = message["is"]
        if what == "done":
            self.done.add(index)
            if len(self.done) == len(self.names):
                self.over = True
                self._tell_all({"is": "all done"})
        elif what == "failed":
            self._end(f"{self.names[index]} failed (exit code {message.get('code')})")
        elif what == "term":
            self.reason = self.reason or f"{self.names[index]} had to go"
            self._tell_all({"is": "term", "who": self.names[index]})

    def _leave(self, index: int | None) -> None:
        if index is None:
            return
        self.there.pop(index).close()
        if self.begun:
            self._end(f"{self.names[index]} was lost")

    def _end(self, why: str) -> None:
        """The first reason is the reason."""
        if not self.over:
            self.over = True
            self._tell_all({"is": "ended", "why": self.reason or why})

    def _tell_all(self, message: dict[str, Any]) -> None:
        for writer in list(self.there.values()):
            say(writer, message)

    async def _beat(self) -> None:
        while True:
            self._tell_all({"is": "beat", "missing": self.missing()})
            await asyncio.sleep(times.here().beat_s)


class Membership:
    """A pod's place in the register.

    Attributes:
      heard: what is heard of the others after the start: ("ended", why), ("term", who) or ("all done", "").
    """

    def __init__(self, names: Sequence[str], index: int, port: int) -> None:
        self.names, self.index, self.port = names, index, port
        self.heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self.writer: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Future[Any]] = []
        self.waits_for = "all"  # in words

    async def join(self, report: Callable[[str], None]) -> None:
        """Wait until all are there. Whom it waits for is reported now and then, and stands in ``waits_for``.

        Raises:
          ValueError: pod 0 does not want this one.
        """
        said = time.monotonic()
        joined = asyncio.ensure_future(self._join())
        try:
            while not (await asyncio.wait([joined], timeout=times.JOIN_AGAIN_S))[0]:
                if time.monotonic() > said + times.here().report_s:
                    said = time.monotonic()
                    report(f"waiting for {self.waits_for}")
            joined.result()
        finally:
            joined.cancel()

    async def _join(self) -> None:
        strangers = list(self.names)
        while strangers := await unknown(strangers):
            self.waits_for = f"{few(strangers)} (nothing knows the name)"
            await asyncio.sleep(times.JOIN_AGAIN_S)
        first = self.names[0]
        self.waits_for = f"{first} (nobody answers there on port {self.port})"
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
        self.tell(**hello)
        beat = asyncio.ensure_future(self._beat())
        try:
            while True:
                message = await hear(reader)
                if message["is"] == "start":
                    return True
                if message["is"] == "refused":
                    raise Refused(f"pod: {message['why']}, expected the same. Look at DISTPAD_WORKERS of both.")
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
                message = await hear(reader)
                if message["is"] in ("ended", "term", "all done"):
                    self.heard.put_nowait((message["is"], message.get("why") or message.get("who") or ""))
        self.heard.put_nowait(("ended", why))  # after "all done" nobody listens any more

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(times.here().beat_s)
            self.tell(**{"is": "beat"})

    def tell(self, **message: Any) -> None:
        assert self.writer is not None
        say(self.writer, message)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        if self.writer is not None:
            await part(self.writer)


class Refused(ValueError):
    """Pod 0 was told other things than this one."""


async def unknown(names: Sequence[str]) -> list[str]:
    """The names that lead nowhere, as those of pods do that are not scheduled yet."""
    loop = asyncio.get_running_loop()
    found = await asyncio.gather(*(loop.getaddrinfo(name, None) for name in names), return_exceptions=True)
    return [name for name, answer in zip(names, found) if isinstance(answer, socket.gaierror)]


async def hear(reader: asyncio.StreamReader) -> dict[str, Any]:
    """The next message.

    Raises:
      ConnectionError: none will come, or it is of somebody who speaks of something else.
    """
    try:
        message = json.loads(await asyncio.wait_for(reader.readline(), times.here().lost_s))
        return {"is": message["is"], **message}
    except (asyncio.TimeoutError, ValueError, TypeError, KeyError) as error:
        raise ConnectionError("no message") from error


def say(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # who does not listen any more is found out by their silence
        writer.write(json.dumps(message).encode() + b"\n")


async def part(writer: asyncio.StreamWriter) -> None:
    """Close a connection after what was said there last has been sent."""
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        writer.close()
        await asyncio.wait_for(writer.wait_closed(), times.FLUSH_S)


def few(names: Sequence[str]) -> str:
    """Names for people to read."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
