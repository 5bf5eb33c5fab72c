"""One attempt to run a job: start the agents, then the workers; wait until all are done or one fails; end the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distpad.launcher import checks, crew, discovery, outcomes, output, processes, render, spec, times
from distpad.launcher.outcomes import HOST, LOST, TIME, Ended, log

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # by workers
EVENTS = 4096  # capacity of the queue; a full queue slows the workers down


@dataclasses.dataclass(eq=False)
class Attempt:
    """One attempt to run a job. Its state follows from the agents' messages, which `take` handles.

    Args:
      job: the job.
      number: of the attempt, from 0.
      environ, secrets: the launcher's variables and the secrets' values.
      mpi: the first line of ``mpirun --version``.
      received: signals; the list may grow during the attempt.
      limit: the end of the job's time, by the monotonic clock.
    """

    job: spec.Job
    number: int
    environ: Mapping[str, str]
    secrets: Mapping[str, str]
    mpi: str
    received: list[int]
    limit: float = math.inf

    def __post_init__(self) -> None:
        self.output = output.Output(self.job, self.number)
        self.events: queue.Queue[crew.Event] = queue.Queue(EVENTS)
        self.agents: dict[str, crew.Member] = {}
        self.engine: crew.Member | None = None
        self.engine_code: int | None = None
        self.engine_ended = 0.0
        self.discovering: threading.Thread | None = None
        self.slots = 0  # of an elastic job's hosts that are ready
        self.facts: dict[str, dict[str, Any]] = {}  # of each host whose agent is ready
        self.lost: dict[str, str] = {}  # host: the reason
        self.joined: set[str] = set()  # hosts that were ready, and that an elastic job has not dropped since
        self.busy: set[str] = set()  # hosts on which an earlier job still runs
        self.started: dict[int, str] = {}  # rank: host
        self.ends: dict[int, int] = {}  # rank: exit code
        self.failures: list[int] = []  # ranks, in the order of their ends
        self.ending = False  # from then on, exit codes and lost hosts are no failures
        # the last check of all hosts, the last sign that workers work, the last report of missing hosts
        self.looked = self.active = self.reported = time.monotonic()
        self.over = threading.Event()

    def run(self) -> Ended:
        began = time.monotonic()
        ended = Ended(1, "it failed inside distpad launch")
        threading.Thread(target=self.ping, daemon=True).start()
        try:
            self.start()
            ended = self.watch()
        except Ended as error:
            ended = error
        finally:
            self.end()
            self.over.set()
            self.output.close()
        self.summarise(ended, time.monotonic() - began)
        return ended

    # -- starting -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        job = self.job
        by = f" by {job.launcher}" if job.launcher != "ssh" or job.crosses_hosts else ""
        where = ", ".join(f"{host.name}:{host.slots}" for host in job.used_hosts)
        count = f"{job.workers} worker{'s' * (job.workers > 1)} ({where})"
        if job.elastic:
            count = f"{job.min_np} to {job.max_np} workers on discovered hosts"
        log(f"starting {job.command[0]} on {count}{by}")
        if job.elastic:
            self.start_discovery()
        else:
            self.until(lambda: self.are_ready(job.used_hosts), job.start_timeout_s, self.silent_hosts)
            if wrong := checks.problems(job, self.facts):
                raise self.refused(" ".join(wrong))
            for host, found in self.facts.items():
                for taken in checks.ports(found):
                    raise self.refused(f"on {host}, {taken.evidence}. {taken.remedy}", again=True)
        if job.controller == "gloo" and not job.network_interface:
            job = self.job = dataclasses.replace(job, network_interface=self.find_interface())
        self.start_workers()
        if not job.elastic:  # after a failure, other workers may never start
            have_all = lambda: self.failures or len(self.started) == job.workers
            self.until(have_all, job.start_timeout_s, self.missing_workers)

    def start_workers(self) -> None:
        """Start the engine's launcher, or let the agents start the workers."""
        job, argv = self.job, render.engine_argv(self.job, self.mpi)
        ports = {host: found["ports"]["found"] for host, found in self.facts.items()}
        for host in () if job.elastic else job.used_hosts:  # an elastic job's ranks change
            mine = {p.rank: render.rank_env(job, p, ports) for p in job.places if p.host == host}
            self.agents[host.name].send(do="ranks" if argv else "start", envs=mine)
        if argv:
            try:
                self.engine = crew.Member("", argv, render.engine_env(job, self.environ), self.events)
            except OSError as error:
                raise Ended(127, f"{argv[0]} cannot be started: {error.strerror}") from error

    def are_ready(self, found: Sequence[spec.Host]) -> bool:
        """Start an agent on each host that has none, and return whether all are ready."""
        silent = [host.name for host in found if not self.is_ready(host)]
        if silent and time.monotonic() > self.reported + times.here().report_s:
            self.reported = time.monotonic()
            log(f"waiting for {outcomes.few(silent)}")
        return not silent

    def is_ready(self, host: spec.Host) -> bool:
        """Start an agent on a host unless it has one, and return whether it is ready. Called by another thread."""
        name = "localhost" if self.job.elastic and host.is_here else host.name
        before = self.agents.get(name)
        gone = before is not None and before.process.poll() is not None
        if self.ending or not (before is None or (gone and time.monotonic() > before.began + times.here().discovery_s)):
            return name in self.facts
        self.facts.pop(name, None)
        self.lost.pop(name, None)
        argv = render.agent_argv(self.job, host, self.environ)
        try:
            agent = crew.Member(name, argv, render.agent_env(self.environ), self.events)
        except OSError as error:
            why = f"{name} cannot be used: {argv[0]} cannot be started here: {error.strerror}"
            raise self.refused(why) from error
        agent.wrote.extend(before.wrote if before else ())  # perhaps why it is not ready
        agent.last_heard = agent.began + self.job.start_timeout_s
        self.agents[name] = agent
        # an agent ignores some signals itself, so that workers cannot inherit what the launcher ignores
        ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
        agent.send(**render.orders(self.job, host, self.environ, self.secrets, self.number), ignored=ignored)
        return False

    def find_interface(self) -> str:
        """Find the interface of a job over Gloo. An elastic job assumes that later hosts resemble its first ones."""
        elsewhere = {name: each for name, each in list(self.facts.items()) if name not in spec.LOCAL}
        if not (elsewhere if self.job.elastic else self.job.crosses_hosts):
            return "lo"
        found, wrong = checks.interface(elsewhere)
        if wrong:
            raise self.refused(wrong)
        return found

    def start_discovery(self) -> None:
        """Discover an elastic job's hosts once, unless it waits for hosts, and start the thread that repeats it."""
        file = pathlib.Path(render.hosts_file(self.job))
        file.parent.mkdir(mode=0o700)
        try:
            self.slots = self.write_hosts(file) if not self.job.waits else 0
        except ValueError as error:
            raise self.refused(str(error)) from error
        self.discovering = threading.Thread(target=self.keep_discovering, args=[file], daemon=True)
        self.discovering.start()
        least = (self.job.min_np or 1) if self.job.waits else 1
        self.until(lambda: self.slots >= least, self.job.start_timeout_s, self.silent_hosts)

    def write_hosts(self, file: pathlib.Path) -> int:
        """Write the file of the discovered hosts whose agents are ready, and return the number of their slots."""
        ready = [host for host in discovery.discover(self.job) if self.is_ready(host)]
        discovery.write(file, ready)
        return sum(host.slots for host in ready)

    def keep_discovering(self, file: pathlib.Path) -> None:
        while not self.ending:
            with contextlib.suppress(ValueError, OSError, Ended):  # keep the last known hosts
                self.slots = self.write_hosts(file)
            time.sleep(times.here().discovery_s)

    def refused(self, why: str, *, again: bool = False) -> Ended:
        """The end of an attempt that cannot start. With ``again``, attempts after the first may be repeated: a host
        that has worked before may be rebooting, and what ends may still hold a port."""
        return Ended(HOST, f"nothing was started. {why}", may_retry=again and self.number > 0)

    def silent_hosts(self) -> Ended:
        if not self.agents:
            return self.refused("no hosts were found: the output of --host-discovery-script is empty")
        for host in self.agents.keys() - self.facts.keys():
            return self.no_agent(host, None)
        return self.refused(f"the hosts are {', '.join(self.agents)}, expected slots for {self.job.min_np} workers.")

    def no_agent(self, host: str, code: int | None) -> Ended:
        why = crew.unreachable(self.agents[host], self.job.python, code, self.job.start_timeout_s)
        return self.refused(f"{host} cannot be used: {why['unreachable']}. {why['remedy']}", again=True)

    def missing_workers(self) -> Ended:
        missing = [f"{p.rank} ({p.host.name})" for p in self.job.places if p.rank not in self.started]
        why = f"not started within {self.job.start_timeout_s:g} s: worker {', '.join(missing)}"
        return Ended(TIME, why, shows_launcher=True)

    # -- watching -----------------------------------------------------------------------------------------------------

    def watch(self) -> Ended:
        """Wait until all workers are done, or one has failed."""
        job = self.job
        if job.elastic:
            self.until(lambda: self.engine_code is not None)
        else:
            self.until(lambda: self.failures or len(self.ends) == job.workers)
        if self.failures and not job.elastic:
            return self.first_failure()
        if self.engine is not None:
            late = Ended(TIME, f"all workers are done, but {job.launcher} did not end")
            self.until(lambda: self.engine_code is not None, max(job.grace_s, 10), lambda: late)
        if not self.engine_code:
            return Ended(0)
        failed = [rank for rank in self.failures if self.ends.get(rank)]  # replaced workers do not count
        if failed:
            return Ended(self.ends[failed[-1]], self.failure(failed[-1], "last"), failed[-1], shows_launcher=True)
        why = f"{job.launcher} failed (exit code {self.engine_code})"
        why = why if job.elastic else f"all workers are done, but {why}"
        return Ended(abs(self.engine_code) + 128 * (self.engine_code < 0), why, shows_launcher=True)

    def first_failure(self) -> Ended:
        """The first failure, after a time for the others to report their own errors: shorter if they are idle."""
        scaled = times.here()
        end = time.monotonic() + min(self.job.grace_s, scaled.own_error_s)
        self.send_all(do="watch")

        def reported() -> bool:
            quiet = time.monotonic() > min(end, self.active + scaled.quiet_s)
            return quiet or len(self.ends) == self.job.workers

        with contextlib.suppress(Ended):  # the first failure counts, unless a lost host caused it
            self.until(reported)
        if self.lost:
            return self.host_lost(min(self.lost))
        rank = self.failures[0]
        return Ended(self.ends[rank], self.failure(rank, "first"), rank)

    def until(
        self, done: Callable[[], Any], limit_s: float = math.inf, otherwise: Callable[[], Ended] | None = None
    ) -> None:
        """Handle events until ``done`` or the time limit, after which the result of ``otherwise`` is raised."""
        end, look = time.monotonic() + limit_s, 0.0
        while not done():
            with contextlib.suppress(queue.Empty, *([Ended] if self.ending else [])):
                self.take(self.events.get(timeout=times.POLL_S))
            now = time.monotonic()
            if now > look:  # also under a steady flow of events
                look = now + times.POLL_S
                if not self.ending:
                    self.look(now)
                if now > end and not done():
                    if otherwise is not None:
                        raise otherwise()
                    return

    def look(self, now: float) -> None:
        """Look for what no event tells: signals, silent hosts, an engine that ended early, the end of the time."""
        if self.received:
            self.pass_signals_on()
        stopped_s, self.looked = now - self.looked, now
        for host, agent in list(self.agents.items()):
            if stopped_s > 1:  # the launcher itself stood still: what the agents sent since is still unread
                agent.last_heard += stopped_s
            if now > agent.last_heard + self.job.lost_after_s and host not in self.lost:
                self.lose(host, f"no answer for {now - agent.last_heard:.0f} s")
        unfinished = not self.job.elastic and not self.failures and len(self.ends) < self.job.workers
        if unfinished and self.engine_code is not None and now > self.engine_ended + times.WORKERS_HEARD_S:
            why = f"{self.job.launcher} ended (exit code {self.engine_code}) before the workers were done"
            raise Ended(max(1, self.engine_code), why, shows_launcher=True)
        if now > self.limit:
            running = ", ".join(map(str, sorted(self.running())))
            who = f": ending worker {running}" if running else ""
            raise Ended(TIME, f"not done after {self.job.timeout_s:g} s{who}", may_retry=False)

    def pass_signals_on(self) -> None:
        """Forward received signals to the workers, and give them the grace period to react."""
        number, count = self.received[0], len(self.received)
        log(f"got {signal.Signals(number).name}: forwarding it to the workers")
        self.send_all(do="signal", number=number)
        self.ending = True
        self.until(lambda: not self.running() or len(self.received) > count, self.job.grace_s)
        raise Ended(128 + number, f"ended by {signal.Signals(number).name}", may_retry=False)

    def ping(self) -> None:
        """Send signs of life to the agents. Runs in a thread of its own, since a stopped terminal blocks the others."""
        while not self.over.wait(times.sign_of_life_s(self.job.lost_after_s)):
            self.send_all(do="ping")

    # -- events -------------------------------------------------------------------------------------------------------

    def take(self, event: crew.Event) -> None:
        """Handle one event."""
        host, message = event
        what, rank = message["is"], message.get("rank")
        if what in ("output", "exit", "gone", "writing"):
            self.active = time.monotonic()
        if message.get("left"):
            log(f"killed leftover processes on {host}: {', '.join(message['left'])}")
        if what == "output":
            self.output.write(rank, message["stream"], message["text"].encode("utf-8", "surrogateescape"))
        elif what == "ready":
            self.facts[host] = message["facts"]
            self.joined.add(host)
        elif what == "busy" and host not in self.busy:
            self.busy.add(host)
            log(f"waiting for {message['text']} to end on {host}")
        elif what == "stopped":
            log(f"worker {rank} on {host} has been stopped (SIGSTOP) for {message['seconds']:.0f} s: killing it")
        elif what == "hello":
            self.take_hello(host, rank, message["size"])
        elif what in ("exit", "gone") and rank is not None and rank not in self.ends:
            self.ends[rank] = message.get("code", 128 + signal.SIGKILL)
            self.started.setdefault(rank, host)  # it may have ended before it connected
            if self.ends[rank] and not self.ending:
                self.failures.append(rank)
        elif what in ("closed", "broken", "alone") and host:
            self.take_close(host, message)
        elif what == "closed":
            self.engine_code, self.engine_ended = message["code"], time.monotonic()

    def take_hello(self, host: str, rank: int | None, size: int | None) -> None:
        """Note a worker that has started. The library compares the rest of the topology when it starts its engine."""
        if not self.job.elastic and (rank is None or rank in self.started or size not in (None, self.job.workers)):
            found = f"{self.job.launcher} started a worker on {host} as rank {rank} of {size or 'an unknown number'}"
            why = f"expected {self.job.workers} workers, but {found}: the workers would form several jobs"
            raise Ended(HOST, why, shows_launcher=True, may_retry=False)
        if rank is not None:
            self.started[rank] = host
            self.ends.pop(rank, None)

    def take_close(self, host: str, message: Mapping[str, Any]) -> None:
        """Handle the end of an agent, which is an error before the job ends."""
        if self.ending or (self.job.waits and host not in self.facts and host not in self.joined):
            return  # it may not have started yet
        if self.job.elastic:
            return self.drop(host)
        if message["is"] == "broken":
            raise self.refused(f"{host} cannot be used: {message['text']}", again=True)
        if host not in self.facts:
            raise self.no_agent(host, message["code"])
        self.lose(host, message.get("text", "the connection to its agent ended"))

    def lose(self, host: str, why: str) -> None:
        self.lost[host] = why
        if not self.job.elastic:
            raise self.host_lost(host)
        self.agents[host].kill(signal.SIGKILL)  # the event "closed" follows

    def drop(self, host: str) -> None:
        """Let an elastic job go on without a host whose agent has ended, until a new agent is ready there.

        horovodrun waits for the end of its workers, of which their connections would tell nothing for hours.
        """
        if host in self.joined:
            self.joined.discard(host)
            why = self.lost.setdefault(host, "the connection to its agent ended")
            log(f"{host} was lost: {why}. The job goes on without it")
            if self.agents[host].process.poll() is not None:  # else a new agent has been started already
                self.facts.pop(host, None)
            if self.engine is not None:
                processes.kill(processes.connections(self.engine.process.pid, host))

    def host_lost(self, host: str) -> Ended:
        ranks = ", ".join(str(rank) for rank, where in sorted(self.started.items()) if where == host)
        wrote = f" ({self.agents[host].wrote[-1]})" if self.agents[host].wrote else ""
        return Ended(LOST, f"{host} was lost{wrote}, with worker {ranks or 'none'}: {self.lost[host]}")

    # -- ending -------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End all processes: the workers after their grace period, then the engine's launcher, then the agents."""
        self.ending = True
        if self.discovering is not None:
            self.discovering.join(times.DISCOVERY_LIMIT_S)
        grace_s = 0 if self.received else self.job.grace_s  # it has passed already, unless a second signal cut it short
        self.send_all(do="end", grace_s=grace_s)
        self.until(lambda: not self.running(), grace_s + times.KILLED_S)
        waits = {0: times.ENGINE_EXIT_S, signal.SIGTERM: times.ENGINE_TERM_S, signal.SIGKILL: times.KILLED_S}
        for number, seconds in waits.items():
            if self.engine is not None and self.engine_code is None:
                self.engine.kill(number)  # 0 is no signal
                self.until(lambda: self.engine_code is not None, seconds)
        agents = dict(self.agents)
        for agent in agents.values():
            agent.close()
        left = [agent for host, agent in agents.items() if host not in self.lost]
        self.until(lambda: all(agent.process.poll() is not None for agent in left), times.AGENT_ENDS_S)
        for agent in agents.values():
            agent.kill(signal.SIGKILL)
        with contextlib.suppress(OSError):
            pathlib.Path(render.hosts_file(self.job)).unlink(missing_ok=True)
            os.rmdir(render.folder(self.job))

    def running(self) -> set[int]:
        """The ranks that have started, have not ended, and are not on a lost host."""
        return {rank for rank, host in self.started.items() if rank not in self.ends and host not in self.lost}

    def send_all(self, **message: Any) -> None:
        for host, agent in list(self.agents.items()):
            if host not in self.lost:
                agent.send(**message)

    # -- reporting ----------------------------------------------------------------------------------------------------

    def failure(self, rank: int, which: str) -> str:
        code = self.ends[rank]
        how = f"exit code {code}"
        with contextlib.suppress(ValueError):
            how = f"signal {signal.Signals(code - 128).name}, {how}"
        return f"worker {rank} on {self.started[rank]} failed {which} ({how})"

    def summarise(self, ended: Ended, seconds: float) -> None:
        """Report the worker that failed first, its last lines, and the folder of all output."""
        if not ended.code:
            log(f"done in {seconds:.0f} s")
            return
        log(f"{ended.why}, after {seconds:.1f} s")
        rank = ended.rank
        lines = list(self.output.last.get(rank, [])) if rank is not None or ended.shows_launcher else []
        if rank is not None and not lines:  # it may have ended before it connected; its output then came from its agent
            lines = list(self.agents[self.started[rank]].wrote)
        if lines:
            log(f"last lines of {self.job.launcher if rank is None else f'worker {rank}'}:")
            for line in lines:
                log(f"  | {line}")
        others = [each for each in dict.fromkeys(self.failures) if each != rank and each in self.ends]
        if others and rank is not None:
            log(f"then failed: {', '.join(f'worker {each} (exit code {self.ends[each]})' for each in others)}")
        if self.output.folder:
            log(f"full output: {self.output.folder}")
