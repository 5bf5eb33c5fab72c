"""`distpad launch` on this host: exit codes, the worker named in the summary, and no leftover processes."""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

import needs
from launched import LIMIT_S, QUICK, WORKER, Launched, launch, scripted, until
from scripts import script

HERE = pathlib.Path(__file__).parent
ENGINES = {
    "multiworker": ("--backend", "multiworker"),
    "horovodrun": ("--backend", "horovod", "--gloo"),
    "mpirun": ("--backend", "horovod", "--mpi"),
}


# Two faults run under every engine, and one without horovodrun by default, which takes longest to start. The others do
# not depend on the engine: they run by default under the engine without a launcher of its own, and under the other
# engines as wide tests.
everywhere = pytest.mark.parametrize("engine", ENGINES, indirect=True)
not_horovodrun = pytest.mark.parametrize(
    "engine", ["multiworker", "mpirun", pytest.param("horovodrun", marks=pytest.mark.wide)], indirect=True
)
mostly_alone = pytest.mark.parametrize(
    "engine",
    ["multiworker", *(pytest.param(name, marks=pytest.mark.wide) for name in ENGINES if name != "multiworker")],
    indirect=True,
)


@pytest.fixture
def engine(request):
    if request.param != "multiworker":
        needs.program(request.param)
    return ENGINES[request.param]


# -- ends --------------------------------------------------------------------------------------------------------------


@mostly_alone
def test_all_is_well(engine):
    done = launch(*engine, "-np", 2, command=scripted("all=report"))
    assert done.code == 0, done.stderr
    reports = [json.loads(line.partition("] ")[2]) for line in done.stdout.splitlines()]
    assert len(reports) == 2
    assert {each["env"]["DISTPAD_WORKERS"] for each in reports} == {"2"}
    assert f"starting {sys.executable} on 2 workers (localhost:2)" in done.stderr


@everywhere
def test_a_worker_that_exits_with_42(engine):
    """The other worker ignores SIGTERM."""
    done = launch(*engine, "-np", 2, command=scripted("1=sleep:1", "1=exit:42", "0=ignore-terms", "0=sleep:600"))
    assert done.code == 42
    assert "worker 1 on localhost failed first (exit code 42)" in done.stderr
    assert "| rank 1 exits with 42" in done.stderr


def test_the_first_failure_counts_and_the_others_have_their_say():
    command = scripted("2=exit:5", "0=sleep:3", "0=exit:1", "1=sleep:3")
    done = launch("-np", 3, "--grace-s", 30, command=command, env={"DISTPAD_TIME_SCALE": "3"})
    assert done.code == 5
    assert "worker 2 on localhost failed first (exit code 5)" in done.stderr
    assert "then failed: worker 0 (exit code 1)" in done.stderr
    assert "rank 0 exits with 1" in done.stderr


def test_a_failure_does_not_wait_for_idle_workers():
    command = scripted("1=exit:5", "0=sleep:600")
    done = launch("-np", 2, "--grace-s", 30, command=command, env={"DISTPAD_TIME_SCALE": "1"})
    assert done.code == 5 and done.seconds < 9  # 3 s on an idle machine


def test_a_failure_waits_for_a_worker_that_writes_a_checkpoint():
    command = scripted("1=exit:5", "0=save:3")
    done = launch("-np", 2, "--grace-s", 30, command=command, env={"DISTPAD_TIME_SCALE": "0.5"})
    assert done.code == 5 and "[worker 0] saved" in done.stdout, done.stderr


@mostly_alone
def test_a_worker_that_is_killed(engine):
    done = launch(*engine, "-np", 2, command=scripted("0=sleep:0.5", "0=kill", "1=sleep:600"))
    assert done.code == 137
    assert "worker 0 on localhost failed first (signal SIGKILL, exit code 137)" in done.stderr


