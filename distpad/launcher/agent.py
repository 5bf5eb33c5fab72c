"""The agent of one host: sends orders to its workers, forwards their messages, and kills leftover processes.

    python -m distpad.launcher.agent

The launcher starts one agent on each host, directly or by ssh or srun. Both exchange lines of JSON over the agent's
standard input and output, so that commands and secrets never appear on a command line. If the launcher ends, or sends
nothing for --lost-after-s, the agent ends the job's processes on its host, then itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pathlib
import signal
import socket
import sys
from typing import Any

import psutil

from distpad.launcher import facts, processes, render, times

DAEMONS = ("orted", "prted")  # Open MPI's, which may outlive a killed launcher
LIMIT = 1 << 22  # maximum bytes of one message
SAVES = 1 << 20  # bytes per look_s: more than sockets and event files take, less than a checkpoint


def main() -> None:
    """Serve until the launcher closes the agent's standard input, or is gone."""
    # A terminal, ssh or scancel signals the whole session. The workers receive the signal too, and report their ends.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    processes.adopt_orphans()
    asyncio.run(Agent().serve())


class Agent:
    """The state of one host's agent."""

    def __init__(self) -> None:
        self.orders: dict[str, Any] = {}
        self.workers: dict[asyncio.StreamWriter, dict[str, Any]] = {}  # connected workers: their hello messages
        self.rank_envs: dict[str, dict[str, str]] = {}  # rank: its own variables, if an engine starts the workers
        self.daemons: set[psutil.Process] = set()
        self.seen: set[psutil.Process] = set()  # the workers' descendants, in case that a worker is killed
        self.stopped: dict[psutil.Process, float] = {}  # the descendants that are stopped, and since when
        self.connected: dict[int, int | None] = {}  # the ids and ranks of all workers that have connected so far
        self.watchers: list[asyncio.Future[None]] = []  # tasks
        self.launcher: asyncio.StreamWriter

    async def serve(self) -> None:
        reader = await self._standard_streams()
        server, folder = None, None
        try:
            self.orders = json.loads(await reader.readline())
            folder = pathlib.Path(self.orders["folder"])
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
                raise OSError(f"{folder} belongs to another user, or is open to others")
            path = folder / f"{socket.gethostname()}.sock"
            server = await asyncio.start_unix_server(self._worker, path, limit=LIMIT)
            while self.orders["waits"] and not reader.at_eof() and processes.workers_here():
                self.send(is_="busy", text="the training of an earlier launcher")
                await asyncio.sleep(times.here().look_s)
            self.send(is_="ready", facts=facts.collect(self.orders["asked"]))
            beat = asyncio.ensure_future(self._beat())
            await self._listen(reader)
            await self._end_workers(self.orders["grace_s"])
            beat.cancel()
            self._look()
            self.send(is_="swept", left=processes.kill(self.seen | self.daemons | marked(self.orders["job"])))
        except (OSError, ValueError) as error:
            self.send(is_="broken", text=str(error) or type(error).__name__)
        finally:
            if server:
                server.close()
            if folder:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # two hosts of a test may share the folder
                    folder.rmdir()
            await self._flush()

    async def _standard_streams(self) -> asyncio.StreamReader:
        """Open both as streams that never block, so that the agent ends its job even if the launcher is cut off."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=LIMIT)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
        answers = asyncio.StreamReaderProtocol(asyncio.StreamReader())
        transport, protocol = await loop.connect_write_pipe(lambda: answers, sys.stdout.buffer)
        self.launcher = asyncio.StreamWriter(transport, protocol, None, loop)
        return reader

    async def _flush(self) -> None:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            self.launcher.transport.set_write_buffer_limits(0)
            await asyncio.wait_for(self.launcher.drain(), 1)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Handle the launcher's messages, until it closes the stream or is gone."""
        lost_after_s = self.orders["lost_after_s"]
        try:
            while line := await asyncio.wait_for(reader.readline(), lost_after_s):
                message = json.loads(line)
                what = message["do"]
                if what == "ranks":
                    self.rank_envs = message["envs"]
                elif what == "start":
                    for env in message["envs"].values():
                        await self._start(env)
                elif what == "signal":
                    self._signal_workers(message["number"])
                elif what == "watch":
                    self.watchers.append(asyncio.ensure_future(self._report_writes()))
                elif what == "end":
                    await self._end_workers(message["grace_s"])
        except asyncio.TimeoutError:
            self.send(is_="alone", text=f"its agent heard nothing from the launcher for {lost_after_s:g} s")

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(times.sign_of_life_s(self.orders["lost_after_s"]))
            self.send(is_="alive")
            self._look()
            self._kill_stopped()

    def _look(self) -> None:
        workers = [hello["pid"] for hello in self.workers.values()]
        found = processes.descendants([os.getpid(), *workers])
        self.seen |= {each for each in found if each.pid not in self.connected}  # workers end by themselves

    def _kill_stopped(self) -> None:
        """Kill processes of workers that have been stopped (SIGSTOP) for --lost-after-s: the other workers wait for
        them, over MPI without a time limit, and an elastic job waits for the end of their processes."""
        now = asyncio.get_running_loop().time()
        stopped = {}
        for hello in self.workers.values():
            for process in processes.descendants([hello["pid"]], with_roots=True):
                with contextlib.suppress(psutil.Error):
                    if process.status() != psutil.STATUS_STOPPED:
                        continue
                    stopped[process] = self.stopped.get(process, now)
                    if now > stopped[process] + self.orders["lost_after_s"]:
                        self.send(is_="stopped", rank=hello["rank"], seconds=now - stopped[process])
                        process.kill()
        self.stopped = stopped

    async def _report_writes(self) -> None:
        """Report that workers write to files, perhaps a checkpoint, so that the launcher leaves them time."""
        before = self._written()
        while True:
            await asyncio.sleep(times.here().look_s)
            now = self._written()
            if now - before > SAVES:
                self.send(is_="writing")
            before = now

    def _written(self) -> int:
        """The bytes that the workers' descendants have written so far."""
        total = 0
        for process in processes.descendants(hello["pid"] for hello in self.workers.values()):
            with contextlib.suppress(psutil.Error):
                total += process.io_counters().write_chars
        return total

    async def _start(self, env: dict[str, str]) -> None:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "distpad.launcher.worker", self.orders["folder"]),
            # Under srun, the agent is a task of a step of its own. Its workers are not part of that step.
            env={**{k: v for k, v in os.environ.items() if not render.MEMBERSHIP.fullmatch(k)}, **env},
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        rank = int(env["DISTPAD_RANK"])
        self.watchers.append(asyncio.ensure_future(self._watch(process, rank)))

    async def _watch(self, process: asyncio.subprocess.Process, rank: int) -> None:
        """Report the exit of a worker that never connected. Its output has reached the launcher as the agent's own."""
        code = await process.wait()
        if rank not in self.connected.values():
            self.send(is_="exit", rank=rank, code=code if code >= 0 else 128 - code)

    async def _worker(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one worker's connection: send its orders, then forward its messages."""
        hello: dict[str, Any] = {}
        ended = False
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["is"] == "hello":
                    hello = self.workers[writer] = message
                    self.connected[message["pid"]] = message["rank"]
                    with contextlib.suppress(psutil.Error):
                        parent = psutil.Process(message["parent"])
                        self.daemons |= {parent} if parent.name() in DAEMONS else set()
                    own = self.rank_envs.get(str(message["rank"]), {})
                    orders = {**self.orders, "env": {**self.orders["env"], **own}}
                    writer.write(json.dumps(orders).encode() + b"\n")
                ended = message["is"] == "exit"
                self.send(**{"rank": hello.get("rank"), **message})
                with contextlib.suppress(OSError):  # the launcher is gone; the worker still gets its grace period
                    await self.launcher.drain()  # slow down a command that writes faster than the launcher reads
        except (OSError, ValueError):
            pass  # the worker was killed, perhaps in the middle of a line
        if not ended:
            self.send(is_="gone", rank=hello.get("rank"))
        self.workers.pop(writer, None)
        writer.close()

    def _signal_workers(self, number: int) -> None:
        for writer in self.workers:
            writer.write(b"%d\n" % number)

    async def _end_workers(self, grace_s: float) -> None:
        """End the workers: send SIGTERM, wait for the grace period, and kill their descendants."""
        self._look()
        self._signal_workers(signal.SIGTERM)
        clock = asyncio.get_running_loop()
        deadline = clock.time() + grace_s
        while self.workers and clock.time() < deadline:
            await asyncio.sleep(0.05)
        self._look()
        processes.kill(self.seen)
        deadline = clock.time() + 1
        while self.workers and clock.time() < deadline:  # workers still report how their commands ended
            await asyncio.sleep(0.02)

    def send(self, is_: str = "", **fields: Any) -> None:
        self.launcher.write(json.dumps({"is": is_, **fields} if is_ else fields).encode() + b"\n")


def marked(job: str) -> set[psutil.Process]:
    """The processes on this host that carry the job's id, such as those of a worker that its engine has killed."""
    kept = {os.getpid(), *(process.pid for process in psutil.Process().parents())}
    here, found = processes.network("self"), set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.pid not in kept and processes.network(process.pid) == here
            if mine and process.environ().get("DISTPAD_JOB") == job:
                found.add(process)
    return found


if __name__ == "__main__":
    main()
