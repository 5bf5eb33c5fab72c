"""`distpad launch` across hosts: every launcher with real training, and the end of jobs after faults."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import time

import pytest

import needs
from cluster import hosts
from launched import TESTS, WORKER, Launched, launch, scripted, until

TRAIN = TESTS.parent / "examples" / "handwriting" / "train.py"
STACK = pathlib.Path(sys.executable).parents[1].name
OPENMPI5 = pathlib.Path(sys.executable).parents[2] / f"{STACK}-openmpi5" / "bin" / "python"
# these hosts share their cores, so that Open MPI's busy waiting would slow them down
YIELD = ("--launcher-arg=--mca", "--launcher-arg=mpi_yield_when_idle", "--launcher-arg=1")
ENGINES = {
    "multiworker": ("--backend", "multiworker"),
    "horovodrun": ("--backend", "horovod", "--gloo"),  # it finds the interface itself
    "mpirun-4": ("--backend", "horovod", "--mpi", "--network-interface", "eth0", *YIELD),
    "mpirun-5": ("--backend", "horovod", "--mpi", "--network-interface", "eth0", *YIELD),
}
SMALL = TESTS / "small_training.py"
SHORT = ("--steps", "4", "--strings", "64", "--eval-strings", "8", "--batch", "12")
TRAINING_LIMIT_S = 240
FAULT_LIMIT_S = 120  # for a busy machine

pytestmark = pytest.mark.timeout(500)
wide = pytest.mark.wide
# What agents check before the start does not depend on the engine; tests/launch/test_launcher.py has more faults
mostly_alone = pytest.mark.parametrize(
    "engine", ["multiworker", *(pytest.param(name, marks=wide) for name in ENGINES if name != "multiworker")]
)
and_horovodrun = pytest.mark.parametrize(
    "engine", ["multiworker", "horovodrun", *(pytest.param(name, marks=wide) for name in ("mpirun-4", "mpirun-5"))]
)


@pytest.fixture(scope="module")
def up():
    with hosts.cluster(3) as three:
        yield three


def python_of(engine: str) -> str:
    if engine == "mpirun-5" and not OPENMPI5.exists():
        needs.missing(f"no {OPENMPI5}. Make it: launch/environment.sh {STACK} --openmpi5 --horovod")
    if engine == "mpirun-4":
        needs.program("mpirun")
    return str(OPENMPI5) if engine == "mpirun-5" else sys.executable


def assert_nobody_is_left(up, within_s=30.0):
    """Assert that no process of the job or its launchers is left on any host."""
    left = lambda: {host.name: host.processes() for host in up if host.processes()}
    until(lambda: not left(), within_s)
    shown = {name: [hosts.command_lines().get(pid) for pid in pids] for name, pids in left().items()}
    assert shown == {}


# -- training ----------------------------------------------------------------------------------------------------------


def train(up, engine, count, tmp_path, *arguments):
    where = ",".join(f"{host.name}:1" for host in up[:count])
    python = python_of(engine)
    backend = "multiworker" if engine == "multiworker" else "horovod"
    flags = (*ENGINES[engine], "-H", where, "--grace-s", 10)
    command = [python, TRAIN, "--backend", backend, "--replicas", count, "--out", tmp_path, *SHORT, *arguments]
    return launch(*flags, command=command, host=up[0], python=python, limit_s=TRAINING_LIMIT_S)


def assert_trained(done, tmp_path, replicas):
    assert done.code == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["replicas"] == replicas
    (measured,) = [json.loads(path.read_text()) for path in tmp_path.glob("drift*.json")]
    return measured


@pytest.mark.smoke
@pytest.mark.xdist_group("training")
@pytest.mark.parametrize(
    "engine",  # tests/k8s/test_running.py trains multi-worker in several pods
    ["horovodrun", *(pytest.param(name, marks=wide) for name in ("multiworker", "mpirun-4", "mpirun-5"))],
)
def test_a_small_training_on_two_hosts(up, engine):
    where, python = "host1:1,host2:1", python_of(engine)
    command = [python, SMALL, "2"]
    done = launch(*ENGINES[engine], "-H", where, command=command, host=up[0], python=python, limit_s=TRAINING_LIMIT_S)
    assert done.code == 0, done.stderr
    for rank in (0, 1):
        assert f"worker {rank} of 2 on host{rank + 1} trained, error small" in done.stdout, done.stdout
    assert_nobody_is_left(up)


@wide
@pytest.mark.smoke
@pytest.mark.xdist_group("training")
@pytest.mark.parametrize("engine", ENGINES)
def test_training_on_two_hosts(up, engine, tmp_path):
    done = train(up, engine, 2, tmp_path)
    measured = assert_trained(done, tmp_path, 2)
    assert measured["distpad"][-1] < 1e-5 < 1e-4 < measured["naive"][-1]
    assert_nobody_is_left(up)


@wide
@pytest.mark.xdist_group("training")
@pytest.mark.parametrize("engine", ENGINES)
def test_certified_on_three_hosts(up, engine):
    where, python = ",".join(host.name for host in up), python_of(engine)
    command = [python, "-m", "distpad", "certify", "--replicas", "3", "--cases", "4"]
    done = launch(*ENGINES[engine], "-H", where, command=command, host=up[0], python=python, limit_s=TRAINING_LIMIT_S)
    assert done.code == 0, done.stderr
    assert "3 replicas on 3 workers" in done.stdout and "NOT PASSED" not in done.stdout
    assert_nobody_is_left(up)


# -- what can go wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Two hosts for one test, which may inject faults."""
    with hosts.cluster(2) as two:
        yield two


