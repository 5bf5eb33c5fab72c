"""Jobs as command lines: against a record, and with input that means harm."""

from __future__ import annotations

import difflib
import json
import math
import os
import pathlib
import queue
import shlex
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from distpad.cli import app
from distpad.cli import launch as cli_launch
from distpad.launcher import (
    allocation,
    attempt,
    checks,
    crew,
    describe,
    discovery,
    kubernetes,
    options,
    outcomes,
    output,
    render,
    spec,
    worker,
)
from scripts import script

RECORDS = pathlib.Path(__file__).parent / "command_lines"
ENVIRON = {
    **{"PATH": "/env/bin:/usr/bin", "HOME": "/home/me", "USER": "me", "LANG": "C.UTF-8", "EDITOR": "vi"},
    **{"HF_TOKEN": "t0ken", "DATA": "/data/my set", "TF_CONFIG": "{}", "HOROVOD_RANK": "7", "NCCL_DEBUG": "WARN"},
}
OPEN_MPI_4, OPEN_MPI_5 = "mpirun (Open MPI) 4.1.4", "mpirun (Open MPI) 5.0.11"
HOSTS = spec.parse_hosts("node1:4,node2:4")
ALWAYS = {
    "command": ("python", "train.py"),
    "python": "/env/bin/python",
    "cwd": "/home/me/it",
    "id": "0123456789abcdef",
}
JOBS = {
    "mirrored": {"backend": "mirrored", "np": 4},
    "multiworker-here": {"np": 2},
    "multiworker-ssh": {"hosts": HOSTS, "port": 5000, "ssh_arg": ("-p2222",), "env": ("MODE=test",)},
    "horovodrun-here": {"backend": "horovod", "np": 2},
    "horovodrun": {
        "backend": "horovod",
        "hosts": HOSTS,
        "np": 6,
        "network_interface": "eth0",
        "ssh_arg": ("-p2222", "-i", "/k"),
    },
    "horovodrun-elastic": {
        "backend": "horovod",
        "min_np": 2,
        "max_np": 8,
        "host_discovery_script": "/home/me/discover",
    },
    "mpirun-4": {"backend": "horovod", "controller": "mpi", "hosts": HOSTS, "network_interface": "eth0"},
    "mpirun-5": {"backend": "horovod", "controller": "mpi", "hosts": HOSTS, "network_interface": "eth0"},
    "mpirun-argument": {"backend": "horovod", "controller": "mpi", "np": 2, "launcher_arg": ("--mca", "x", "a b")},
    "mpirun-ucx": {"backend": "horovod", "controller": "mpi", "np": 2, "launcher_arg": ("--mca", "pml", "ucx")},
    "srun-horovod": {"backend": "horovod", "launcher": "srun", "hosts": HOSTS},
    "srun-multiworker": {"hosts": HOSTS},
    "mirrored-gpus": {"backend": "mirrored", "np": None, "gpus": 4},
    "multiworker-gpus": {"hosts": spec.parse_hosts("localhost:2,node2:2"), "gpus": 4},
    "horovodrun-gpus": {"backend": "horovod", "hosts": HOSTS, "gpus": 4},
    "horovodrun-elastic-gpus": {
        **{"backend": "horovod", "min_np": 2, "host_discovery_script": "/home/me/discover"},
        **{"slots_per_host": 4, "gpus": 4},
    },
    "mpirun-gpus": {"backend": "horovod", "controller": "mpi", "hosts": HOSTS, "gpus_per_worker": 2},
    "srun-gpus": {"backend": "horovod", "launcher": "srun", "hosts": HOSTS, "gpus": 4},
    "hostile": {
        "hosts": HOSTS,
        "command": ("python", 'it\'s a "file".py', "$(touch /tmp/x)", "a\nb", "", "; rm -rf /", "-np", "--"),
        "cwd": "/home/me/my $(folder)\nof mine",
    },
}


def make(**fields) -> spec.Job:
    np = {} if fields.keys() & {"hosts", "np", "min_np"} else {"np": 2}
    return spec.Job(**{**ALWAYS, **np, **fields})


