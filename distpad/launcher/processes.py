"""The processes of a job on one host, found through their ancestors.

A process may leave its group, session and environment, but not its tree: a worker and an agent are subreapers, so that
a descendant whose parent ends becomes their own child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from distpad.launcher import times

if TYPE_CHECKING:
    import psutil  # at run time where it is needed: most workers leave nothing, and start faster without it

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
MOST_ROUNDS = 5  # of killing processes that start others


def adopt_orphans() -> None:
    """Make this process the parent of its descendants whose parents end, and let it learn their exit codes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, as some parents leave it, it would lose them
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(roots: Iterable[int], *, with_roots: bool = False) -> set[psutil.Process]:
    """The children of the processes with these ids, their children, and so on."""
    import psutil

    found: set[psutil.Process] = set()
    for root in roots:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(root)
            if process not in found:
                found.update(process.children(recursive=True), [process] if with_roots else [])
    return found


def connections(root: int, host: str) -> list[psutil.Process]:
    """The descendants of a process that are an ssh to a host."""
    import psutil

    found = []
    for process in descendants([root]):
        with contextlib.suppress(psutil.Error):
            if process.name() == "ssh" and host in process.cmdline():
                found.append(process)
    return found


def kill(found: Collection[psutil.Process]) -> list[str]:
    """Kill processes, wait until they have disappeared, and return their own programs and ids."""
    import psutil

    killed = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            program = process.name()
            with contextlib.suppress(psutil.Error):  # another user's
                program = process.exe() or program
            process.kill()
            killed.append(f"{program} ({process.pid})")
    psutil.wait_procs(found, timeout=times.KILLED_S)
    return killed


def kill_descendants() -> list[str]:
    """Kill the descendants of this process, and what they start meanwhile. The process must be a subreaper."""
    killed: list[str] = []
    with contextlib.suppress(ChildProcessError):  # a subreaper without children has no descendants
        for _ in range(MOST_ROUNDS):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            killed += kill(descendants([os.getpid()]))
    return killed


def network(pid: int | str) -> str:
    """The network namespace of a process. In tests, hosts are network namespaces of one machine."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return ""


def workers_here() -> list[psutil.Process]:
    """The workers of all jobs on this host, which forward signals to the training."""
    import psutil

    here, found = network("self"), []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "distpad.launcher.worker" in process.cmdline() and network(process.pid) == here:
                found.append(process)
    return found


def run(
    argv: Sequence[str], *, text: str = "", env: Mapping[str, str] | None = None, limit_s: float
) -> tuple[int | None, str, str]:
    """Run a program to its end, in a session of its own. Its children end with it.

    Returns:
      Its exit code, or None after the time limit; its standard output and standard error.

    Raises:
      OSError: the program cannot be started.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True
    )
    code = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, wrote = process.communicate(text, timeout=limit_s)
            code = process.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if code is None:
        output, wrote = process.communicate()
    return code, output, wrote


def wait(child: int) -> int:
    """Wait for the end of a child, and of orphans that this process has adopted. Returns the child's exit code."""
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def die_with_parent(parent: int) -> None:
    """Let the kernel kill this process with its parent, whose id is given in case that it has ended already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
