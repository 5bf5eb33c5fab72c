"""The pods of a plain Job start together and end together.

A Job of Kubernetes replaces each failed pod on its own. A pod that has succeeded never starts again, so that a replaced
peer would wait for it forever; and one failure, which ends all workers, would count once for each. (A JobSet restarts
all pods itself.) Each pod therefore holds a connection to pod 0. Training starts when all are connected. When one
closes, all end. No pod succeeds before all are done. A replaced pod is connected when pod 0 has been replaced too.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence

from distpad.launcher import outcomes, times

START, DONE, LOST = b"start\n", b"done\n", b"lost "  # LOST and the index of the pod


class Gang:
    """This pod's connection to pod 0, and those of pod 0 to all pods, itself included.

    Args:
      names: the host names of all pods, by index.
      index: this pod's index.
      port: the port at which pod 0 listens.

    Attributes:
      all_done: is set when all pods are done.
      lost: is set when another pod has failed or is lost.
      whom: the pods that ``join`` waits for, or the pod that is lost, as text.
    """

    def __init__(self, names: Sequence[str], index: int, port: int) -> None:
        self.names, self.index, self.port = names, index, port
        self.all_done, self.lost, self.whom = asyncio.Event(), asyncio.Event(), ""
        self._tasks: set[asyncio.Future[None]] = set()
        self._peers: dict[int, asyncio.StreamWriter] = {}  # of pod 0, as the next two
        self._done: set[int] = set()
        self._started = False

    async def join(self, report: Callable[[str], None]) -> None:
        """Wait until all pods are connected. Pod 0 reports the missing pods.

        Raises:
          OSError: pod 0 cannot listen at its port.
        """
        if self.index == 0:
            # It goes on listening, so that a replaced pod waits for the end of this one.
            await asyncio.start_server(self._serve, port=self.port, backlog=len(self.names))
            self._tasks.add(asyncio.ensure_future(self._start(report)))
        pod_0 = self.names[0] if self.index else None  # None is this host
        self.whom = f"{self.names[0]} (no answer at port {self.port})"
        while True:
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                connecting = asyncio.open_connection(pod_0, self.port)
                reader, self._pod_0 = await asyncio.wait_for(connecting, times.ANSWER_S)
                _keep_alive(self._pod_0)
                self._pod_0.write(b"%d\n" % self.index)
                if pod_0:
                    self.whom = f"the pods that {pod_0} waits for"
                if await _line(reader) == START:
                    return self._tasks.add(asyncio.ensure_future(self._listen(reader)))
            await asyncio.sleep(times.JOIN_AGAIN_S)

    async def _start(self, report: Callable[[str], None]) -> None:
        """Pod 0 waits for all."""
        clock = asyncio.get_running_loop().time
        reported = clock()
        while missing := [name for index, name in enumerate(self.names) if index not in self._peers]:
            self.whom = outcomes.few(missing)
            if clock() > reported + times.here().report_s:
                reported = clock()
                report(f"waiting for {self.whom}")
            await asyncio.sleep(times.POLL_S)
        self._started = True
        self._send(START)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pod 0's connection to a pod, which introduces itself by its index."""
        _keep_alive(writer)
        line = await _line(reader)
        index = int(line) if line.strip().isdigit() else len(self.names)
        if index >= len(self.names):
            return writer.close()  # a stranger
        if not self._started:
            self._peers[index] = writer  # the latest, if a pod was replaced meanwhile
        while await _line(reader) == DONE:
            self._done.add(index)
            if len(self._done) == len(self.names):
                self._send(DONE)
        if self._peers.get(index) is not writer:
            return
        if not self._started:
            del self._peers[index]
        elif len(self._done) < len(self.names):
            self._send(LOST + b"%d\n" % index)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Wait for pod 0 to send that all are done, or that one is lost, or for its end."""
        line = await _line(reader)
        if line == DONE:
            self.all_done.set()
        else:
            self.whom = self.names[int(line[len(LOST) :] or 0)]
            self.lost.set()

    def _send(self, message: bytes) -> None:
        for peer in self._peers.values():
            peer.write(message)

    def finish(self) -> None:
        """Report that this pod is done. It succeeds when all are."""
        self._pod_0.write(DONE)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next message; empty if the peer is lost."""
    try:
        return await reader.readline()
    except (OSError, ValueError):
        return b""


def _keep_alive(writer: asyncio.StreamWriter) -> None:
    """Let the kernel detect a silent peer, such as a pod of a lost node."""
    peer, period_s = writer.get_extra_info("socket"), max(1, round(times.here().lost_s / 4))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", period_s), ("TCP_KEEPINTVL", period_s), ("TCP_KEEPCNT", 3)):
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
