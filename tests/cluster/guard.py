"""Hold the namespaces of a test's hosts, and kill all processes in them when the test's process ends for any reason.

    python guard.py FOLDER NAME...

Prints the process id of a keeper for each name: a process that only sleeps, with its own network, host name and mount
namespace. Then waits for a line on its input, or for the end of the input if the test's process is killed. The guard
is therefore a separate process. Namespaces have no names, so that they cannot conflict with a later run.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

LIMIT_S = 20

# /dev/shm and /run belong to one host: they hold MPI's shared memory, sockets and pid files.
KEEPER = """set -e
echo "$1" >/proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd
for file in "$2/$1/etc"/*; do mount --bind "$file" "/etc/${file##*/}"; done
echo ready
exec sleep infinity
"""


def keep(folder: str, name: str) -> subprocess.Popen[str]:
    """Start the keeper of one host."""
    unshare = ["unshare", "--net", "--uts", "--mount", "--propagation", "private"]
    return subprocess.Popen(
        [*unshare, "sh", "-c", KEEPER, "keeper", name, folder],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )


def network(process: int | str) -> int | None:
    """The network namespace of a process; None if it has ended."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{process}/ns/net").st_ino
    return None


def inhabitants(networks: set[int]) -> list[int]:
    """All processes in these network namespaces."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and network(entry) in networks]


def end(networks: set[int]) -> None:
    """Kill until no process is left. A process that forks during one pass is found in the next."""
    limit = time.monotonic() + LIMIT_S
    while (left := inhabitants(networks)) and time.monotonic() < limit:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def main(folder: str, names: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # these signals are for the test's process; the guard waits for its end
    keepers = [keep(folder, name) for name in names]
    ready = [keeper.stdout is not None and keeper.stdout.readline() == "ready\n" for keeper in keepers]
    networks = {found for keeper in keepers if (found := network(keeper.pid))} - {network("self")}
    try:
        if all(ready):
            print(*(keeper.pid for keeper in keepers), flush=True)
            sys.stdin.readline()
    finally:
        end(networks)
        for keeper in keepers:
            keeper.wait()
        shutil.rmtree(pathlib.Path(folder), ignore_errors=True)
    return 0 if all(ready) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
