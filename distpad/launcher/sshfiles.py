"""The files of ssh and sshd in a pod without root: one folder, made from the key pair that the operator mounts.

All pods of an MPI job get the same key pair. It serves as the user's key, as the authorized key, and as the host key of
each pod. The launcher therefore knows the pods' host keys in advance, and checks them.
"""

from __future__ import annotations

import os
import pathlib

FILES = ("id_rsa", "id_rsa.pub", "authorized_keys")  # the operators' names for a key of any type

SSH_CONFIG = """Host *
  Port {port}
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  CheckHostIP no
  UpdateHostKeys no
  BatchMode yes
"""
# Without root, sshd cannot switch users, use PAM or record logins. Kubernetes sets the permissions of mounted folders.
SSHD_CONFIG = """HostKey {folder}/key
AuthorizedKeysFile {folder}/authorized_keys
AuthenticationMethods publickey
UsePAM no
StrictModes no
PidFile none
PrintMotd no
PrintLastLog no
DisableForwarding yes
MaxStartups 1000
ClientAliveInterval 10
ClientAliveCountMax 6
"""


def folder() -> pathlib.Path:
    """The folder's path, the same in all pods, since Open MPI's daemons reuse the launcher's ssh command line."""
    return pathlib.Path(f"/tmp/distpad-ssh-{os.getuid()}")


def write(keys: pathlib.Path, target: pathlib.Path, port: int) -> None:
    """Write the files.

    Args:
      keys: the mount path of the operator's Secret.
      target: a folder that only this user can access. It is created if it does not exist.
      port: the port of sshd in all pods.

    Raises:
      ValueError: keys are missing or cannot be read, or other users can access the folder.
    """
    try:
        private, public, authorized = ((keys / name).read_bytes() for name in FILES)
    except OSError as error:
        raise ValueError(
            f"pod: {error.filename} cannot be read ({error.strerror}), expected the key pair of the operator's Secret. "
            "Mount it there, readable for this user (defaultMode 0440 with fsGroup), or give its folder with --keys."
        ) from error
    try:
        target.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = target.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ValueError(f"pod: {target} belongs to another user, or is open to others, expected a private folder.")
        names = {"folder": target, "port": port}
        for name, content in (
            ("key", private),
            ("authorized_keys", authorized),
            ("known_hosts", b"* " + public),
            ("ssh_config", SSH_CONFIG.format(**names).encode()),
            ("sshd_config", SSHD_CONFIG.format(**names).encode()),
        ):
            _write_private(target / name, content)
    except OSError as error:
        raise ValueError(f"pod: {error.filename} cannot be written: {error.strerror}.") from error


def _write_private(file: pathlib.Path, content: bytes) -> None:
    """Write a file that other users cannot read at any time."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