def test_a_worker_whose_parent_is_killed_dies_with_it():
    running = Launched("-np", 2, command=scripted("all=escape:602.25", "all=sleep:600"))
    parent = psutil.Process(running.workers(2)[0]).parent()
    assert "distpad.launcher.worker" in parent.cmdline()
    parent.kill()
    done = running.finish()
    assert done.code == 137 and "signal SIGKILL" in done.stderr and done.left() == []
    assert sleeps("602.25") == []


def sleeps(seconds: str) -> list[psutil.Process]:
    return [each for each in psutil.process_iter(["cmdline"]) if each.info["cmdline"] == ["sleep", seconds]]


@mostly_alone
def test_children_never_outlive_it(engine):
    """Also those that leave their session and environment. The message names their own program."""
    done = launch(*engine, "-np", 2, command=scripted("0=leave-child", "1=escape:601.25"))
    assert done.code == 0
    left = "\n".join(re.findall("killed leftover processes on localhost: (.*)", done.stderr))
    assert re.search(r"^\S*/sleep \(\d+\)$", left, re.M) and os.path.realpath(sys.executable) in left
    assert sleeps("601.25") == []


@not_horovodrun
def test_a_launcher_that_is_killed_takes_all_with_it(engine):
    running = Launched(*engine, "-np", 2, command=scripted("all=ignore-terms", "all=escape:603.25", "all=sleep:600"))
    running.workers(2)
    running.process.kill()
    running.process.wait()
    assert until(lambda: running.left() == sleeps("603.25") == [], look_s=0.2)


SAVER = """
import pathlib, signal, sys, time
until = []
signal.signal(signal.SIGTERM, lambda *_: until.append(time.monotonic() + 1))
while not until or time.monotonic() < until[0]:
    print("step", flush=True)
    pathlib.Path(sys.argv[1], "up").touch()
    time.sleep(0.02)
pathlib.Path(sys.argv[1], "saved").touch()
"""


def test_a_launcher_that_is_killed_leaves_the_workers_their_grace(tmp_path):
    """Also workers that write continuously, although the reader is gone."""
    running = Launched("-np", 1, "--grace-s", 60, command=[sys.executable, "-c", SAVER, tmp_path])
    assert until((tmp_path / "up").exists)
    running.process.kill()
    running.process.wait()
    until(lambda: (tmp_path / "saved").exists() or not running.left())
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("number", "code", "engine"),
    [
        *((signal.SIGTERM, 143, name) for name in ENGINES),
        (signal.SIGINT, 130, "multiworker"),
        *(pytest.param(signal.SIGINT, 130, name, marks=pytest.mark.wide) for name in ("horovodrun", "mpirun")),
    ],
    indirect=["engine"],
)
def test_signals_are_forwarded(number, code, engine):
    running = Launched(*engine, "-np", 2, command=scripted("all=sleep:600"))
    running.workers(2)
    running.process.send_signal(number)
    done = running.finish()
    assert done.code == code, done.stderr
    assert f"got {number.name}: forwarding it to the workers" in done.stderr and done.left() == []
    assert done.stderr.count("KeyboardInterrupt") == (2 if number == signal.SIGINT else 0)


IN_BACKGROUND = ("sh", "-c", '"$@" & wait $!', "sh")  # a shell without job control: its child ignores SIGINT


@pytest.mark.parametrize(("number", "under"), [(signal.SIGHUP, ["nohup"]), (signal.SIGINT, IN_BACKGROUND)])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number, under):
    command = scripted(f"all=ignores:{number.name}", "all=sleep:2")
    running = Launched("-np", 2, command=command, under=under)
    running.workers(2)
    for process in psutil.Process(running.process.pid).children(recursive=True):  # agents, workers and commands too
        process.send_signal(number)
    if under == ["nohup"]:
        running.process.send_signal(number)
    done = running.finish()
    assert done.code == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[worker {rank}] {number.name} True" for rank in (0, 1)]


