"""A worker without TensorFlow that follows a script: scripted_worker.py RANK=ACTION ...  (RANK may be "all")

Actions: exit:N, kill, sleep:S, ignore-terms (SIGTERM, SIGINT), leave-child, escape:S (leaves a sleep of S seconds),
report (arguments, variables, folder as JSON), ignores:SIGNAL (prints whether), fail-once, hang-once, write:N (lines),
chatter:S (a line each 20 ms), save:S (writes a file for S seconds), save-on-term:S (takes S seconds). They run in
order. Before the first action that takes time, it creates a file in DISTPAD_MARK, named by its process id, for the
tests.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

RANKS = ("DISTPAD_RANK", "HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
RANK = next(os.environ[name] for name in RANKS if name in os.environ)


def mark_started() -> None:
    with contextlib.suppress(OSError):  # the test may have stopped waiting
        open(os.path.join(os.environ.get("DISTPAD_MARK", "/nowhere"), str(os.getpid())), "w").close()


def do(what: str) -> None:
    name, _, value = what.partition(":")
    if name == "exit":
        print(f"rank {RANK} exits with {value}", file=sys.stderr, flush=True)
        sys.exit(int(value))
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "sleep":
        mark_started()
        time.sleep(float(value))
    elif name == "ignore-terms":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print("ignoring", flush=True)
    elif name == "leave-child":  # in another group and session, with the pipes open
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    elif name == "escape":  # from group, session and environment
        subprocess.Popen(["setsid", "env", "-i", "sleep", value], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.2)
    elif name == "report":
        print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}), flush=True)
    elif name == "ignores":
        print(value, signal.getsignal(getattr(signal, value)) == signal.SIG_IGN, flush=True)
    elif name == "fail-once":
        print(f"attempt {os.environ['DISTPAD_ATTEMPT']}", flush=True)
        sys.exit(9 if os.environ["DISTPAD_ATTEMPT"] == "0" else 0)
    elif name == "save":
        with open(os.devnull, "wb", buffering=0) as file:
            for _ in range(int(float(value) * 10)):
                file.write(bytes(1 << 20))
                time.sleep(0.1)
        print("saved", flush=True)
    elif name == "hang-once" and os.environ["DISTPAD_ATTEMPT"] == "0":
        mark_started()
        time.sleep(600)
    elif name == "write":
        for i in range(int(value)):
            print(f"{RANK} line {i} " + "x" * 100)
    elif name == "chatter":
        mark_started()
        for i in range(int(value) * 50):
            print(f"{RANK} step {i}", flush=True)
            time.sleep(0.02)
    elif name == "save-on-term":
        got: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
        mark_started()
        while not got:
            time.sleep(0.05)
        end = time.monotonic() + float(value)
        while time.monotonic() < end:
            time.sleep(0.05)
        print(f"got {len(got)} SIGTERM, saved", flush=True)
    elif name != "hang-once":
        raise ValueError(what)


for word in sys.argv[1:]:
    who, equals, what = word.partition("=")
    if equals and who in (RANK, "all"):
        do(what)
