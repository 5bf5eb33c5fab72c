"""Pods of Kubernetes as hosts of a test, with only the environment that a container's command gets.

    with pods.up(["train-0", "train-1"], service="workers") as (first, second):
        assert first.run(["id", "-u"]).stdout == "10001\\n"

A pod has the host name that Kubernetes would give it, and resolves the other pods by the names of their headless
Service. Its processes run as an ordinary user without capabilities, on a file system of their own, which is read-only
except for mounts, and with explicit variables only. No sshd runs there.
"""

from __future__ import annotations

import compileall
import contextlib
import dataclasses
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
SSH = [ROOT / "k8s" / "image" / name for name in ("ssh_config", "sshd_config")]
HOME = "/opt/distpad"  # of the project in the image
NAMESPACE = "default"
# The variables of an image, and the number of threads in a test.
IMAGE = {
    "PATH": f"{pathlib.Path(sys.executable).parent}:{hosts.PLAIN['PATH']}",
    "LANG": "C.UTF-8",
    "HOME": hosts.USER_HOME,
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": f"{HOME}:{HOME}/tests/quick",
    "OMP_NUM_THREADS": "1",
    "TF_NUM_INTRAOP_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Mount:
    """A mount in a pod.

    Attributes:
        path: the mount point.
        source: a folder of this machine; None for a new tmpfs.
        options: options of mount, such as ``ro`` and, for a tmpfs, ``size=1g``.
    """

    path: str
    source: pathlib.Path | None = None
    options: str = "rw"

    def command(self, root: str) -> str:
        where = shlex.quote(f"{root}/{self.path.lstrip('/')}")
        if self.source is None:
            return f"mkdir -p {where} && mount -t tmpfs -o {self.options} tmpfs {where}"
        return f"mkdir -p {where} && mount --bind -o {self.options} {shlex.quote(str(self.source))} {where}"


SCRATCH = (Mount("/tmp", options="mode=1777"), Mount("/dev/shm", options="mode=1777"))

compileall.compile_dir(ROOT / "distpad", quiet=1)  # pods cannot write bytecode: each would compile distpad again


class Pod:
    """One pod.

    Args:
        host: the host that runs it, which tests can cut off.
        mounts: further mounts besides the image's.
        user: id of its user and group.
        groups: further groups.
    """

    def __init__(
        self,
        host: hosts.Host,
        mounts: Sequence[Mount] = SCRATCH,
        user: tuple[int, int] = (hosts.USER, hosts.USER),
        groups: Sequence[int] = (),
    ) -> None:
        self.host, self.name = host, host.name
        number = host.run(["sh", "-c", "ls /run | grep -c ^pod- || true"], cwd="/").stdout.strip()
        self.root = f"/run/pod-{number}"  # of this host alone
        done = host.run(["sh", "-ec", _make_root(self.root, mounts)], cwd="/")
        assert done.returncode == 0, done.stdout
        named = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
        self.as_user = (
            *("setpriv", f"--reuid={user[0]}", f"--regid={user[1]}", named),
            *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--"),
        )

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        env: Mapping[str, str] | None = None,
        *,
        first: bool = False,
        **settings: Any,
    ) -> subprocess.Popen[str]:
        """Start a command as the pod's user, with both output streams in one.

        Args:
            argv: the command.
            env: its variables, besides the image's.
            first: whether it is process 1 of its own namespace, as in a container. Unhandled signals then have no
                effect, and its children end with it. The returned process is its parent.
            settings: as in ``subprocess.Popen``.
        """
        inside = ["chroot", self.root, "env", f"--chdir={HOME}", *self.as_user, *map(os.fspath, argv)]
        if first:
            apart = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
            prepared = f'mount -t proc proc {self.root}/proc && exec "$@"'
            inside = [*apart, "sh", "-c", prepared, "sh", *inside]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(
            self.host.command(inside, cwd="/"),
            env={**IMAGE, **(env or {})},
            text=True,
            start_new_session=True,
            **{**streams, **settings},
        )

    def run(self, argv: Sequence[str | os.PathLike[str]], env: Mapping[str, str] | None = None, limit_s: float = 60):
        """Run a command to its end."""
        process = self.popen(argv, env)
        output, _ = process.communicate(timeout=limit_s)
        return subprocess.CompletedProcess(argv, process.returncode, output)

    def kill(self) -> None:
        """Kill all its processes at once, like the loss of its node, except that its connections are closed."""
        for process in self.host.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@contextlib.contextmanager
def nodes(names: Sequence[str], *, service: str) -> Iterator[tuple[hosts.Host, ...]]:
    """Start the nodes of pods, one host for each pod.

    Args:
        names: the pods' host names.
        service: the headless Service.
    """

    def known_as(name: str) -> list[str]:
        behind = f"{service}.{NAMESPACE}"
        return [f"{name}.{each}" for each in (f"{behind}.svc.cluster.local", f"{behind}.svc", behind, service)]

    with hosts.cluster(len(names), names=names, known_as=known_as, sshd=False) as found:
        yield found


@contextlib.contextmanager
def up(names: Sequence[str], *, service: str, mounts: Sequence[Mount] = ()) -> Iterator[tuple[Pod, ...]]:
    """Start pods, and end them with all their processes.

    Args:
        names: their host names.
        service: the headless Service.
        mounts: further mounts of all pods.
    """
    with nodes(names, service=service) as found:
        yield tuple(Pod(host, (*SCRATCH, *mounts)) for host in found)


def _make_root(root: str, mounts: Sequence[Mount]) -> str:
    """The commands that create a pod's file system: read-only programs of this machine and the image, and mounts."""
    seen = {str(path): path for path in map(pathlib.Path, (ROOT, sys.prefix, sys.base_prefix))}
    image = [Mount("/usr", pathlib.Path("/usr"), "ro"), Mount("/sys", pathlib.Path("/sys"), "ro")]
    image += [Mount(HOME, ROOT, "ro"), *(Mount(name, path, "ro") for name, path in seen.items())]
    return "\n".join(
        [
            f"mkdir {root}",
            f"mount -t tmpfs -o mode=755 tmpfs {root}",
            f"cp -a /bin /lib* /sbin /etc {root}/",  # all except /etc are links to folders in /usr
            f"cp {shlex.join(map(str, SSH))} {root}/etc/ssh/",
            f"mkdir {root}/proc {root}/dev {root}/run {root}/var",
            f"mount --rbind /dev {root}/dev",
            f"mount --bind /proc {root}/proc",
            *(each.command(root) for each in (*mounts, *image)),  # the checkout may be in /tmp, which is a mount
            f"mount -o remount,bind,ro {root}",
        ]
    )