def test_an_ignored_sigchld_loses_no_exit_code():
    done = launch("-np", 1, command=scripted("0=exit:7"), under=("env", "--ignore-signal=CHLD"))
    assert done.code == 7 and "ChildProcessError" not in done.stderr


def test_a_second_ctrl_c_does_not_wait():
    running = Launched("-np", 2, "--grace-s", 300, command=scripted("all=ignore-terms", "all=sleep:600"))
    running.workers(2)
    running.process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert running.process.poll() is None  # the workers have their grace period
    running.process.send_signal(signal.SIGINT)
    done = running.finish()
    assert done.code == 130 and done.left() == []


@mostly_alone
def test_a_time_limit(engine):
    limit_s = 6 if engine == ENGINES["multiworker"] else 25  # the other engines need this time to start
    done = launch(*engine, "-np", 2, "--timeout-s", limit_s, command=scripted("0=sleep:600"))
    assert done.code == 124
    assert f"not done after {limit_s} s: ending worker 0," in done.stderr


@mostly_alone
def test_workers_that_never_stop_writing_keep_nobody_from_looking(engine):
    done = launch(*engine, "-np", 2, "--timeout-s", 4, command=scripted("all=chatter:600"))
    assert done.code == 124, done.stderr


def test_a_long_grace_is_one_grace():
    """The launcher sends signs of life while it waits. Otherwise the agents would end the job, with a second signal."""
    flags = ("--grace-s", 60, "--lost-after-s", 2)
    running = Launched("-np", 1, *flags, command=scripted("0=save-on-term:3"))
    running.workers(1)
    running.process.send_signal(signal.SIGTERM)
    done = running.finish()
    assert done.code == 143 and done.left() == []
    assert "got 1 SIGTERM, saved" in done.stdout, done.stdout


def pause(running: Launched, seconds: float) -> None:
    running.workers(1)
    running.process.send_signal(signal.SIGSTOP)  # as by Ctrl-Z, or a closed laptop
    time.sleep(seconds)
    running.process.send_signal(signal.SIGCONT)


def test_a_launcher_that_pauses_does_not_end_the_job():
    running = Launched("-np", 1, command=scripted("0=sleep:6"), env={"DISTPAD_TIME_SCALE": "0.1"})
    pause(running, 4)
    assert running.finish().code == 0, running.stderr


def test_a_launcher_that_pauses_for_too_long_is_told_so():
    running = Launched("-np", 1, "--lost-after-s", 1, command=scripted("0=sleep:600"))
    pause(running, 3)
    done = running.finish()
    assert done.code == 4 and done.left() == []
    assert "localhost was lost, with worker 0: its agent heard nothing from the launcher for 1 s" in done.stderr


def test_a_terminal_that_stands_still_does_not_end_the_job():
    job = f"{sys.executable} -m distpad launch -np 1 --lost-after-s 2 -- {sys.executable} {WORKER} 0=write:20000"
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), **QUICK}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{job} | (sleep 4; wc -l)"],
        env=env, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "20000"), done.stderr


# -- starts ------------------------------------------------------------------------------------------------------------


@mostly_alone
def test_a_command_that_is_not_there(engine):
    done = launch(*engine, "-np", 2, command=["/no/such/command"])
    assert done.code == 127
    assert "cannot start /no/such/command: No such file or directory" in done.stderr


def test_a_command_that_may_not_be_run(tmp_path):
    (tmp_path / "data").write_text("")
    done = launch("-np", 2, command=[tmp_path / "data"])
    assert done.code == 126 and "Permission denied" in done.stderr


def test_a_worker_that_never_starts():
    running = Launched("--backend", "horovod", "-np", 2, "--start-timeout-s", 5, command=scripted("all=sleep:600"))
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:  # horovodrun is stopped before it has started a worker
        for child in psutil.Process(running.process.pid).children(recursive=True):
            if any(word.endswith("horovodrun") for word in child.cmdline()):
                child.suspend()
                end = 0
        time.sleep(0.02)
    done = running.finish()
    assert done.code == 124
    assert "not started within 5 s: worker 0 (localhost), 1 (localhost)" in done.stderr
    assert done.left() == []