def start(pair, engine, *words, flags=(), **settings) -> Launched:
    python = python_of(engine)
    flags = (*ENGINES[engine], "-H", "host1,host2", *flags)
    command = scripted(*words, python=python)
    return Launched(*flags, command=command, host=pair[0], python=python, **settings)


def fails(pair, engine, *words, limit_s=FAULT_LIMIT_S, **settings) -> Launched:
    """Run a job to its failure, and check that no process is left on any host."""
    done = start(pair, engine, *words, **settings).finish(limit_s)
    assert done.left() == []
    assert_nobody_is_left(pair)
    return done


@mostly_alone
def test_a_worker_that_exits_with_42(pair, engine):
    done = fails(pair, engine, "1=exit:42", "0=ignore-terms", "0=sleep:600")
    assert done.code == 42, done.stderr
    assert "worker 1 on host2 failed first (exit code 42)" in done.stderr
    assert "| rank 1 exits with 42" in done.stderr


@mostly_alone
def test_ctrl_c(pair, engine):
    running = start(pair, engine, "all=sleep:600")
    running.workers(2)
    running.process.send_signal(signal.SIGINT)
    done = running.finish()
    assert done.code == 130, done.stderr
    assert_nobody_is_left(pair)


@mostly_alone
def test_a_launcher_that_is_killed(pair, engine):
    running = start(pair, engine, "all=ignore-terms", "all=escape:600", "all=sleep:600")
    running.workers(2)
    running.process.kill()
    running.process.communicate()
    assert_nobody_is_left(pair, within_s=FAULT_LIMIT_S)


@pytest.mark.parametrize("engine", ["multiworker", pytest.param("horovodrun", marks=wide), "mpirun-4"])
def test_a_link_that_is_cut(pair, engine):
    running = start(pair, engine, "all=sleep:600", flags=("--lost-after-s", 4))
    running.workers(2)
    pair[1].cut()
    done = running.finish()
    assert done.code == 4, done.stderr
    assert re.search(
        r"host2 was lost.*, with worker 1: (no answer for [45] s|the connection to its agent)", done.stderr
    )
    assert_nobody_is_left(pair[:1])
    assert until(lambda: running.left() == [], FAULT_LIMIT_S, look_s=0.5)  # host2 notices by itself
    pair[1].mend()


def test_a_link_that_is_cut_for_a_while(pair):
    running = start(pair, "multiworker", "all=chatter:8")
    running.workers(2)
    pair[1].cut()
    time.sleep(4)
    pair[1].mend()
    done = running.finish()
    assert done.code == 0, done.stderr
    assert done.stdout.count("[worker 1] 1 step") == 400


@mostly_alone
def test_a_command_that_one_host_lacks(pair, engine):
    pair[0].run(["mkdir", "/run/here"])  # each host has a /run of its own
    done = fails(pair, engine, "all=sleep:600", cwd="/run/here")
    assert done.code == 127, done.stderr
    assert "worker 1 on host2 failed first (exit code 127)" in done.stderr
    assert "cannot start /run/here: No such file or directory" in done.stderr


def test_a_host_whose_sshd_is_down(pair):
    pair[1].stop_sshd()
    done = fails(pair, "multiworker", "all=sleep:600")
    assert done.code == 3
    assert "nothing was started. host2 cannot be used: no ssh server listens there" in done.stderr


def test_a_wrong_host_key(pair):
    pair[1].change_host_key()
    done = fails(pair, "multiworker", "all=sleep:600")
    assert done.code == 3
    assert "host2 cannot be used: its host key has changed" in done.stderr


def test_a_host_that_does_not_answer(pair):
    pair[1].cut()
    done = start(pair, "multiworker", "all=sleep:600").finish()
    assert done.code == 3, done.stderr
    # whichever comes first: ssh's time limit, or the error that no host has this address
    assert re.search(r"host2 cannot be used: (it does not answer|there is no route)", done.stderr)


