"""distpad doctor on two hosts: no findings without faults, and each fault with its host and remedy."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import sys
import time

import pytest

from cluster import hosts
from scripts import script

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 100  # of the doctor; alone on the machine it takes 10 s
PORT = 23456
pytestmark = [pytest.mark.timeout(3 * LIMIT_S), pytest.mark.xdist_group("doctor")]


@pytest.fixture
def pair():
    with hosts.cluster(2) as up:
        yield up


def doctor(host, *arguments, python=sys.executable, limit_s=LIMIT_S, **settings):
    """Run ``distpad doctor`` on a host, and return its exit code and output."""
    kept = {name: value for name, value in os.environ.items() if not re.match("TF_CONFIG|SLURM_|OMPI_", name)}
    environment = {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **settings}
    call = [sys.executable, "-m", "distpad", "doctor", "-H", "host1,host2", "--python", python]
    before, began = set(host.processes()), time.monotonic()
    shown = host.run([*call, "--timeout-s", str(limit_s), *arguments], limit_s=limit_s + 60, env=environment)
    assert time.monotonic() - began < limit_s + 30
    left = set(host.processes()) - before
    assert not left, f"left on {host.name}: {left}"
    return shown.returncode, shown.stdout


def errors(output: str) -> list[tuple[str, str, str, str]]:
    found = [each for each in json.loads(output)["findings"] if each["state"] == "error"]
    return [(each["host"], each["what"], each["evidence"], each["remedy"]) for each in found]


@pytest.mark.wide
def test_two_good_hosts(pair):
    code, output = doctor(pair[0], "--port", str(PORT), "--code", str(ROOT / "launch"))
    assert code == 0, output
    assert "host1, host2" in output and re.search(r"\(2 hosts, \d+ of \d+ checks passed\)", output)
    assert "error" not in output.replace("no error", "")


def test_faults_of_the_network(pair, tmp_path):
    """Several faults at once: doctor reports each of them. They need no TensorFlow, which takes long to import."""
    host1, host2 = pair
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif 'distpad.launcher.builds' in sys.orig_argv: os._exit(1)\n"
    )
    host2.resolve_to_loopback()
    host2.occupy(PORT)
    host1.resolve_to_loopback("host2")  # so that host1 resolves host2 to itself
    code, output = doctor(host2, "--port", str(PORT), PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == 1, output
    for row in (
        r"host2 +names: its own name host2 resolves to 127\.0\.1\.1.* Set its real address in /etc/hosts there",
        r"host1 +names: the name host2 resolves to 127\.0\.1\.1.* Set its real address",
        rf"host2 +ports: port {PORT} is not free: address already in use +Find its process with ss -ltnp",
    ):
        assert re.search(row, output), f"{row}\n{output}"


@pytest.mark.wide  # also in tests/cluster/test_launch.py
def test_an_ssh_server_that_is_down(pair):
    pair[1].stop_sshd()
    code, output = doctor(pair[0], "--json")
    assert code == 1
    assert errors(output) == [
        ("host2", "reach", "no ssh server listens there", "Check on the host: systemctl status ssh")
    ]


@pytest.mark.wide
def test_a_host_key_that_changed(pair):
    pair[1].change_host_key()
    code, output = doctor(pair[0], "--json")
    assert code == 1
    ((host, what, evidence, remedy),) = errors(output)
    assert (host, what) == ("host2", "reach")
    assert "its host key has changed" in evidence and "ssh-keygen -R host2" in remedy


@pytest.mark.wide
def test_a_host_that_is_cut_off_ends_in_time(pair):
    pair[1].cut()
    code, output = doctor(pair[0], "--json", limit_s=60)
    assert code == 1
    ((host, what, evidence, _),) = errors(output)
    assert (host, what) == ("host2", "reach") and re.search("did not answer|does not answer|no route", evidence)


@pytest.mark.wide
def test_another_tensorflow_and_stale_code(pair, tmp_path):
    """host2 runs another Python, as in a wrong environment: another version of a package, and a changed distpad."""
    stale = tmp_path / "stale"
    shutil.copytree(ROOT / "distpad", stale / "distpad")
    (stale / "distpad" / "errors.py").write_text("# changed\n" + (ROOT / "distpad" / "errors.py").read_text())
    name = _tensorflow_package()
    information = stale / f"{name.replace('-', '_')}-9.9.9.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9.9\n")
    elsewhere = f'[ "$(hostname)" = host2 ] && export PYTHONPATH={stale}; exec {sys.executable} "$@"'
    code, output = doctor(pair[0], "--json", python=str(script(tmp_path / "python", elsewhere)))
    assert code == 1
    found = {what: (host, evidence) for host, what, evidence, _ in errors(output)}
    assert set(found) == {"versions", "distpad's code"}, output
    host, evidence = found["versions"]
    assert host == "host2" and re.fullmatch(rf"{name} differs: host1 has [\d.]+, host2 has 9\.9\.9", evidence)
    assert found["distpad's code"] == ("host2", "distpad's own code differs from the other hosts' in errors.py")


@pytest.mark.wide
def test_a_host_without_distpad(pair, tmp_path):
    elsewhere = f'[ "$(hostname)" = host2 ] && exec {sys.executable} -S -I "$@"; exec {sys.executable} "$@"'
    code, output = doctor(pair[0], "--json", python=str(script(tmp_path / "python", elsewhere)))
    assert code == 1
    ((host, what, evidence, remedy),) = errors(output)
    assert (host, what) == ("host2", "reach") and "distpad is not installed there" in evidence
    assert "pip install distpad" in remedy


def _tensorflow_package() -> str:
    installed = {each.metadata["Name"].replace("_", "-") for each in importlib.metadata.distributions()}
    return next(name for name in ("tensorflow-cpu", "tensorflow") if name in installed)