def test_a_worker_that_fails_before_another_starts(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('DISTPAD_RANK') == '1': time.sleep(600)\n"
    )
    path = f"{tmp_path}{os.pathsep}{HERE.parents[1]}"
    done = launch("-np", 2, "--start-timeout-s", 300, command=scripted("0=exit:42"), env={"PYTHONPATH": path})
    assert done.code == 42 and "worker 0 on localhost failed first (exit code 42)" in done.stderr


def test_an_engine_that_starts_another_number():
    done = launch(
        *ENGINES["mpirun"], "-np", 2, "--launcher-arg=-np", "--launcher-arg=1", command=scripted("all=sleep:600")
    )
    assert done.code == 3, done.stderr
    assert "expected 2 workers, but mpirun started a worker on localhost as rank 0 of 1" in done.stderr


def test_an_engine_that_fails():
    done = launch(*ENGINES["mpirun"], "-np", 2, "--launcher-arg=--no-such-option", command=scripted("all=sleep:600"))
    assert done.code not in (0, 3, 124)
    assert "mpirun ended (exit code" in done.stderr and "before the workers were done" in done.stderr
    assert "no-such-option" in done.stderr  # mpirun's own message


def python_in(folder: pathlib.Path) -> pathlib.Path:
    """A Python in a folder without engines."""
    return script(folder / "python", f'exec {sys.executable} "$@"')


def test_an_engine_that_is_not_installed(tmp_path):
    python = ("--python", python_in(tmp_path))
    done = launch("--backend", "horovod", "-np", 2, *python, env={"PATH": "/bin"}, command=["true"])
    assert done.code == 127 and "horovodrun cannot be started" in done.stderr


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("-np", 1, "--python", "/no/python"), "/no/python"),
        (("-H", "elsewhere"), "ssh"),
        (("--min-np", 1, "--backend", "horovod", "-H", "elsewhere"), "ssh"),
    ],
)
def test_what_brings_agents_is_not_installed(flags, what, tmp_path):
    done = launch(*flags, command=scripted(), env={"PATH": str(tmp_path)})
    assert done.code == 3, done.stderr
    assert f"cannot be used: {what} cannot be started here: No such file or directory" in done.stderr


def test_a_python_of_this_folder(tmp_path):
    python_in(tmp_path)
    done = launch("--python", "./python", "--backend", "mirrored", command=["true"], cwd=tmp_path)
    assert done.code == 0, done.stderr


def test_another_family_of_mpi(tmp_path):
    script(tmp_path / "mpirun", "echo HYDRA build details:")
    python = ("--python", python_in(tmp_path))  # the launcher searches for mpirun in Python's folder
    done = launch("--backend", "horovod", "--mpi", "-np", 1, *python, command=scripted())
    assert done.code == 2 and "mpirun --version is 'HYDRA build details:', expected Open MPI" in done.stderr


ELASTIC = ("--backend", "horovod", "--min-np", 1, "--max-np", 1)


@pytest.mark.parametrize("horovodrun", ["of the test", pytest.param("real", marks=pytest.mark.wide)])
def test_an_elastic_job_on_this_host_by_its_own_name(tmp_path, horovodrun):
    flags = ()
    if horovodrun == "of the test":  # starts one worker; its command line ends with that of distpad's own worker
        flags = ("--python", python_in(tmp_path))
        script(tmp_path / "horovodrun", 'shift $(($# - 4)); HOROVOD_RANK=0 HOROVOD_SIZE=1 exec "$@"')
    done = launch(*ELASTIC, "-H", f"{socket.gethostname()}:1", *flags, command=scripted("0=exit:0"))
    assert done.code == 0, done.stderr


def test_an_elastic_job_for_which_no_host_is_found():
    done = launch(*ELASTIC, "--host-discovery-script", shutil.which("true"), "--start-timeout-s", 2, command=scripted())
    assert done.code == 3 and "nothing was started. no hosts were found" in done.stderr


