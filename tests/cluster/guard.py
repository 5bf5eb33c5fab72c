"""Hold the namespaces of a test's hosts, and end all that runs in them when the test's process ends, in whatever way.

    python guard.py FOLDER NAME...

Prints the process id of a keeper for each name: a process that only sleeps, with a network, a host name and a view of
the file system of its own. Then waits for a line on its input or, where the test's process was killed, for the end of
it: this is why the guard is a process apart. No namespace has a name, so none can be in the way of a later run.
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

# /dev/shm and /run hold what belongs to one host: shared memory of MPI, sockets and pid files.
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
    """The network namespace that a process is in; None where it has ended."""
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{process}/ns/net").st_ino
    return None


def inhabitants(networks: set[int]) -> list[int]:
    """The processes of these networks, whoever started them."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and network(entry) in networks]


def end(networks: set[int]) -> None:
    """Kill until nobody is left: one that forks while the list is read is on the next."""
    limit = time.monotonic() + LIMIT_S
    while (left := inhabitants(networks)) and time.monotonic() < limit:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.01)


def main(folder: str, names: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the test's process: its end is what counts here
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