def test_a_host_that_reboots_is_waited_for(pair, tmp_path):
    """Restarts survive that it cannot be reached, and then that another process has the port."""

    def wait_for_attempt(number: int) -> None:
        while not (tmp_path / f"attempt-{number}").exists() and running.process.poll() is None:
            time.sleep(0.05)

    flags = ("--port", 5000, "--max-restarts", 9, "--backoff-s", 0.2, "--log-dir", tmp_path)
    running = start(pair, "multiworker", "all=hang-once", flags=flags)
    worker = running.workers(2)[0]
    pair[1].stop_sshd()
    occupant = pair[1].occupy(5000)
    os.kill(worker, signal.SIGKILL)
    wait_for_attempt(2)
    pair[1].start_sshd()
    wait_for_attempt(5)
    occupant.kill()
    done = running.finish()
    assert done.code == 0, done.stderr
    assert "nothing was started. host2 cannot be used: no ssh server listens there" in done.stderr
    assert "on host2, port 5000 is not free: address already in use" in done.stderr


def test_a_host_that_nobody_knows(pair):
    flags = ("-H", "host1,host3")
    done = launch(*flags, command=["true"], host=pair[0])
    assert done.code == 3 and "host3 cannot be used: its name does not resolve" in done.stderr


@pytest.mark.parametrize(
    ("engine", "name"), [("horovodrun", "host2"), ("horovodrun", "host1"), ("multiworker", "host1")]
)
def test_a_name_that_leads_to_loopback(pair, engine, name):
    pair[1].resolve_to_loopback(name)
    done = fails(pair, engine, "all=sleep:600")
    assert done.code == 3, done.stderr
    whose = "its own name" if name == "host2" else "the name"
    assert re.search(rf"on host2, {whose} {name} resolves to 127\.[\d.]+, the loopback", done.stderr)


def test_two_versions_of_tensorflow(pair, tmp_path):
    packages = pathlib.Path(sys.executable).parents[1] / "lib" / "python3.11" / "site-packages"
    (known,) = packages.glob("tensorflow_cpu-*.dist-info")
    other = tmp_path / known.name
    shutil.copytree(known, other)
    text = (other / "METADATA").read_text()
    (other / "METADATA").write_text(re.sub(r"^Version: .*$", "Version: 2.14.9", text, count=1, flags=re.M))
    assert pair[1].run(["mount", "--bind", other, known]).returncode == 0  # on this host alone
    done = fails(pair, "multiworker", "all=sleep:600")
    assert done.code == 3, done.stderr
    here = importlib.metadata.version("tensorflow-cpu")
    assert f"tensorflow-cpu differs: host1 has {here}, host2 has 2.14.9" in done.stderr


# -- what is passed on -------------------------------------------------------------------------------------------------


@and_horovodrun
def test_arguments_and_variables_arrive_and_no_secret_shows(pair, engine, tmp_path):
    hostile = ["it's", 'a "file"', "$(touch hacked)", "a\nb", "", "; touch hacked"]
    (tmp_path / "key").write_text("s3cr3t-from-file\n")
    flags = ("--secret", f"API_KEY={tmp_path / 'key'}")
    env = {"GIVEN": "s3cr3t-2 $(touch hacked)\n'", "DISPLAY": ":7"}
    running = start(pair, engine, "all=report", *hostile, "all=sleep:2", flags=flags, env=env, cwd=tmp_path)
    seen: set[str] = set()  # also processes that start before the workers

    def have_started() -> bool:
        now = [*hosts.command_lines().values()]
        seen.update(now)
        return sum(str(WORKER) in line for line in now) > 2  # the launcher and two workers

    until(have_started, FAULT_LIMIT_S, look_s=0.02)
    running.workers(2)
    lines = hosts.command_lines()
    done = running.finish()
    assert done.code == 0, done.stderr
    reports = {line[:10]: json.loads(line.partition("] ")[2]) for line in done.stdout.splitlines()}
    assert set(reports) == {"[worker 0]", "[worker 1]"}
    for each in reports.values():
        assert each["argv"] == ["all=report", *hostile, "all=sleep:2"] and each["cwd"] == str(tmp_path)
        assert (each["env"]["API_KEY"], each["env"]["GIVEN"]) == ("s3cr3t-from-file", env["GIVEN"])
        assert "DISPLAY" not in each["env"]
    here, there = ({*reports[f"[worker {rank}]"]["env"]} for rank in (0, 1))
    # the login of host2 lacks them, and Open MPI 5 sets one on its own host
    assert here - there <= {"TERM", "DISTPAD_TIME_SCALE", "PMIX_PREFIX"}, here ^ there
    shown = [line for line in lines.values() if "s3cr3t" in line]
    assert shown == [] and any("distpad.launcher.worker" in line for line in lines.values())
    # horovodrun's servers for interface discovery would have its message key on their command lines
    assert not any("horovod.runner.task_fn" in line for line in seen | {*lines.values()})
    assert not list(tmp_path.rglob("hacked"))