def test_a_worker_that_ends_before_it_has_come(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'distpad.launcher.worker' in sys.orig_argv:\n"
        "    print('the disk is gone', file=sys.stderr, flush=True)\n"
        "    os._exit(9)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(HERE.parents[1])])
    done = launch("-np", 1, env={"PYTHONPATH": path}, command=scripted("all=sleep:600"))
    assert done.code == 9, done.stderr
    assert "worker 0 on localhost failed first (exit code 9)" in done.stderr and "| the disk is gone" in done.stderr


def test_a_port_that_is_in_use():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = launch("-np", 1, "--port", port, command=scripted("all=report"))
    assert done.code == 3
    assert f"on localhost, port {port} is not free: address already in use" in done.stderr


def test_a_working_folder_that_was_deleted(tmp_path):
    in_deleted = ("bash", "-c", f'mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"', "bash")
    done = launch("-np", 2, command=["true"], under=in_deleted)
    assert done.code == 2 and done.stderr.endswith(
        "distpad launch: the working folder was deleted, expected one that exists. cd to it, or give --cwd FOLDER.\n"
    ), done.stderr
    done = launch("-np", 2, "--cwd", tmp_path, command=["true"], under=in_deleted)
    assert done.code == 0, done.stderr


def test_too_few_slots():
    done = launch("-np", 4, "-H", "localhost:2", command=["true"])
    assert done.code == 2 and "-np is 4, but the hosts have 2 slots (localhost:2)" in done.stderr


# -- what is passed on -------------------------------------------------------------------------------------------------

HOSTILE = ["it's", 'a "file"', "$(touch hacked)", "`touch hacked`", "a\nb", "", "; touch hacked", "-np", "é\t☃", "%s"]


@mostly_alone
def test_arguments_folder_and_variables_arrive_unchanged(engine, tmp_path):
    folder = tmp_path / "my $(touch hacked)\nfolder 'of' mine"
    folder.mkdir()
    (folder / "worker 'its'.py").write_text(WORKER.read_text())
    command = [sys.executable, "worker 'its'.py", "all=report", *HOSTILE]
    done = launch(*engine, "-np", 2, command=command, cwd=folder, env={"GIVEN": "\n".join(HOSTILE)})
    assert done.code == 0, done.stderr
    reports = [json.loads(line.partition("] ")[2]) for line in done.stdout.splitlines()]
    assert len(reports) == 2
    for each in reports:
        assert each["argv"] == ["all=report", *HOSTILE]
        assert each["env"]["GIVEN"] == "\n".join(HOSTILE)
        assert each["cwd"] == str(folder)
    assert not list(tmp_path.rglob("hacked"))


@mostly_alone
def test_no_secret_is_on_a_command_line(engine, tmp_path):
    (tmp_path / "key").write_text("s3cr3t-from-file\n")
    secret = ("--secret", f"API_KEY={tmp_path / 'key'}")
    running = Launched(
        *engine, "-np", 2, *secret, command=scripted("all=report", "all=sleep:3"), env={"MINE": "s3cr3t-2"}
    )
    running.workers(2)
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    done = running.finish()
    assert done.stdout.count('"API_KEY": "s3cr3t-from-file"') == 2, done.stderr
    assert any("distpad.launcher.worker" in line for line in lines) and any(str(WORKER) in line for line in lines)
    assert [line for line in lines if "s3cr3t" in line] == []


def test_threads_are_shared_out():
    done = launch("-np", 2, command=scripted("0=report"), env={"OMP_NUM_THREADS": "", "TF_NUM_INTRAOP_THREADS": "7"})
    env = json.loads(done.stdout.partition("] ")[2])["env"]
    assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert env["TF_NUM_INTRAOP_THREADS"] == "7"  # a variable that is set stays


def test_threads_are_those_that_slurm_gives_a_task():
    env = {"OMP_NUM_THREADS": "", "TF_NUM_INTRAOP_THREADS": "", "SLURM_CPUS_PER_TASK": "3"}
    done = launch(*ENGINES["mpirun"], "-np", 2, command=scripted("0=report"), env=env)
    env = json.loads(done.stdout.partition("] ")[2])["env"]
    assert (env["OMP_NUM_THREADS"], env["TF_NUM_INTRAOP_THREADS"]) == ("3", "3")


# -- output ------------------------------------------------------------------------------------------------------------


def test_logs_by_attempt_rank_and_stream(tmp_path):
    command = scripted("all=fail-once")
    done = launch("-np", 2, "--log-dir", "logs", "--max-restarts", 2, "--backoff-s", 0.2, command=command, cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "starting again in 0.2 s (2 of 2 restarts left)" in done.stderr
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["attempt-0", "attempt-1"]
    for attempt in (0, 1):
        for rank in (0, 1):
            assert (tmp_path / f"logs/attempt-{attempt}/rank-{rank}.stdout").read_text() == f"attempt {attempt}\n"
    assert done.stdout == ""  # without --tee
    assert re.search(r"full output: .*/logs/attempt-0", done.stderr)


def test_the_logs_of_an_earlier_run_stay(tmp_path):
    for _ in range(2):
        launch("-np", 1, "--log-dir", tmp_path / "logs", command=scripted("0=write:1"))
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["attempt-0", "attempt-1"]


def test_tee_and_ranks(tmp_path):
    command = scripted("all=write:3")
    done = launch("-np", 3, "--log-dir", tmp_path / "logs", "--tee", "--ranks", "0,2", command=command)
    assert [line[:17] for line in sorted(done.stdout.splitlines())] == [
        f"[worker {rank}] {rank} line" for rank in (0, 2) for _ in range(3)
    ]
    assert (tmp_path / "logs/attempt-0/rank-1.stdout").read_text().count("\n") == 3


@mostly_alone
def test_no_line_is_lost_or_torn(engine):
    done = launch(*engine, "-np", 2, command=scripted("all=write:5000"))
    assert done.code == 0
    lines = [line for line in done.stdout.splitlines() if " line " in line]
    assert lines == done.stdout.splitlines() and len(lines) == 10000
    for rank in (0, 1):
        own = [line for line in lines if line.startswith(f"[worker {rank}]")]
        assert own == [f"[worker {rank}] {rank} line {i} " + "x" * 100 for i in range(5000)]


def test_a_reader_that_goes_away_does_not_end_the_job():
    job = f"{sys.executable} -m distpad launch -np 2 -- {sys.executable} {WORKER} all=write:2000 all=sleep:1"
    for command in (f"{job} | head -n 1", f"{job} 2>&1 | head -n 1"):
        env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command], env=env, capture_output=True, text=True, timeout=LIMIT_S
        )
        assert (done.returncode, done.stdout.count("\n")) == (0, 1), done.stderr
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("closing", ['exec "$@" 2>&-', 'exec "$@" <&- >&- 2>&-'])
def test_closed_streams_do_not_end_the_job(tmp_path, closing):
    command = scripted("all=write:3", "all=sleep:0.5", "all=write:3")
    done = launch("-np", 2, "--log-dir", tmp_path, "--tee", command=command, under=("bash", "-c", closing, "bash"))
    assert done.code == 0
    for rank in (0, 1):
        assert (tmp_path / f"attempt-0/rank-{rank}.stdout").read_text().count("line") == 6
        assert (tmp_path / f"attempt-0/rank-{rank}.stderr").exists() is False