@pytest.mark.parametrize("name", JOBS)
def test_command_lines_are_as_recorded(name):
    environ = {**ENVIRON, **({"SLURM_JOB_ID": "1"} if name.startswith("srun") else {})}
    mpi = OPEN_MPI_5 if name == "mpirun-5" else OPEN_MPI_4
    found = "\n".join(describe.describe(make(**JOBS[name]), environ, {"WANDB_API_KEY": "very secret"}, mpi)) + "\n"
    record = RECORDS / f"{name}.txt"
    if os.environ.get("RENEW_COMMAND_LINES"):
        record.write_text(found)
    known = record.read_text() if record.exists() else ""
    lines = difflib.unified_diff(known.splitlines(), found.splitlines(), "recorded", "now", lineterm="", n=1)
    assert found == known, "\n".join([*lines, "", "Is it meant? RENEW_COMMAND_LINES=1 pytest " + __file__])
    assert "secret" not in found and "t0ken" not in found


def test_every_launcher_has_a_record():
    recorded = {make(**fields).launcher for fields in JOBS.values()}
    assert recorded == {name for each in spec.LAUNCHERS.values() for name in each}
    assert {path.stem for path in RECORDS.iterdir()} == set(JOBS)


# -- what others have to bear ------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=30)


@given(command=st.lists(TEXT, min_size=1, max_size=4), value=TEXT)
def test_no_argument_and_no_value_gets_onto_a_command_line(command, value):
    marked = [f"MARK{word}" for word in command]
    job = make(command=tuple(marked), hosts=HOSTS, env=("GIVEN",), cwd="/MARK here")
    environ = {**ENVIRON, "GIVEN": f"MARK{value}"}
    for host in job.used_hosts:
        assert "MARK" not in " ".join(render.agent_argv(job, host, environ))
    for fields in ({"controller": "gloo"}, {"controller": "mpi"}, {"launcher": "srun"}):
        argv = render.engine_argv(make(command=tuple(marked), backend="horovod", hosts=HOSTS, **fields), OPEN_MPI_4)
        assert argv and "MARK" not in " ".join(argv)
    assert "MARK" not in str(render.engine_env(job, environ))
    orders = json.loads(json.dumps(render.orders(job, HOSTS[0], environ, {}, 0)))
    assert orders["command"] == marked and orders["env"]["GIVEN"] == f"MARK{value}"


@given(words=st.lists(TEXT, min_size=1, max_size=5))
def test_what_ssh_is_given_is_read_back_by_a_shell(words):
    job = make(python="/a 'b'/$(c)/python", hosts=HOSTS)
    *_, host, remote = render.agent_argv(job, HOSTS[0], {"PYTHONPATH": words[0]})
    assert host == "node1"
    assert shlex.split(remote)[-3:] == ["/a 'b'/$(c)/python", "-m", "distpad.launcher.agent"]


@pytest.mark.parametrize(
    "text", ["-oProxyCommand=x", "a b", "a;b", "$(a)", "", "a\nb", "fd00::1", "a:x", "a:0", "a:-1", "a/b", "u@h"]
)
def test_hosts_that_mean_harm_are_refused(text):
    with pytest.raises(ValueError, match=r"expected|names no host"):
        make(hosts=spec.parse_hosts(f"{text or ','},"), np=1) if text else spec.Host("")


