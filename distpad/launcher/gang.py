"""The pods of a plain Job start together and end together.

A Job of Kubernetes replaces each failed pod on its own. A pod that has succeeded never starts again, so that a replaced
peer would wait for it forever; and one failure, which ends all workers, would count once for each. (A JobSet restarts
all pods itself.) Each pod therefore holds a connection to pod 0. Training starts when all are connected. When one
closes, all end. No pod succeeds before all are done. A replaced pod is connected when pod 0 has been replaced too.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from distpad.launcher import times

START, DONE, LOST = b"s", b"d", b"l"  # LOST and the index of the pod; a pod introduces itself by its index
MESSAGE_BYTES = 16


class Gang:
    """This pod's connections: those of pod 0 to all others, or that of another pod to pod 0.

    Args:
      names: the host names of all pods, by index.
      index: this pod's index.
      port: the port at which pod 0 listens.

    Attributes:
      lost: is set when another pod has failed or is lost.
      whom: the pods that ``join`` waits for, or the pod that is lost, as text.
    """

    def __init__(self, names: Sequence[str], index: int, port: int) -> None:
        self.names, self.index, self.port = names, index, port
        self.lost, self.whom = threading.Event(), ""
        self._peers: dict[int, socket.socket] = {}
        self._done, self._all_done = threading.Event(), threading.Event()

    def join(self, wait_s: float, report: Callable[[str], None]) -> bool:
        """Wait until all pods are connected. Returns False after ``wait_s`` seconds. Pod 0 reports the missing pods.

        Raises:
          OSError: pod 0 cannot listen at its port.
        """
        end = time.monotonic() + wait_s
        if not (self._connect(end) if self.index else self._accept(end, report)):
            return False
        threading.Thread(target=self._listen, daemon=True).start()
        return True

    def _accept(self, end: float, report: Callable[[str], None]) -> bool:
        """Pod 0 collects the others. It goes on listening, so that a replaced pod waits in the queue of connections."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(
            ("", self.port), family=family, backlog=len(self.names), dualstack_ipv6=family == socket.AF_INET6
        )
        reported = time.monotonic()
        while missing := [name for index, name in enumerate(self.names) if index and not self._is_here(index)]:
            self.whom = few(missing)
            if time.monotonic() > end:
                return False
            if time.monotonic() > reported + times.here().report_s:
                reported = time.monotonic()
                report(f"waiting for {self.whom}")
            self._listener.settimeout(times.JOIN_AGAIN_S)
            with contextlib.suppress(OSError, ValueError):  # nobody came, or a stranger
                peer = _kept_alive(self._listener.accept()[0])
                peer.settimeout(times.ANSWER_S)
                index = int(peer.recv(MESSAGE_BYTES))
                peer.setblocking(False)
                if 0 < index < len(self.names):
                    self._peers[index] = peer  # the latest, if a pod was replaced meanwhile
        self._send(START)
        return True

    def _is_here(self, index: int) -> bool:
        try:
            return index in self._peers and self._peers[index].recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _connect(self, end: float) -> bool:
        while (left := end - time.monotonic()) > 0:
            self.whom = f"{self.names[0]} (no answer at port {self.port})"
            with contextlib.suppress(OSError):
                peer = _kept_alive(socket.create_connection((self.names[0], self.port), min(left, times.ANSWER_S)))
                peer.sendall(str(self.index).encode())
                self.whom = f"the pods that {self.names[0]} waits for"
                peer.settimeout(max(times.POLL_S, end - time.monotonic()))
                if peer.recv(1) == START:
                    self._peers[0] = peer
                    return True
            time.sleep(times.JOIN_AGAIN_S)
        return False

    def _listen(self) -> None:
        """Wait until all are done, or one is lost."""
        done: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for index, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, index)
            while not self._all_done.is_set():
                for key, _ in selector.select(times.POLL_S):
                    message = _receive(self._peers[key.data])
                    if message[:1] != DONE:
                        return self._lose(int(message[1:] or key.data))
                    done.add(key.data)
                if len(done) == len(self._peers) and (self.index or self._done.is_set()):
                    if self.index == 0:
                        self._send(DONE)
                    self._all_done.set()

    def _lose(self, index: int) -> None:
        self.whom = self.names[index]
        if self.index == 0:  # tell the others
            self._send(LOST + str(index).encode())
        for peer in self._peers.values():
            peer.close()
        self.lost.set()

    def _send(self, message: bytes) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(message)

    def finish(self, wait_s: float) -> bool:
        """Report that this pod is done, and wait until all are. Returns False if one is lost, or after ``wait_s``."""
        if self.index:
            self._send(DONE)
        self._done.set()
        end = time.monotonic() + wait_s
        while not self._all_done.wait(times.POLL_S):
            if self.lost.is_set() or time.monotonic() > end:
                return False
        return True


def _receive(peer: socket.socket) -> bytes:
    """The next message; empty if the peer is lost."""
    try:
        return peer.recv(MESSAGE_BYTES)
    except OSError:
        return b""


def _kept_alive(peer: socket.socket) -> socket.socket:
    """Let the kernel detect a silent peer, such as a pod of a lost node."""
    period_s = max(1, round(times.here().lost_s / 4))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", period_s), ("TCP_KEEPINTVL", period_s), ("TCP_KEEPCNT", 3)):
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return peer


def few(names: Sequence[str]) -> str:
    """A short text of names: at most 8, and the number of the others."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
