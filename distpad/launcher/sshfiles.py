"""What ssh and sshd need in a pod that is no root's: one folder, made from the key pair that the operator mounts.

All pods of an MPI job are given the same key pair. Here it is the user's key, the key that opens, and the host key of
each pod: so the launcher knows the pods' host keys beforehand, and checks them.
"""

from __future__ import annotations

import os
import pathlib

FILES = ("id_rsa", "id_rsa.pub", "authorized_keys")  # so the operators name them, whatever kind of key it is

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
# Not as root there is no other user to become, no PAM, and no record of logins; the permissions of mounted folders are
# Kubernetes's.
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
    """Where the files are: at one path in all pods, since Open MPI's daemons start others by the launcher's words."""
    return pathlib.Path(f"/tmp/distpad-ssh-{os.getuid()}")


def write(keys: pathlib.Path, place: pathlib.Path, port: int) -> None:
    """Write them.

    Args:
      keys: the folder that the operator's Secret is mounted at.
      place: a folder of this user's alone, which is made where it is not there.
      port: where sshd listens in all pods.

    Raises:
      ValueError: keys are missing, cannot be read, or the folder is not this user's alone.
    """
    try:
        private, public, authorized = ((keys / name).read_bytes() for name in FILES)
    except OSError as error:
        raise ValueError(
            f"pod: {error.filename} cannot be read ({error.strerror}), expected the key pair of the operator's Secret. "
            "Mount it there, readable for this user (defaultMode 0440 with fsGroup), or name its folder with --keys."
        ) from error
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise ValueError(f"pod: {place} belongs to somebody else, or is open to others, expected a folder of ours.")
        names = {"folder": place, "port": port}
        for name, content in (
            ("key", private),
            ("authorized_keys", authorized),
            ("known_hosts", b"* " + public),
            ("ssh_config", SSH_CONFIG.format(**names).encode()),
            ("sshd_config", SSHD_CONFIG.format(**names).encode()),
        ):
            _write_private(place / name, content)
    except OSError as error:
        raise ValueError(f"pod: {error.filename} cannot be written: {error.strerror}.") from error


def _write_private(file: pathlib.Path, content: bytes) -> None:
    """Readable for nobody else at any time."""
    file.unlink(missing_ok=True)
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as opened:
        opened.write(content)