def test_the_environment_of_a_worker():
    environ = {**ENVIRON, "SSH_AUTH_SOCK": "/s", "DISPLAY": ":0", "CUDA_VISIBLE_DEVICES": "1", "_": "/bin/it"}
    job = make(hosts=(spec.Host("localhost"), spec.Host("node1")), env=("DISPLAY", "MODE=a=b"))
    here, there = (render.worker_env(job, host, environ, {"KEY": "k"}) for host in job.hosts)
    assert there["DATA"] == "/data/my set" and there["EDITOR"] == "vi" and there["KEY"] == "k"
    assert (there["DISPLAY"], there["MODE"]) == (":0", "a=b")  # of --env
    assert not there.keys() & {"HOME", "USER", "SSH_AUTH_SOCK", "_"}  # each host's own
    assert not there.keys() & {"TF_CONFIG", "HOROVOD_RANK"}  # of a job around this one
    assert (there["DISTPAD_WORKERS"], there["DISTPAD_HOSTS"]) == ("2", "2")
    assert here == {**there, "CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(ValueError, match=r"--env names NOT_SET, expected a variable that is set"):
        render.worker_env(make(env=("NOT_SET",)), HOSTS[0], ENVIRON, {})


# -- jobs --------------------------------------------------------------------------------------------------------------

WRONG = {
    "no command": ({"command": ()}, r"no command, expected one after --"),
    "backend": (
        {"backend": "pytorch"},
        r"--backend is 'pytorch', expected one of 'mirrored', 'multiworker', 'horovod'",
    ),
    "neither": ({"np": None}, r"neither -np nor hosts are given, expected one of them"),
    "counted slots": ({"np": 4, "hosts": spec.parse_hosts("localhost:1")}, r"-np is 4, but the hosts have 1 slots"),
    "too many slots": ({"np": 4097}, r"localhost has 4097 slots, expected 1 to 4096"),
    "too few slots": ({"np": 9, "hosts": HOSTS}, r"-np is 9, but the hosts have 8 slots \(node1:4, node2:4\)"),
    "twice": ({"hosts": spec.parse_hosts("a,a")}, r"name a twice, expected each once"),
    "mirrored": ({"backend": "mirrored", "hosts": HOSTS}, r"mirrored runs in one process, expected one host"),
    "controller": ({"controller": "mpi"}, r"--mpi is for --backend horovod, which is multiworker here"),
    "launcher": ({"launcher": "mpirun"}, r"--launcher is mpirun, expected ssh or srun"),
    "launcher 2": (
        {"backend": "horovod", "controller": "gloo", "launcher": "mpirun"},
        r"expected horovodrun for --gloo",
    ),
    "launcher 3": ({"backend": "horovod", "launcher": "ssh"}, r"expected horovodrun or mpirun or srun"),
    "arguments": ({"launcher_arg": ("-v",)}, r"--launcher-arg needs an engine's launcher"),
    "elastic": ({"backend": "horovod", "controller": "mpi", "min_np": 1}, r"elastic jobs need Horovod over Gloo"),
    "elastic 2": ({"backend": "horovod", "min_np": 4, "max_np": 2}, r"--min-np 4, -np None, --max-np 2, expected"),
    "variable": ({"env": ("A B",)}, r"--env is 'A B', expected a name of letters"),
    "port": ({"port": 80}, r"--port is 80, expected 1024 to"),
    "ranks": ({"np": 2, "ranks": "2"}, r"--ranks names 2, expected 0 to 1"),
    "interface": ({"network_interface": "eth0; x"}, r"--network-interface is 'eth0; x', expected a name"),
    "ssh": ({"backend": "horovod", "ssh_arg": ("-oPort=2222",)}, r"--ssh-arg is '-oPort=2222', expected -pPORT or"),
    "ssh 2": ({"backend": "horovod", "ssh_arg": ("-i/a;b",)}, r"--ssh-arg is '-i/a;b', expected -pPORT or -iFILE"),
    "ssh 3": ({"backend": "horovod", "ssh_arg": ("-p",)}, r"--ssh-arg is '-p', expected -pPORT or -iFILE"),
    "gpus 3": ({"hosts": HOSTS, "gpus": 3}, r"--gpus is 3, expected at least 4: a host has 4 workers with 1 each"),
    "gpus 4": (
        {"backend": "horovod", "np": 2, "gpus": 3, "gpus_per_worker": 2},
        r"--gpus is 3, expected at least 4: a host has 2 workers with 2 each",
    ),
    "gpus 5": ({"backend": "mirrored", "np": 2, "gpus": 1}, r"--gpus is 1, expected at least 2: a host has 1 worker"),
    "gpus 6": (
        {"backend": "mirrored", "np": 2, "gpus_per_worker": 4},
        r"--gpus-per-worker is 4, expected 2, the replicas of -np",
    ),
    "NUL": ({"command": ("a\0b",)}, r"NUL byte"),
    "NUL 2": ({"cwd": "/a\0b"}, r"NUL byte"),
}


BOUNDED = [
    pytest.param(owner, field.name, flag, stated, id=f"{owner.__module__} {flag}")
    for owner in (spec.Job, kubernetes.Job)
    for field, flag, stated in options.stated(owner)
    if stated.low is not None
]


@pytest.mark.parametrize(("owner", "name", "flag", "stated"), BOUNDED)
def test_numbers_out_of_range_are_refused(owner, name, flag, stated):
    always = {"command": ("true",), "np": 2} if owner is spec.Job else {"kind": "mpijob", "image": "a"}
    for value in (stated.low - 1, math.inf, math.nan, *([] if stated.high is None else [stated.high + 1])):
        with pytest.raises(ValueError, match=rf"^launch: {flag} is {value}, expected (at least )?{stated.low}"):
            owner(**{**always, name: value})


@pytest.mark.parametrize("name", WRONG)
def test_wrong_jobs_are_refused(name):
    fields, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make(**fields)


# backend, fields: the slots that the hosts get, and the GPUs of each worker
BY_GPUS = {
    "one for each rank": (["--backend", "horovod", "-H", "a,b", "--gpus", "8"], "-H a:8,b:8", None),
    "ranks of two": (["--backend", "horovod", "--gpus", "4", "--gpus-per-worker", "2"], "-H localhost:2", "0,1 2,3"),
    "fewer ranks than GPUs": (["--backend", "horovod", "-np", "2", "--gpus", "8"], "-H localhost:2", None),
    "ranks that see one": (
        ["--backend", "horovod", "-np", "2", "--gpus", "8", "--gpus-per-worker", "1"],
        *("-H localhost:2", "0 1"),
    ),
    "all for one worker": (["-H", "a,b", "--gpus", "4"], "the workers, 2,", "0,1,2,3"),
    "shared by workers": (["-np", "2", "--gpus", "4"], "the workers, 2,", "0,1 2,3"),
    "all for the replicas": (["--backend", "mirrored", "--gpus", "2"], "DISTPAD_REPLICAS=2", "0,1"),
}


@pytest.mark.parametrize(("flags", "expected", "devices"), BY_GPUS.values(), ids=BY_GPUS)
def test_gpus_tell_the_number_of_workers(monkeypatch, flags, expected, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    done = CliRunner().invoke(app.app, ["launch", *flags, "--dry-run", "--", "python", "train.py"])
    assert done.exit_code == 0, done.output
    assert expected in done.output and "DISTPAD_GPUS=" in done.output
    assert f"by local rank\n{devices}\n" in done.output if devices else "CUDA_VISIBLE_DEVICES" not in done.output


def test_a_worker_uses_the_gpus_of_its_local_rank(monkeypatch):
    """Of the host's own, of those in CUDA_VISIBLE_DEVICES, and the one that Slurm gave to the task."""
    show = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]

    def shown(count: int, **variables: str) -> str:
        for name in ("CUDA_VISIBLE_DEVICES", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "DISTPAD_LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        orders = {"command": show, "cwd": "/", "env": {}, "slots": 1, "gpus": count}
        return worker.start(orders).communicate(timeout=60)[0].decode().strip()

    assert shown(0, DISTPAD_LOCAL_RANK="1") == "None"
    assert shown(2, DISTPAD_LOCAL_RANK="1") == "2,3"
    assert shown(1, OMPI_COMM_WORLD_LOCAL_RANK="3") == "3"
    assert shown(1, OMPI_COMM_WORLD_LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="4, GPU-7a") == "GPU-7a"
    assert shown(1, SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="0") == "0"  # --gpus-per-task: each task has its own
    assert shown(1, SLURM_LOCALID="3", CUDA_VISIBLE_DEVICES="0,1,2,3") == "3"
    assert shown(1, DISTPAD_LOCAL_RANK="1", CUDA_VISIBLE_DEVICES="0") == ""  # TensorFlow sees none: the library says so


def test_workers_fill_hosts_in_order():
    job = make(hosts=spec.parse_hosts("a:2,b:3,c:1"), np=4)
    assert [(p.rank, p.host.name, p.local_rank) for p in job.places] == [
        (0, "a", 0),
        (1, "a", 1),
        (2, "b", 0),
        (3, "b", 1),
    ]
    assert [host.name for host in job.used_hosts] == ["a", "b"]
    assert make(hosts=spec.parse_hosts("a:2,b:3,c:1")).workers == 6


def test_hostfiles(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# mine\nnode1 slots=2\nnode2:3  # the big one\n\nnode3\n")
    assert spec.read_hostfile(file, 4) == spec.parse_hosts("node1:2,node2:3,node3:4")
    for text in ("node1 slots=x\n", "node1 gpus=2\n", "", "node1 slots=1 slots=2\n", "-oX slots=1\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="expected"):
            spec.read_hostfile(file)
    with pytest.raises(ValueError, match="cannot be read"):
        spec.read_hostfile(tmp_path / "none")


def test_a_value_where_a_secrets_file_belongs_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match=r"--secret is 'MY-KEY', expected NAME=FILE. Do not write a secret's value"):
        make(secret=("MY-KEY=value",))


def test_the_hosts_of_an_allocation(monkeypatch, tmp_path):
    """tests/cluster/test_sbatch.py asks the real scontrol."""
    script(tmp_path / "scontrol", '[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n" || echo "Invalid hostlist" >&2')
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    environ = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}
    assert allocation.hosts(environ) == spec.parse_hosts("n1:2,n2:2,n3:1")
    assert allocation.hosts(environ, 4) == spec.parse_hosts("n1:4,n2:4,n3:4")
    for changes, message in (
        ({"SLURM_TASKS_PER_NODE": "2"}, r"SLURM_TASKS_PER_NODE is '2', expected numbers for 3 nodes"),
        ({"SLURM_JOB_NODELIST": "n[1"}, r"are 'n\[1' .* scontrol expands: Invalid hostlist. Give the hosts with -H"),
        ({"SLURM_JOB_NODELIST": ""}, r"are '' \(SLURM_JOB_NODELIST\), expected a list that scontrol expands"),
    ):
        with pytest.raises(ValueError, match=message):
            allocation.hosts({**environ, **changes})


def test_ranks():
    assert spec.parse_ranks("0,4-6, 2") == (0, 2, 4, 5, 6)
    for wrong in ("a", "3-1", "0-99999999999", "-1"):
        with pytest.raises(ValueError, match=r"--ranks holds"):
            spec.parse_ranks(wrong)


def test_what_an_engine_tells_a_process():
    assert worker.membership({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "4"})["size"] == 4
    assert worker.membership({"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"})["rank"] == 3
    assert worker.membership({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "8"}) == {
        "rank": 2,
        "size": 8,
        "local_rank": None,
    }
    assert worker.membership({}) == {"rank": None, "size": None, "local_rank": None}


# -- elastic jobs ------------------------------------------------------------------------------------------------------


def test_a_progress_bar_moves_on_the_terminal(monkeypatch, capfdbinary):
    shown = output.Output(make(np=2), 0)
    for i in range(100):
        shown.write(1, "stdout", b"\r%d%%" % i)
        if i == 50:
            monkeypatch.setattr(output, "PROGRESS_S", -1)
        if i == 52:
            monkeypatch.setattr(output, "PROGRESS_S", 600)
    shown.write(1, "stdout", b"\rall\r\n")
    lines = capfdbinary.readouterr().out.splitlines()
    assert lines == [b"[worker 1] %s" % each for each in (b"0%", b"51%", b"52%", b"all")]


MANY = """
import resource
from distpad.launcher import output, spec
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
job = spec.Job(command=("true",), np=40, log_dir="logs")
output.allow_open_files(job)
written = output.Output(job, 0)
for part in (b"a\\n", b"b\\n"):
    for rank in range(40):
        written.write(rank, "stdout", part)
written.close()
"""


def test_no_log_file_is_lost_at_the_hard_limit_of_open_files(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", MANY], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "cannot be written" not in done.stderr, done.stderr
    found = [path.read_text() for path in (tmp_path / "logs" / "attempt-0").iterdir()]
    assert found == ["a\nb\n"] * 40


@pytest.mark.parametrize(("end", "code"), [(None, 1), (0, 1), (7, 7)])
def test_an_elastic_job_fails_though_a_worker_was_replaced(end, code):
    job = make(backend="horovod", min_np=1)
    tried = attempt.Attempt(job, 0, ENVIRON, {}, "", [])
    messages = [{"is": "hello", "size": 1}, {"is": "exit", "code": 9}, {"is": "hello", "size": 1}]  # of its successor
    for message in (*messages, *([] if end is None else [{"is": "exit", "code": end}])):
        tried.take(crew.Event("localhost", {"rank": 0, **message}))
    tried.engine_code = 1
    assert tried.watch().code == code
    tried.summarise(outcomes.Ended(130, "ended"), 1.0)


def test_an_elastic_job_drops_a_host_whose_agent_has_ended(tmp_path, capfd):
    """horovodrun sees the end of its workers there, since its connections to the host, and no others, are ended."""
    ssh, events = script(tmp_path / "ssh", "sleep 60"), queue.Queue()
    tried = attempt.Attempt(make(backend="horovod", min_np=1), 0, ENVIRON, {}, "", [])
    horovodrun = f"{ssh} host1 & echo $!; {ssh} host2 & echo $!; wait"
    tried.engine = crew.Member("", ["sh", "-c", horovodrun], os.environ, events)
    tried.agents["host2"] = crew.Member("host2", ["true"], os.environ, events)
    pids = [int(events.get(timeout=20).message["text"]) for _ in range(2)]
    tried.agents["host2"].process.wait(20)
    try:
        for message in ({"is": "ready", "facts": {}}, {"is": "closed", "code": 255}):
            tried.take(crew.Event("host2", message))
        running = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
        assert running == pids[:1]
        assert "host2" not in tried.facts and "host2 was lost" in capfd.readouterr().err
    finally:
        tried.engine.kill(signal.SIGKILL)


def discovered_by(path, text: str) -> tuple[spec.Host, ...]:
    job = make(backend="horovod", min_np=1, host_discovery_script=str(script(path / "discover", text)))
    return discovery.discover(job)


def test_a_script_that_finds_hosts(tmp_path, monkeypatch):
    assert discovered_by(tmp_path, "echo a:2; echo; echo b") == spec.parse_hosts("a:2,b")
    with pytest.raises(ValueError, match="discover failed: no rights"):
        discovered_by(tmp_path, "echo no rights >&2; exit 1")
    monkeypatch.setattr(discovery.times, "DISCOVERY_LIMIT_S", 0.5)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"failed: not done after 0\.5 s"):
        discovered_by(tmp_path, "sleep 20\necho a")  # the sleep has the pipe, too
    assert time.monotonic() - began < 10


# -- hosts -------------------------------------------------------------------------------------------------------------


def found_on(name: str, **changes) -> dict:
    facts = {"host": name, "packages": {"tensorflow-cpu": "2.21.0"}, "names": {"a": ["10.0.0.1"], "b": ["10.0.0.2"]}}
    facts["interfaces"] = {"lo": ["127.0.0.1"], "eth0": [facts["names"][name][0]], "eth1": ["10.1.0.1"]}
    return {**facts, "errors": {}, **changes}


def test_hosts_that_fit():
    assert checks.problems(make(hosts=spec.parse_hosts("a,b")), {"a": found_on("a"), "b": found_on("b")}) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packages": {"tensorflow-cpu": "2.15.1"}}, "tensorflow-cpu differs: a has 2.21.0, b has 2.15.1"),
        ({"packages": {}}, "a has 2.21.0, b has none"),
        ({"errors": {"names": "not done after 48 s"}}, "names of b: not done after 48 s"),
        ({"names": {"a": [], "b": ["10.0.0.2"]}}, "on b, the name a does not resolve"),
        ({"names": {"a": ["10.0.0.1"], "b": []}}, "on b, its own name b does not resolve"),
        ({"names": {"a": ["127.0.1.1"], "b": ["10.0.0.2"]}}, "on b, the name a resolves to 127.0.1.1, the loopback"),
        ({"names": {"a": ["10.0.0.1"], "b": ["::1"]}}, "on b, its own name b resolves to ::1, the loopback"),
    ],
)
def test_hosts_that_do_not_fit(changes, message):
    job = make(hosts=spec.parse_hosts("a,b"), backend="horovod")
    problems = checks.problems(job, {"a": found_on("a"), "b": found_on("b", **changes)})
    assert len(problems) == 1 and message in problems[0]


