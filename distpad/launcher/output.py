"""The workers' output: written to files and the terminal, its last lines kept for the summary."""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import sys
from typing import TextIO

from distpad.launcher import spec
from distpad.launcher.outcomes import log

LAST = 12  # lines per worker in the summary


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
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for characters that the terminal cannot encode
        self.shows = job.tee or not self.folder
        self.ranks = set(job.ranks)
        self.prefixes = job.workers > 1 or job.elastic
        self.files: dict[str, TextIO] = {}
        self.last: dict[int | None, collections.deque[str]] = {}

    def line(self, rank: int | None, stream: str, text: str) -> None:
        """Handle one line of a worker, or of the engine's launcher (rank None), which the terminal does not show."""
        self.last.setdefault(rank, collections.deque(maxlen=LAST)).append(text)
        self._file("launcher" if rank is None else f"rank-{rank}.{stream}", text)
        if rank is None or not self.shows or (self.ranks and rank not in self.ranks):
            return
        target = sys.stdout if stream == "stdout" else sys.stderr
        with contextlib.suppress(OSError):  # a closed pipe, as under `| head`, does not end the workers
            target.write(f"[worker {rank}] {text}\n" if self.prefixes else f"{text}\n")
            target.flush()

    def _file(self, name: str, text: str) -> None:
        if self.folder is None:
            return
        try:
            if name not in self.files:
                self.files[name] = (self.folder / name).open("w", encoding="utf-8")
            self.files[name].write(text + "\n")
            self.files[name].flush()
        except OSError as error:  # a full disk does not end the job
            log(f"{self.folder / name} cannot be written ({error.strerror}): output continues on the terminal")
            self.folder, self.shows = None, True

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


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
