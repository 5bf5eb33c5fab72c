"""distpad doctor: each rule fires on what it is for and on nothing else; probes fail one by one; what is printed."""

from __future__ import annotations

import copy
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

import scripts
import worlds
from distpad.launcher import checks, facts, hosts, spec

pytestmark = pytest.mark.one_stack

ROOT = pathlib.Path(__file__).resolve().parents[3]
LIMIT_S = 200  # on a machine that others use too; alone it takes 10 s
GB = 1 << 30
# a host with four GPUs on which all is well, as facts.py tells it
WELL = {
    "host": "a",
    "time": 1000.0,
    "machine": {"cores": 16, "memory": 64 * GB, "open_files": {"soft": 4096, "hard": 4096}, "managed_by": []},
    "gpus": {
        **{"devices": 4, "names": ["NVIDIA H100 80GB HBM3"] * 4, "capabilities": ["9.0"] * 4},
        **{"version": "575.57.08", "cuda": "12.9", "wheels": {"nvidia-cuda-runtime-cu12": "12.9.79"}},
    },
    "shared_memory": {"size": 8 * GB, "free": 8 * GB},
    "environment": {},
    "python": {"version": "3.11.7", "executable": "/usr/bin/python"},
    "packages": {"tensorflow": "2.21.0", "keras": "3.15.1", "numpy": "2.4.6", "horovod": "0.28.1", "distpad": "0.1.0"},
    "engines": {
        "tensorflow": {
            "version": "2.21.0",
            "keras": "3.15.1",
            "cuda": "12.5",
            "cudnn": "9",
            "capabilities": ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"],
            "for_gpus": True,
            "gpus": 4,
        },
        "horovod": {"built_with": ["gloo", "mpi", "nccl"], "mpi": "Open MPI v4.1.4, package: Debian OpenMPI"},
    },
    "mpirun": {"path": "/usr/bin/mpirun", "version": "mpirun (Open MPI) 4.1.4"},
    "distpad": {"losses.py": "aaa", "nests.py": "bbb"},
    "code": {"train.py": "ccc"},
    "names": {"a": ["10.0.0.1"], "b": ["10.0.0.2"]},
    "ports": {"found": [2222], "taken": {}},
    "tf_config": None,
    "errors": {},
}
ALONE = checks.Question(slots={"a": 4}, slots_given=True, ports=(2222,), code="/job")
TWO = checks.Question(slots={"a": 4, "b": 4}, slots_given=True, ports=(2222,), code="/job")
# sets a value deep in the facts: a path, and the value
NO_GPUS = {"gpus.names": [], "gpus.devices": 0, "gpus.cuda": "", "engines.tensorflow.gpus": 0}
UNSEEN = {"engines.tensorflow.gpus": 0}
OPEN_MPI_5 = "mpirun (Open MPI) 5.0.11"


def changed(base: dict, changes: dict) -> dict:
    result = copy.deepcopy(base)
    for path, value in changes.items():
        *way, last = path.split(".")
        place = result
        for step in way:
            place = place[step]
        place[last] = value
    return result


def answers(**changes: dict) -> dict:
    """The answers of hosts, each well but for its changes."""
    return {
        host: {"facts": changed({**WELL, "host": host}, change), "sent": 999.5, "received": 1000.5}
        for host, change in changes.items()
    }


def wrong(found):
    return [finding for finding in found if finding.state != checks.OK]


# -- rules of one host ------------------------------------------------------------------------------------------------