def on_gpus(*names: str, **changes) -> dict:
    return {"devices": len(names), "names": list(names), "cuda": "12.9", "version": "575.57"} | changes


@pytest.mark.parametrize(
    ("driver", "package", "message"),
    [
        (on_gpus("H100", "H100"), "tensorflow", ""),
        (on_gpus(devices=2), "tensorflow", ""),  # no nvidia-smi in this container
        (
            on_gpus("H100", "H100"),
            "tensorflow-cpu",
            "no 2 GPUs for its workers: TensorFlow is built for the CPU. launch/",
        ),
        (on_gpus("H100"), "tensorflow", "b has no 2 GPUs for its workers: the driver has 1."),
        (on_gpus(cuda=""), "tensorflow", "NVIDIA's driver is missing. Install NVIDIA's driver. In a container"),
        (
            on_gpus(devices=2, error="version mismatch"),
            "tensorflow",
            "nvidia-smi fails: version mismatch. Check that the driver",
        ),
    ],
)
def test_hosts_without_the_gpus_of_their_workers(driver, package, message):
    job = make(hosts=spec.parse_hosts("a:2,b:2"), gpus=2)
    fine = {"packages": {package: "2.21.0"}, "gpus": on_gpus("H100", "H100")}
    problems = checks.problems(job, {"a": found_on("a", **fine), "b": found_on("b", **{**fine, "gpus": driver})})
    assert len([problem for problem in problems if problem.startswith("b ")]) == bool(message)
    assert message in " ".join(problems)
    assert checks.problems(make(hosts=spec.parse_hosts("a:2,b:2")), {"a": found_on("a", gpus={})}) == []


