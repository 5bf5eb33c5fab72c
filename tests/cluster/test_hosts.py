"""The hosts of the launchers' tests are separate, and leave nothing behind. test_launch.py uses their faults."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cluster import guard, hosts

TESTS = pathlib.Path(__file__).resolve().parents[1]


pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("hosts")]  # one cluster for all tests


@pytest.fixture(scope="module")
def trio():
    with hosts.cluster(3) as up:
        yield up


def ssh(source: hosts.Host, target: str, command: str = "hostname") -> subprocess.CompletedProcess[str]:
    return source.run(["ssh", "-o", "ConnectTimeout=1", target, command], limit_s=20)


# -- hosts ------------------------------------------------------------------------------------------------------------


def test_each_has_its_name_address_and_home(trio):
    for number, host in enumerate(trio, start=1):
        assert (host.name, host.address) == (f"host{number}", f"10.77.0.{number}")
        seen = host.run(
            ["sh", "-c", "hostname; cat /etc/hostname; getent hosts $(hostname); echo ~; ls /dev/shm"]
        ).stdout
        assert seen.split() == [host.name, host.name, host.address, host.name, str(host.home)]
        interfaces = host.run(["ip", "-brief", "-4", "address"]).stdout
        assert "127.0.0.1/8" in interfaces and f"{host.address}/24" in interfaces and interfaces.count("\n") == 2


def test_processes_are_found_on_every_host_by_what_they_carry(trio):
    marker = f"marker-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        for host, argv, env in [
            (trio[0], ["sleep", "321"], {**os.environ, "JOB": marker}),
            # a single process, since a shell's child has the shell's command line until it execs
            (trio[1], [sys.executable, "-c", "import time; time.sleep(321)", marker], None),
        ]:
            process = stack.enter_context(host.popen(argv, env=env))
            stack.callback(process.kill)
            while process.pid not in hosts.processes(marker):
                assert process.poll() is None
        assert len(hosts.processes(marker)) == 2
        assert any(marker in line for line in hosts.command_lines().values())
        assert not any(f"JOB={marker}" in line for line in hosts.command_lines().values())
        assert len(trio[0].processes()) == 1 and trio[1].processes() and trio[2].processes() == []


# -- the end ----------------------------------------------------------------------------------------------------------


def traces() -> list[list[str]]:
    """Traces that hosts could leave on this machine: mounts and interfaces."""
    mounts = pathlib.Path("/proc/mounts").read_text().splitlines()
    interfaces = pathlib.Path("/proc/net/dev").read_text().splitlines()
    places = ("/etc", "/dev/shm", "/run")
    return [[row for row in mounts if row.split()[1].startswith(places)], [row.split(":")[0] for row in interfaces]]


def test_nothing_is_left_after_an_exception_and_clusters_do_not_meet(trio):
    before = traces()
    networks = set()
    with contextlib.suppress(ZeroDivisionError), hosts.cluster(1) as (alone,):
        assert "host2" in ssh(alone, "host2").stdout  # not the host of the same name in the other cluster
        command = (
            "setsid env -i sleep 321 >/dev/null 2>&1 & exec sleep 0.1"  # in another session, without its environment
        )
        ssh(alone, "host1", command)
        networks |= {guard.network(process) for process in alone.processes()}
        assert len(networks) == 1 and networks != {guard.network("self")}
        assert traces() == before and alone.home.is_dir()
        _ = 1 / 0
    assert guard.inhabitants(networks) == []
    assert traces() == before and not alone.home.parent.exists()
    assert ssh(trio[0], "host1").stdout == "host1\n"


PROGRAM = """
import sys
from cluster import guard, hosts

with hosts.cluster(2) as (host1, host2):
    job = host1.popen(["ssh", "host2", "trap '' TERM HUP INT; echo up; while :; do sleep 1; done"])
    while not (host1.processes() and len(host2.processes()) > 2):
        assert job.poll() is None
    print(host1.home.parent, *{guard.network(process) for host in (host1, host2) for process in host.processes()})
    sys.stdout.flush()
    job.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_test_that_was_killed(number):
    before = traces()
    settings = {**os.environ, "PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=settings, stdout=subprocess.PIPE, text=True) as program:
        lines = {program.stdout.readline(), program.stdout.readline()} - {"up\n"}
        folder, *words = lines.pop().split()
        networks = set(map(int, words))
        assert len(networks) == 2 and guard.inhabitants(networks)
        program.send_signal(number)
        assert program.wait(20) == -number
    limit = time.monotonic() + 10  # the guard notices by itself
    while (guard.inhabitants(networks) or pathlib.Path(folder).exists()) and time.monotonic() < limit:
        time.sleep(0.02)
    assert guard.inhabitants(networks) == [] and not pathlib.Path(folder).exists()
    assert traces() == before


@pytest.mark.parametrize(("setting", "outcome"), [("", pytest.skip.Exception), ("1", pytest.fail.Exception)])
def test_a_machine_without_the_programs_skips_at_a_desk_and_fails_in_ci(monkeypatch, setting, outcome):
    monkeypatch.setenv("DISTPAD_CI", setting)
    monkeypatch.setattr(hosts, "PROGRAMS", ("ip", "no-such-program"))
    with pytest.raises(outcome, match="no-such-program not found"), hosts.cluster(1):
        pass
