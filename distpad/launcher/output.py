"""The workers' output: bytes to files, lines to the terminal, and the last lines for the summary."""

from __future__ import annotations

import collections
import contextlib
import errno
import pathlib
import resource
import sys
import time
from typing import BinaryIO

from distpad.launcher import spec
from distpad.launcher.outcomes import log

LAST = 12  # lines per worker in the summary
LONGEST_LINE = 1 << 20  # bytes on the terminal, and in the summary; files have lines of any length
PROGRESS_S = 5.0  # between two states of a progress bar on the terminal


class Output:
    """The output of one attempt.

    Args:
      job: the job, whose options select files and terminal.
      attempt: the attempt's number. Its folder has this number, or the next one without a folder.

    Raises:
      ValueError: the folder cannot be made.
    """

    def __init__(self, job: spec.Job, attempt: int) -> None:
        self.folder: pathlib.Path | None = None
        if job.log_dir:
            try:
                self.folder = _fresh(pathlib.Path(job.log_dir), attempt)
            except OSError as error:
                raise ValueError(f"launch: --log-dir {job.log_dir} cannot be written: {error.strerror}.") from error
        self.shows = job.tee or not self.folder
        self.ranks = set(spec.parse_ranks(job.ranks))
        self.prefixes = job.workers > 1 or job.elastic
        self.files: dict[str, BinaryIO] = {}  # the most recently used one is the last
        self.unwritable: set[str] = set()
        self.begun: dict[tuple[int | None, str], bytes] = {}  # lines without their ends
        self.shown: dict[tuple[int | None, str], float] = {}  # when the terminal last showed a progress bar
        self.last: dict[int | None, collections.deque[str]] = {}

    def write(self, rank: int | None, stream: str, data: bytes) -> None:
        """Handle output of a worker, or of the engine's launcher (rank None), which the terminal does not show."""
        self._file("launcher" if rank is None else f"rank-{rank}.{stream}", data)
        if not self.prefixes:
            self._show(rank, stream, data)
        key = rank, stream
        *lines, rest = (self.begun.pop(key, b"") + data).split(b"\n")
        if len(rest) > LONGEST_LINE:
            lines, rest = [*lines, rest], b""
        for line in lines:
            self._line(rank, stream, _state(line))
        if b"\r" in rest[:-1]:  # a progress bar
            rest = _state(rest) + (b"\r" if rest.endswith(b"\r") else b"")
            if self.prefixes and time.monotonic() > self.shown.get(key, 0) + PROGRESS_S:
                self.shown[key] = time.monotonic()
                self._show(rank, stream, b"[worker %d] %s\n" % (rank or 0, _state(rest)))
        if rest:
            self.begun[key] = rest

    def _line(self, rank: int | None, stream: str, line: bytes) -> None:
        self.last.setdefault(rank, collections.deque(maxlen=LAST)).append(line.decode("utf-8", "replace"))
        if self.prefixes:
            self._show(rank, stream, b"[worker %d] %s\n" % (rank or 0, line))

    def _show(self, rank: int | None, stream: str, data: bytes) -> None:
        if rank is None or not self.shows or (self.ranks and rank not in self.ranks):
            return
        terminal = sys.stdout if stream == "stdout" else sys.stderr
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, as under `| head`, does not end the workers
            terminal.buffer.write(data)
            terminal.buffer.flush()

    def _file(self, name: str, data: bytes) -> None:
        if self.folder is None:
            return
        try:
            file = self.files.pop(name, None) or self._open(self.folder / name)
            self.files[name] = file
            left = memoryview(data)
            while left:  # a disk that becomes full takes a part
                left = left[file.write(left) :]
        except OSError as error:  # a full disk does not end the job, and may have room again later
            if name not in self.unwritable:
                log(f"{self.folder / name} cannot be written ({error.strerror}): output continues on the terminal")
            self.unwritable.add(name)
            self.shows = True

    def _open(self, path: pathlib.Path) -> BinaryIO:
        while True:
            try:
                return path.open("ab", buffering=0)
            except OSError as error:
                if error.errno != errno.EMFILE or not self.files:
                    raise
                self.files.pop(next(iter(self.files))).close()  # its worker's next output opens it again

    def close(self) -> None:
        for (rank, stream), line in self.begun.items():
            self._line(rank, stream, _state(line))
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def _state(line: bytes) -> bytes:
    """The part of a line that a terminal shows: what follows the last carriage return, as of a progress bar."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]


def _fresh(folder: pathlib.Path, number: int) -> pathlib.Path:
    """Create a new folder for an attempt."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            own = folder / f"attempt-{number}"
            own.mkdir()
            return own
        except FileExistsError:
            number += 1


def allow_open_files(job: spec.Job) -> None:
    """Raise this process's soft limit of open files if the job needs more: log files, and pipes to the agents."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 64 + 8 * len(job.hosts) + 2 * (job.max_np or job.workers)
    if soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        log(f"raised the limit of open files from {soft} to {raised}")