def test_the_interface_that_hosts_share():
    both = {"a": found_on("a"), "b": found_on("b")}
    assert checks.interface(both) == ("eth0", "")
    both["b"]["interfaces"] = {"ens3": ["10.0.0.2"]}
    name, wrong = checks.interface(both)
    assert name == "" and "(a has eth0, b has ens3). Choose one with --network-interface" in wrong


def unreachable(wrote: list[str], code: int | None, python: str = "p") -> tuple[str, str]:
    agent = types.SimpleNamespace(host="b", wrote=wrote)
    return tuple(crew.unreachable(agent, python, code, 60).values())


def test_what_ssh_wrote_is_explained():
    for mark, meaning in crew.MEANINGS.items():
        found = unreachable([f"ssh: {mark}!"], 255, "/python")
        assert found == tuple(part.format(host="b", python="/python") for part in meaning)
    why, remedy = unreachable(["what?"], 9)
    assert why.endswith("ended with exit code 9: what?") and remedy == "Try: ssh b p -m distpad"
    assert unreachable([], None)[0] == "it did not answer within 60 s: no output"


# -- the command line --------------------------------------------------------------------------------------------------


def launch(*arguments: str):
    return CliRunner().invoke(app.app, ["launch", *arguments])


def test_every_flag_can_stand_in_a_file(tmp_path):
    values = {
        **{"backend": "horovod", "np": 3, "hosts": ["node1:2", "node2:2"], "mpi": True, "launcher": "mpirun"},
        **{"launcher-arg": ["--x"], "ssh_arg": "-p2222", "network_interface": "eth1", "python": "/p", "env": ["HOME"]},
        **{"cwd": "/there", "log_dir": "/logs", "tee": True, "ranks": [0, 1], "max-restarts": 2, "backoff_s": 1.5},
        **{
            "no_retry": [3],
            "grace-s": 4,
            "start_timeout_s": 9,
            "timeout_s": 99,
            "lost_after_s": 60,
            "command": ["python", "a b.py"],
        },
    }
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(values))
    done = launch("--config", str(file), "--dry-run")
    assert done.exit_code == 0, done.output
    for expected in (
        "-np 3 -H node1:2,node2:2",
        "--x",
        "-p2222",
        "btl_tcp_if_include eth1",
        "python 'a b.py'",
        "/there",
    ):
        assert expected in done.output
    assert "-np 2 -H" in launch("--config", str(file), "-np", "2", "--dry-run").output  # the command line wins
    known = {flag for parameter in app.command("launch").params for flag in [parameter.name]} - {"config", "help"}
    further = {
        "hostfile",
        "slots_per_host",
        "min_np",
        "max_np",
        "host_discovery_script",
        "gloo",
        "port",
        "secret",
        "dry_run",
        *("gpus", "gpus_per_worker"),
        *cli_launch.OF_KUBERNETES,
    }
    assert {name.replace("-", "_") for name in values} | further == known


