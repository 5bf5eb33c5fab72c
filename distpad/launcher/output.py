"""What the workers write: to files, to the terminal, and the last of it for the summary."""

from __future__ import annotations

import collections
import contextlib
import io
import pathlib
import sys
from typing import TextIO

from distpad.launcher import spec
from distpad.launcher.outcomes import say

LAST = 12  # lines of a worker that the summary shows


class Output:
    """The lines of one attempt.

    Args:
      job: says where they go.
      attempt: its number, which its folder has, or a higher one where an earlier run has left its own.

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
            sys.stdout.reconfigure(errors="backslashreplace")  # workers may write what this terminal does not know
        self.shows = job.tee or not self.folder
        self.ranks = set(job.ranks)
        self.prefixes = job.workers > 1 or job.elastic
        self.files: dict[str, TextIO] = {}
        self.last: dict[int | None, collections.deque[str]] = {}

    def line(self, rank: int | None, stream: str, text: str) -> None:
        """Take one line of a worker, or of the engine's launcher (rank None), which is kept but not shown."""
        self.last.setdefault(rank, collections.deque(maxlen=LAST)).append(text)
        self._file("launcher" if rank is None else f"rank-{rank}.{stream}", text)
        if rank is None or not self.shows or (self.ranks and rank not in self.ranks):
            return
        target = sys.stdout if stream == "stdout" else sys.stderr
        with contextlib.suppress(OSError):  # nobody reads us any more, as under `| head`: the workers go on
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
        except OSError as error:  # a full disk is no reason to end a job that does not need it
            say(f"{self.folder / name} cannot be written ({error.strerror}): from here on all is shown here")
            self.folder, self.shows = None, True

    def close(self) -> None:
        for file in self.files.values():
            with contextlib.suppress(OSError):
                file.close()


def _fresh(folder: pathlib.Path, number: int) -> pathlib.Path:
    """A folder of this attempt's own."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            own = folder / f"attempt-{number}"
            own.mkdir()
            return own
        except FileExistsError:
            number += 1