# what is looked at: state, changes, what the evidence and the remedy say
ON_ONE_HOST = {
    "a probe that failed": ("probes", "warning", {"errors": {"gpus": "not done after 60 s"}}, "gpus.*60 s", "manually"),
    "no TensorFlow": ("TensorFlow", "error", {"packages": {"numpy": "2"}}, "not installed", "environment.sh"),
    "a TensorFlow that crashes": (
        *("TensorFlow", "error", {"engines.tensorflow": {"error": "signal 4", "ended": "signal 4"}}),
        *("does not load: signal 4", "this processor"),
    ),
    "Keras 2 with 2.21": ("Keras", "error", {"packages.keras": "2.15.0"}, "2.15.0 does not go with.*2.21", "keras>=3"),
    "Keras 3 with 2.15": (
        *("Keras", "error", {"engines.tensorflow.version": "2.15.1", "packages.keras": "3.4.1"}),
        *("Keras 3.4.1 does not go with TensorFlow 2.15.1", r"keras==2.15.\*"),
    ),
    "Addons": ("Addons", "warning", {"packages.tensorflow-addons": "0.23.0"}, "up to 2.15, here is 2.21.0", "2.15"),
    "a Horovod for another TensorFlow": (
        *("Horovod", "error", {"engines.horovod": {"error": "undefined symbol: _ZN10tensorflow"}}),
        *("does not load: undefined symbol", "install_horovod.sh --force"),
    ),
    "Horovod without NCCL": (
        *("Horovod's NCCL", "error", {"engines.horovod.built_with": ["gloo", "mpi"]}),
        *(r"4 GPUs, but Horovod was built without NCCL \(it has gloo, mpi\)", "install_horovod.sh --force"),
    ),
    "a TensorFlow for the CPU": (
        *("GPUs", "error", {**UNSEEN, "engines.tensorflow.for_gpus": False}),
        *("sees 0 of 4 GPUs: TensorFlow is built for the CPU", "environment.sh current-gpu"),
    ),
    "libraries that are missing": (
        *("GPUs", "error", UNSEEN, "sees 0 of 4 GPUs: libraries of CUDA 12 and cuDNN 9 are missing", "and-cuda"),
    ),
    "libraries of CUDA 13": (
        *("GPUs", "error", {**UNSEEN, "gpus.wheels": {"nvidia-nccl-cu13": "2.28.9", "nvidia-cuda-runtime": "13.0.96"}}),
        *(r"of CUDA 13 \(nvidia-cuda-runtime, nvidia-nccl-cu13\), TensorFlow needs CUDA 12", "and-cuda"),
    ),
    "a driver that is too old": (
        *("GPUs", "error", {**UNSEEN, "gpus.version": "470.256.02", "gpus.cuda": "11.4"}),
        *("the driver 470.256.02 supports CUDA up to 11.4, TensorFlow needs CUDA 12.5", "newer driver"),
    ),
    "a driver whose library is not in the container": (
        *("GPUs", "error", {**UNSEEN, "gpus.cuda": "", "gpus.names": []}),
        *("sees 0 of 4 GPUs: NVIDIA's driver is missing", "request GPUs"),
    ),
    "GPUs that a CPU image does not use": (
        *("GPUs", "error", {**NO_GPUS, "engines.tensorflow.for_gpus": False, "environment.DISTPAD_GPUS": "8"}),
        *("sees 0 of 8 GPUs: TensorFlow is built for the CPU", "environment.sh current-gpu"),
    ),
    "GPUs that are expected and not there": (
        *("GPUs", "error", {**NO_GPUS, "environment.DISTPAD_GPUS": "8"}),
        *("sees 0 of 8 GPUs: NVIDIA's driver is missing", r"nvidia.com/gpu"),
    ),
    "GPUs that are all hidden": (
        *("GPUs", "error", {**UNSEEN, "environment.CUDA_VISIBLE_DEVICES": ""}),
        *("sees 0 of 4 GPUs: CUDA_VISIBLE_DEVICES is ''", "Unset it"),
    ),
    "a GPU that does not exist": (
        *("GPUs", "error", {**UNSEEN, "environment.CUDA_VISIBLE_DEVICES": "7,0,1,2"}),
        *("CUDA_VISIBLE_DEVICES is '7,0,1,2'", "nvidia-smi -L"),
    ),
    "a GPU that is newer than TensorFlow": (
        *("GPUs", "error", {"gpus.names": ["NVIDIA GeForce RTX 5090"] * 4, "gpus.capabilities": ["12.0"] * 4}),
        *("RTX 5090 has compute capability 12.0, TensorFlow 2.21.0 has code for 6.0 to 9.0", "Use another GPU"),
    ),
    "a GPU that is too old": (
        *("GPUs", "error", {"gpus.names": ["Tesla M40"] * 4, "gpus.capabilities": ["5.2"] * 4}),
        *("Tesla M40 has compute capability 5.2", "Use another GPU"),
    ),
    "a GPU for which the driver compiles": (
        *("GPUs", "warning", {"engines.tensorflow.capabilities": ["sm_50", "sm_60", "sm_70", "sm_75", "compute_80"]}),
        *("H100 .* has code for 5.0 to 8.0: the driver compiles it", "ComputeCache"),
    ),
    "GPUs that are hidden": (
        *("GPUs", "warning", {"engines.tensorflow.gpus": 1, "environment.CUDA_VISIBLE_DEVICES": "0"}),
        *("sees 1 of 4 GPUs: CUDA_VISIBLE_DEVICES is '0'", "Unset"),
    ),
    "a driver that fails": (
        *("GPUs", "error", {**UNSEEN, "gpus.error": "Driver/library version mismatch"}),
        *("nvidia-smi fails: Driver/library version mismatch", "driver"),
    ),
    "more slots than GPUs": (
        *("slots", "error", {"gpus.names": ["T4"], "gpus.capabilities": ["7.5"], "engines.tensorflow.gpus": 1}),
        *("4 slots, but 1 GPUs", "Write a:1"),
    ),
    "more slots than cores": ("slots", "warning", {**NO_GPUS, "machine.cores": 2}, "4 slots, but 2 cores", "a:2"),
    "MPI gone": (
        *("Horovod", "error", {"engines.horovod": {"error": "libmpi.so.12: cannot open shared object file"}}),
        *("Horovod does not load: libmpi.so.12: cannot open", "install_horovod.sh --force"),
    ),
    "mpirun 5 for a Horovod with 4": (
        *("MPI", "error", {"mpirun.version": OPEN_MPI_5}),
        *("Horovod loads Open MPI 4.1.4, but mpirun is Open MPI 5.0.11", "Change PATH"),
    ),
    "mpirun of another family": (
        *("MPI", "error", {"mpirun.version": "HYDRA build details: Version: 4.0.2"}),
        *("but mpirun is MPICH 4.0.2", "install_horovod.sh"),
    ),
    "no mpirun": ("MPI", "warning", {"mpirun": None}, "no mpirun is on PATH", "--gloo"),
    "Open MPI 5 under an operator": (
        *("operator", "error"),
        {
            "mpirun.version": OPEN_MPI_5,
            "engines.horovod.mpi": "Open MPI v5.0.11",
            "environment.OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        },
        *("all workers would run on this host", "PRTE_MCA_prte_default_hostfile=/etc/mpi/hostfile"),
    ),
    "the shared memory of a pod": (
        *("/dev/shm", "error", {"shared_memory": {"size": 64 << 20, "free": 64 << 20}}),
        *("has 64 MB.*NCCL", "medium: Memory"),
    ),
    "the same without GPUs": (
        *("/dev/shm", "warning", {**NO_GPUS, "shared_memory": {"size": 64 << 20, "free": 64 << 20}}),
        *("has 64 MB", "--shm-size"),
    ),
    "shared memory that is full": (
        *("/dev/shm", "error", {"shared_memory": {"size": 8 * GB, "free": 1 << 20}}),
        *("1 MB of it free", "medium: Memory"),
    ),
    "few files": ("open files", "warning", {"machine.open_files.soft": 256}, "only 256 files", "ulimit -n"),
    "TF_CONFIG that is no JSON": (
        *("TF_CONFIG", "error", {"tf_config": {"error": "it is not JSON: Extra data at character 3"}}),
        *("TF_CONFIG is set, but it is not JSON", "Unset it"),
    ),
    "TF_CONFIG with a task too many": (
        *(
            "TF_CONFIG",
            "error",
            {"tf_config": {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}},
        ),
        *("says task worker 1, but names 1 worker", "Unset it"),
    ),
    "TF_CONFIG of another host": (
        *("TF_CONFIG", "error"),
        {
            "tf_config": {
                "cluster": {"worker": ["c:1"]},
                "task": {"type": "worker", "index": 0},
                "address": "c:1",
                "is_here": False,
            }
        },
        *("says that this host is c:1", "Unset it"),
    ),
    "a port that is taken": (
        *("ports", "error", {"ports.taken": {"2222": "Address already in use"}}),
        *("port 2222 is not free: address already in use", r"ss -ltnp 'sport = :2222'"),
    ),
}


@pytest.mark.parametrize(("what", "state", "change", "evidence", "remedy"), ON_ONE_HOST.values(), ids=ON_ONE_HOST)
def test_a_rule_of_one_host_fires_alone(what, state, change, evidence, remedy):
    found = wrong(checks.check(answers(a=change), ALONE))
    assert [(finding.host, finding.what, finding.state) for finding in found] == [("a", what, state)], found
    assert_says(found[0], evidence, remedy)


def assert_says(finding, evidence, remedy):
    assert re.search(evidence, finding.evidence), finding
    assert re.search(remedy, finding.remedy), finding


def test_each_rule_was_seen_to_fire():
    assert {what for what, *_ in ON_ONE_HOST.values()} == set(checks.OF_A_HOST) - {"clock"}
    assert {what for what, *_ in ON_TWO_HOSTS.values()} == {*checks.OF_ALL_HOSTS, "clock"}


HARMLESS = {
    "nothing": {},
    "no GPUs": {**NO_GPUS, "engines.horovod.built_with": ["gloo"]},
    "no Horovod": {"engines.horovod": None},
    "no MPI at all": {"mpirun": None, "engines.horovod.mpi": ""},
    "the operator's name for 4": {"environment.OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile"},
    "both names for 5": {
        "mpirun.version": OPEN_MPI_5,
        "engines.horovod.mpi": "Open MPI v5.0.11",
        "environment.OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "environment.PRTE_MCA_prte_default_hostfile": "/etc/mpi/hostfile",
    },
    "the classic stack": {
        "packages": {"tensorflow": "2.15.1", "keras": "2.15.0", "tensorflow-addons": "0.23.0", "horovod": "0.28.1"},
        "engines.tensorflow.version": "2.15.1",
    },
    "Keras's nightly": {"packages.keras": "3.16.0.dev0"},
    "no limit of files": {"machine.open_files.soft": -1},
    "a loopback name, alone": {"names": {"a": ["127.0.1.1"]}},
    "TF_CONFIG of a job of one": {"tf_config": {"cluster": {}, "task": {"type": None, "index": None}}},
    "TF_CONFIG of this host": {
        "tf_config": {
            "cluster": {"worker": ["a:1"]},
            "task": {"type": "worker", "index": 0},
            "address": "a:1",
            "is_here": True,
        }
    },
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_on_one_host(change):
    found = checks.check(answers(a=change), ALONE)
    assert not wrong(found)
    assert {finding.what for finding in found} == {*checks.OF_A_HOST, "reach"}


def test_facts_that_are_missing_break_no_rule():
    """A probe that failed leaves no facts: the rules that need them have nothing to say."""
    for probe in facts.PROBES:
        there = {name: value for name, value in WELL.items() if name != probe}
        for number in (1, 2):
            each = {"facts": there, "sent": 999.5, "received": 1000.5}
            found = checks.check({"a": each, "b": each} if number == 2 else {"a": each}, TWO if number == 2 else ALONE)
            assert not wrong(found), (probe, wrong(found))


# -- rules of several -------------------------------------------------------------------------------------------------

ON_TWO_HOSTS = {
    "its own name leads to loopback": (
        *("names", "error", "b", {"names.b": ["127.0.1.1"]}),
        *("its own name b resolves to 127.0.1.1, the loopback", "real address in /etc/hosts"),
    ),
    "another's name leads to loopback": (
        "names",
        "error",
        "b",
        {"names.a": ["::1"]},
        "the name a resolves to ::1",
        "/etc",
    ),
    "another is not known": ("names", "error", "b", {"names.a": []}, "the name a does not resolve", "DNS"),
    "another TensorFlow": (
        *("versions", "error", "b", {"packages.tensorflow": "2.20.0"}),
        *("tensorflow differs: a has 2.21.0, b has 2.20.0", "the same version everywhere"),
    ),
    "a package that one lacks": (
        *("versions", "error", "b", {"packages": {k: v for k, v in WELL["packages"].items() if k != "horovod"}}),
        *("horovod differs: a has 0.28.1, b has none", "the same version everywhere"),
    ),
    "another Python": ("versions", "error", "b", {"python.version": "3.12.1"}, "Python differs: a has 3.11", "same"),
    "another build": (
        *("builds", "error", "b", {"engines.horovod.built_with": ["gloo", "nccl"]}),
        *("differs: a has gloo mpi nccl, b has gloo nccl", "install_horovod.sh"),
    ),
    "a stale distpad": (
        *("distpad's code", "error", "b", {"distpad": {"losses.py": "old", "nests.py": "bbb"}}),
        *("distpad's own code differs.*in losses.py", "same distpad"),
    ),
    "another program": (
        *("code", "error", "b", {"code": {"train.py": "ccc", "model.py": "ddd"}}),
        *("the code in /job differs from the other hosts' in model.py", "rsync -a /job/ HOST:/job/"),
    ),
    "a clock ahead": ("clock", "warning", "b", {"time": 1060.5}, "clock is 60 s ahead", "timedatectl"),
    "a clock behind": ("clock", "warning", "b", {"time": 939.5}, "clock is 60 s behind", "timedatectl"),
}


@pytest.mark.parametrize(
    ("what", "state", "host", "change", "evidence", "remedy"), ON_TWO_HOSTS.values(), ids=ON_TWO_HOSTS
)
def test_a_rule_of_two_hosts_fires_alone(what, state, host, change, evidence, remedy):
    found = wrong(checks.check(answers(a={}, b=change), TWO))
    assert [(finding.host, finding.what, finding.state) for finding in found] == [(host, what, state)], found
    assert_says(found[0], evidence, remedy)


def test_the_odd_one_of_three_is_named():
    three = checks.Question(slots={"a": 4, "b": 4, "c": 4})
    found = wrong(checks.check(answers(a={"packages.numpy": "1.26.4"}, b={}, c={}), three))
    assert [(finding.host, finding.evidence) for finding in found] == [
        ("a", "numpy differs: a has 1.26.4, b c have 2.4.6")
    ]


@pytest.mark.parametrize("change", [{}, {"time": 1004.0}, {"python.version": "3.11.9"}, {"code": None}], ids=str)
def test_what_is_harmless_on_two_hosts(change):
    assert not wrong(checks.check(answers(a={}, b=change), TWO))


def test_a_host_that_cannot_be_reached_is_named_once():
    given = answers(a={"names.b": []})
    given["b"] = {"unreachable": "no ssh server listens there", "remedy": "Check on the host: systemctl status ssh"}
    found = wrong(checks.check(given, TWO))
    assert [(finding.host, finding.what, finding.state) for finding in found] == [("b", "reach", "error")]
    assert_says(found[0], "no ssh server listens there", "systemctl status ssh")


def test_errors_come_first():
    states = [
        finding.state for finding in checks.check(answers(a={"time": 1060.5, "ports.taken": {"1": "Taken"}}), ALONE)
    ]
    assert states == sorted(states, key=["error", "warning", "ok"].index) and set(states) == {"error", "warning", "ok"}


# -- probes -----------------------------------------------------------------------------------------------------------


def test_a_probe_that_fails_or_hangs_leaves_the_others(monkeypatch):
    began = time.monotonic()
    own = {"good": lambda asked: 1, "bad": lambda asked: 1 // 0, "slow": lambda asked: time.sleep(30)}
    monkeypatch.setattr(facts, "PROBES", own)
    found = facts.collect({"limit_s": 0.5, "probes": [*own]})
    assert time.monotonic() - began < 10
    assert found["good"] == 1 and "slow" not in found and "bad" not in found
    assert found["errors"] == {
        "bad": "ZeroDivisionError: integer division or modulo by zero",
        "slow": "not done after 0.5 s",
    }


def test_a_tensorflow_that_ends_its_process_is_a_fact(monkeypatch, tmp_path):
    (tmp_path / "tensorflow.py").write_text("import os; os.kill(os.getpid(), 4)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert facts.engines(LIMIT_S)["tensorflow"] == {"error": "signal 4", "ended": "signal 4"}
    (tmp_path / "tensorflow.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    assert facts.engines(LIMIT_S)["tensorflow"]["error"] == "ImportError: libcudart.so.12: cannot open"
    (tmp_path / "tensorflow.py").write_text("import time; time.sleep(60)")
    assert facts.engines(2)["tensorflow"]["error"] == "not done after 2 s"


def test_code_is_python_outside_of_environments(tmp_path):
    for name in ("train.py", "lib/model.py", "notes.txt", ".git/hook.py", "venv/pyvenv.cfg", "venv/lib/x.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(name)
    assert set(facts.code(str(tmp_path))) == {"train.py", "lib/model.py"}
    assert facts.code(str(tmp_path))["train.py"] != facts.code(str(tmp_path))["lib/model.py"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        facts.code(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("", None),
        ("[]", "does not have the form"),
        ('{"cluster": []}', None),
        ('{"cluster": {"worker": 3}}', "does not have the form"),
        ("{", "not JSON"),
    ],
)
def test_tf_config_of_any_form(text, expected):
    found = facts.tf_config(text)
    assert (found or {}).get("error") is None if expected is None else expected in found["error"]


def test_tf_config_that_names_this_machine_and_another():
    config = {"cluster": {"chief": ["127.0.0.1:1"], "worker": ["192.0.2.1:1"]}, "task": {"type": "chief", "index": 0}}
    assert facts.tf_config(json.dumps(config))["is_here"] is True
    config["task"] = {"type": "worker", "index": "0"}
    assert facts.tf_config(json.dumps(config))["is_here"] is False
    config["task"]["index"] = 7
    assert "address" not in facts.tf_config(json.dumps(config))


# -- reaching hosts ---------------------------------------------------------------------------------------------------


def ask(tmp_path, script: str, limit_s: float = 30):
    """The answer of a host to which an ssh leads that does as the script says."""
    scripts.script(tmp_path / "ssh", script)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return hosts.ask([spec.Host("far")], ALONE, python="/py", limit_s=limit_s, environ=environ)["far"]


def test_why_a_host_cannot_be_reached(tmp_path):
    """tests/single/launcher/test_launch_job.py has all that ssh may write."""
    answer = ask(tmp_path, "echo 'connect to host far port 22: Connection refused' >&2; exit 255")
    assert_says(_as_finding(answer), "no ssh server listens there", "systemctl status ssh")


def test_a_host_that_does_not_answer_ends_in_time(tmp_path):
    began = time.monotonic()
    answer = ask(tmp_path, "sleep 60", limit_s=1)
    assert answer["unreachable"] == "it did not answer within 1 s: no output" and time.monotonic() - began < 20


def test_no_ssh_here_and_no_such_python(tmp_path):
    asked = {"limit_s": 20, "environ": {"PATH": str(tmp_path)}}
    far = hosts.ask([spec.Host("far")], ALONE, python="/py", **asked)["far"]
    assert_says(_as_finding(far), "ssh cannot be run here: No such file", "Install it")
    here = hosts.ask([spec.Host("localhost")], ALONE, python="/py", **asked)["localhost"]
    assert_says(_as_finding(here), "/py cannot be run here: No such file", "--python")


def _as_finding(answer):
    return checks.Finding("error", answer["unreachable"], answer["remedy"])


def test_what_a_login_script_writes_is_passed_over(tmp_path):
    ready = '{"is": "ready", "facts": {"host": "far", "errors": {}}}'
    answer = ask(tmp_path, f"""echo 'Welcome!'; echo 3; echo '{ready}'; cat >/dev/null""", limit_s=3)
    assert answer["facts"] == {"host": "far", "errors": {}} and answer["sent"] <= answer["received"]


# -- the command, on this machine -------------------------------------------------------------------------------------


RUNS = {  # arguments, further variables
    "table": ([], {}),
    "json": (["--json", "--code", str(ROOT / "launch")], {"TF_CONFIG": "{"}),
    "usage": (["-H", "a:none"], {}),
    "imports": (["--help"], {"PYTHONPROFILEIMPORTTIME": "1"}),
}


def command(name):
    secret = "correct horse battery staple"
    forget = ("TF_CONFIG", "CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID")
    environment = {name: value for name, value in os.environ.items() if name not in forget}
    environment |= {"PYTHONPATH": worlds.CODE, "COLUMNS": "100", "NO_COLOR": "1", "MY_TOKEN": secret}
    arguments, more = RUNS[name]
    call = [sys.executable, "-m", "distpad", "doctor", *arguments]
    settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": LIMIT_S}
    done = subprocess.run(call, env=environment | more, **settings)
    assert secret not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.wide  # tests/cluster asks real hosts
@pytest.mark.timeout(LIMIT_S + 20)
def test_the_table():
    code, output, argument_errors = command("table")
    assert (code, argument_errors) == (0, "")
    assert "TensorFlow" in output and "Python" in output and "checks passed" in output.splitlines()[-1]
    assert max(map(len, output.splitlines())) <= 100


@pytest.mark.one_stack
@pytest.mark.timeout(LIMIT_S + 20)
def test_the_report():
    import tensorflow as tf

    code, output, argument_errors = command("json")
    report = json.loads(output)
    (answer,) = report["hosts"].values()
    found = [checks.Finding(**each) for each in report["findings"]]
    assert code == 1, argument_errors
    assert [each.what for each in found if each.state == "error"] == ["TF_CONFIG"]
    assert answer["facts"]["errors"] == {}
    assert answer["facts"]["engines"]["tensorflow"]["version"] == tf.__version__
    assert "install_horovod.sh" not in answer["facts"]["code"] and "launched.py" not in answer["facts"]["code"]
    asked = checks.Question(**{**report["asked"], "ports": tuple(report["asked"]["ports"])})
    assert checks.check(report["hosts"], asked) == found  # whoever is sent the report sees what the sender saw


@pytest.mark.timeout(LIMIT_S + 20)
def test_wrong_usage():
    code, output, argument_errors = command("usage")
    assert (code, output) == (2, "") and "distpad doctor: -H a:none holds 'a:none'" in argument_errors


@pytest.mark.timeout(LIMIT_S + 20)
def test_the_command_itself_imports_no_engine():
    code, _, argument_errors = command("imports")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in argument_errors.splitlines()}
    assert code == 0 and "typer" in imported
    assert not imported & {"tensorflow", "keras", "horovod", "numpy"}