def test_a_full_disk_does_not_end_the_job(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # children of this process cannot write to files
    try:
        running = Launched("-np", 1, "--log-dir", tmp_path, command=scripted("0=write:3", "0=exit:7"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    done = running.finish()
    assert done.code == 7 and "failed first (exit code 7)" in done.stderr
    assert re.search(r"rank-0\.std(out|err) cannot be written \(File too large\)", done.stderr)  # whichever comes first
    assert done.stdout.count("\n") == 3


def test_a_folder_for_logs_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    done = launch("-np", 1, "--log-dir", tmp_path / "file", command=scripted())
    assert done.code == 2 and f"--log-dir {tmp_path / 'file'} cannot be written: File exists" in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_logs_are_the_programs_bytes(tmp_path, workers):
    """Invalid UTF-8, long lines, line ends of Windows, progress bars. On a terminal, lines have prefixes."""
    data = b"caf\xe9 \xff\ncrlf\r\n10%%\r50%%\r100%%\n%s\n\rno end" % (b"\xe2\x98\x83" * 100_000)
    (tmp_path / "data").write_bytes(data)
    command = [sys.executable, "-c", f"import os; os.write(1, open({str(tmp_path / 'data')!r}, 'rb').read())"]
    done = launch("-np", workers, "--log-dir", tmp_path, "--tee", command=command, env={"PYTHONIOENCODING": "ascii"})
    assert done.code == 0, done.stderr
    for rank in range(workers):
        assert (tmp_path / f"attempt-0/rank-{rank}.stdout").read_bytes() == data
    if workers == 1:
        assert done.stdout == re.sub("\r\n?", "\n", data.decode("utf-8", "surrogateescape"))
    else:
        lines = ["caf\udce9 \udcff", "crlf", "100%", "☃" * 100_000, "no end"]
        expected = sorted(f"[worker {rank}] {line}" for rank in (0, 1) for line in lines)
        assert sorted(set(done.stdout.splitlines()) - {"[worker 0] ", "[worker 1] "}) == expected


def test_no_log_file_is_lost_at_the_limit_of_open_files(tmp_path):
    limited = ("bash", "-c", 'ulimit -Sn 22; exec "$@"', "bash")
    done = launch("-np", 9, "--log-dir", tmp_path, command=scripted("all=write:3", "all=exit:0"), under=limited)
    assert done.code == 0 and "raised the limit of open files from 22 to 90" in done.stderr
    for rank in range(9):
        assert (tmp_path / f"attempt-0/rank-{rank}.stdout").read_text().count("\n") == 3
        assert "exits" in (tmp_path / f"attempt-0/rank-{rank}.stderr").read_text()


# -- restarts ----------------------------------------------------------------------------------------------------------


def test_restarts_end():
    done = launch("-np", 2, "--max-restarts", 2, "--backoff-s", 0.1, command=scripted("0=exit:9"))
    assert done.code == 9
    assert done.stderr.count("worker 0 on localhost failed first (exit code 9)") == 3
    assert [float(s) for s in re.findall(r"starting again in ([\d.]+) s", done.stderr)] == [0.1, 0.2]


def test_a_restart_is_not_swept_away_by_what_ends_the_attempt_before():
    """A host that was cut off may still run the first attempt's agent, which kills all processes with its job id."""
    command = ["sh", "-c", "echo $DISTPAD_JOB; exit 9"]
    done = launch("-np", 1, "--max-restarts", 1, "--backoff-s", 0.1, command=command)
    assert done.code == 9 and len(set(done.stdout.split())) == 2


@pytest.mark.parametrize(("code", "flags"), [(2, ()), (44, ("--no-retry", "44", "--no-retry", "45"))])
def test_what_is_not_retried(code, flags):
    done = launch("-np", 2, "--max-restarts", 5, "--backoff-s", 0.1, *flags, command=scripted(f"1=exit:{code}"))
    assert done.code == code and "starting again" not in done.stderr


def test_mirrored_is_one_process():
    command = [sys.executable, "-c", "import os; print(os.environ['DISTPAD_REPLICAS'], os.environ['DISTPAD_WORKERS'])"]
    done = launch("--backend", "mirrored", "-np", 4, command=command)
    assert (done.code, done.stdout) == (0, "4 1\n")
