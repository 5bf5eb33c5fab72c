"""Pods of Kubernetes as hosts of a test: what distpad's entry point finds in one, and nothing more.

    with pods.up(["train-0", "train-1"], service="workers") as (first, second):
        assert first.run(["id", "-u"]).stdout == "10001\\n"

A pod has the host name that Kubernetes would give it, and knows the others by the names of their headless Service. What
runs in it is an ordinary user without any capability, sees a read-only file system with an empty /tmp of its own, and
gets no variable but those that it is given. No sshd runs there.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cluster import hosts

ROOT = pathlib.Path(__file__).resolve().parents[2]
SSH_CONFIG = ROOT / "k8s" / "image" / "ssh_config"
NAMESPACE = "default"
AS_USER = (
    *("setpriv", f"--reuid={hosts.USER}", f"--regid={hosts.USER}", "--clear-groups"),
    *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
)
# What an image would have, and how many threads a test may use.
IMAGE = {
    "PATH": f"{pathlib.Path(sys.executable).parent}:{hosts.PLAIN['PATH']}",
    "LANG": "C.UTF-8",
    "HOME": hosts.USER_HOME,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class Pod:
    """One pod. ``host`` is what it is made of, which can be cut off."""

    def __init__(self, host: hosts.Host) -> None:
        self.host, self.name = host, host.name

    def popen(self, argv: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None, **settings: Any):
        """Start a command as the pod's user: both its streams in one."""
        spaces = self.host.command([*AS_USER, *argv], cwd="/")
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            spaces, env={**IMAGE, **(env or {})}, text=True, start_new_session=True, **{**streams, **settings}
        )

    def run(self, argv: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None, limit_s: float = 60):
        """Run a command to its end."""
        process = self.popen(argv, env)
        output, _ = process.communicate(timeout=limit_s)
        return subprocess.CompletedProcess(argv, process.returncode, output)

    def kill(self) -> None:
        """End all that runs in it at once, as where its node is lost, but that its network says so."""
        for process in self.host.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def up(names: Sequence[str], *, service: str, shared: Sequence[pathlib.Path] = ()) -> Iterator[tuple[Pod, ...]]:
    """Bring up pods, and end them with all that runs in them.

    Args:
        names: their host names.
        service: the headless Service.
        shared: folders that all see, at the same path, as a volume.
    """

    def known_as(name: str) -> list[str]:
        behind = (
            f"{service}.{NAMESPACE}.svc.cluster.local",
            f"{service}.{NAMESPACE}.svc",
            f"{service}.{NAMESPACE}",
            service,
        )
        return [f"{name}.{each}" for each in behind]

    seen = [pathlib.Path(path).resolve() for path in (ROOT, sys.prefix, sys.base_prefix, *shared)]
    with hosts.cluster(len(names), names=names, known_as=known_as, sshd=False) as found:
        for host in found:
            done = host.run(["sh", "-ec", _view(seen)], cwd="/")
            assert done.returncode == 0, done.stdout
        yield tuple(map(Pod, found))


def _view(seen: Sequence[pathlib.Path]) -> str:
    """The commands that give a pod its file system: everything read-only, /tmp empty, the image's /etc/ssh, and folders
    that are closed to others out of the way (root's, in which this Python may stand)."""
    covers = {pathlib.Path("/tmp"): "1777"}
    for path in seen:
        closed = [parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001]
        if closed and not any(cover in path.parents for cover in covers):
            covers[closed[0]] = "755"
    lines = ["mkdir -m 700 /run/behind"]
    for number, (cover, mode) in enumerate(covers.items()):
        behind = f"/run/behind/{number}"
        lines += [f"mkdir {behind}", f"mount --bind {cover} {behind}", f"mount -t tmpfs -o mode={mode} tmpfs {cover}"]
        for path in seen:
            if cover in path.parents:
                where, source = shlex.quote(str(path)), shlex.quote(f"{behind}/{path.relative_to(cover)}")
                lines += [f"mkdir -p {where}", f"mount --bind {source} {where}"]
    lines.append(f"mount --bind {shlex.quote(str(SSH_CONFIG))} /etc/ssh/ssh_config")
    return "\n".join([*lines, "mount -o remount,bind,ro /"])