@pytest.mark.parametrize("text", ["{node1: 4, node2: 2}", "[node1: 4, node2: 2]", "[{node1: 4}, 'node2:2']"])
def test_hosts_of_a_file_may_be_a_mapping(tmp_path, text):
    file = tmp_path / "job.yaml"
    file.write_text(f"hosts: {text}")
    done = launch("--config", str(file), "--backend", "horovod", "--dry-run", "--", "true")
    assert done.exit_code == 0 and "-H node1:4,node2:2" in done.output, done.output


def test_a_dry_run_needs_no_mpirun(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    python = ("--python", str(tmp_path / "python"))
    done = launch("--backend", "horovod", "--mpi", "-np", "2", *python, "--dry-run", "--", "true")
    assert done.exit_code == 0, done.output
    assert "# mpirun was not found here: these are the options of Open MPI 4" in done.output
    assert "plm_rsh_args" in done.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: 2", "names 'nodes', expected one of:"),
        ("- a", "holds list, expected flags"),
        ("a: [", "cannot be read"),
        ("np: many", "unable to parse string as an integer"),
        ("np: {node1: 4}", "np: a mapping, expected one value"),
        ("hosts: {node1: {slots: 4}}", "hosts: slots of node1 is a mapping, expected an integer"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    done = launch("--config", str(file), "--dry-run", "--", "true")
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_secrets_are_hidden(tmp_path):
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    done = launch("--secret", f"API={file}", "-np", "2", "--dry-run", "--", "true")
    assert done.exit_code == 0 and "API='***'" in done.output and "s3cret" not in done.output


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_APIKEY", "MYSQL_PWD", "SSHPASS", "REDISCLI_AUTH", "http_proxy"])
def test_secrets_that_nobody_named_are_hidden(name):
    assert "s3c" not in render.redacted(name, "http://me:s3c@ret@proxy:80", {})
    assert render.redacted("PWD", "/here", {}) == "/here" and render.redacted("SSH_AUTH_SOCK", "/s", {}) == "/s"


def test_a_secret_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "key").write_bytes(b"a\0b")
    done = launch("--secret", f"API={tmp_path / 'key'}", "-np", "2", "--", "true")
    assert done.exit_code == 2 and "key holds a NUL byte" in done.output
    done = launch("--secret", "API=/none", "-np", "2", "--", "true")
    assert done.exit_code == 2 and "/none cannot be read" in done.output


def test_it_imports_no_tensorflow():
    code = "import sys; import distpad.cli.launch; print('tensorflow' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
