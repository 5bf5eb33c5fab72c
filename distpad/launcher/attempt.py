"""One attempt to run a job: start the agents, then the workers; wait until all are done or one fails; end the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from distpad.launcher import crew, discovery, hostcheck, output, render, spec, times, worker
from distpad.launcher.outcomes import HOST, LOST, TIME, Ended, Outcome, log

EVENTS = 4096  # capacity of the queue; a full queue slows the workers down


class Attempt:
    """One attempt to run a job."""

    def __init__(
        self,
        job: spec.Job,
        number: int,
        environ: Mapping[str, str],
        secrets: Mapping[str, str],
        mpi: str,
        received: list[int],
        limit: float | None,
    ) -> None:
        self.job, self.number, self.environ, self.secrets, self.mpi = job, number, environ, secrets, mpi
        self.again = number > 0  # a host that has worked before may be rebooting, and a port be held by what ends
        self.received = received  # signals; the list may grow during the attempt
        self.limit = limit
        self.times = times.here()
        self.output = output.Output(job, number)
        self.events: queue.Queue[crew.Event] = queue.Queue(EVENTS)
        self.agents: dict[str, crew.Agent] = {}
        self.engine: crew.Engine | None = None
        self.engine_code: int | None = None
        self.engine_ended = 0.0
        self.facts: dict[str, dict[str, Any]] = {}
        self.ports: dict[str, list[int]] = {}
        self.started: dict[int, str] = {}  # rank: host
        self.ends: dict[int, int] = {}  # rank: exit code
        self.failures: list[int] = []  # ranks, in the order of their ends
        self.lost: dict[str, str] = {}  # host: the reason
        self.swept: set[str] = set()
        self.ending = False
        self.discovery: discovery.Discovery | None = None
        self.looked = self.active = time.monotonic()
        self.over = threading.Event()

    def run(self) -> Outcome:
        began = time.monotonic()
        outcome = Outcome(1, "it failed inside distpad launch")
        threading.Thread(target=self.ping, daemon=True).start()
        try:
            self.start()
            outcome = self.watch()
        except Ended as ended:
            outcome = ended.outcome
        finally:
            self.end()
            self.over.set()
            self.output.close()
        self.summarise(outcome, time.monotonic() - began)
        return outcome

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
            self.discover()
        else:
            for host in job.used_hosts:
                self.add_agent(host)
            self.until(lambda: len(self.facts) == len(self.agents), job.start_timeout_s, self.silent_hosts)
            wrong = hostcheck.problems(job, self.facts)
            if wrong:
                raise Ended(Outcome(HOST, "nothing was started. " + " ".join(wrong), may_retry=False))
        if job.controller == "gloo" and not job.network_interface:
            job = self.job = dataclasses.replace(job, network_interface=self.find_interface())
        argv = render.engine_argv(job, self.mpi, is_root=os.geteuid() == 0)
        self.find_ports()
        if argv:
            for host in () if job.elastic else job.used_hosts:  # an elastic job's ranks change
                mine = {p.rank: render.rank_env(job, p, self.ports) for p in job.places if p.host == host}
                self.agents[host.name].send(do="ranks", envs=mine)
            try:
                self.engine = crew.Engine("", argv, render.engine_env(job, self.environ), self.events)
            except OSError as error:
                raise Ended(Outcome(127, f"{argv[0]} cannot be started: {error.strerror}")) from error
        else:
            self.start_workers()
        if not job.elastic:
            self.until(  # after a failure, other workers may never start
                lambda: self.failures or len(self.started) == job.workers, job.start_timeout_s, self.missing_workers
            )

    def add_agent(self, host: spec.Host) -> None:
        argv = render.agent_argv(self.job, host, self.environ)
        orders = render.orders(self.job, host, self.environ, self.secrets, self.number)
        try:
            agent = crew.Agent(host.name, argv, render.agent_env(self.environ), self.events)
        except OSError as error:
            why = f"{host.name} cannot be used: {argv[0]} cannot be started here: {error.strerror}"
            raise Ended(Outcome(HOST, f"nothing was started. {why}", may_retry=False)) from error
        agent.last_heard = time.monotonic() + self.job.start_timeout_s
        self.agents[host.name] = agent
        # an agent ignores some signals itself, so that workers cannot inherit what the launcher ignores
        ignored = [number for number in worker.FORWARDED if signal.getsignal(number) is signal.SIG_IGN]
        agent.send(**orders, ignored=ignored)

    def find_interface(self) -> str:
        """Find the interface of a job over Gloo. An elastic job assumes that later hosts resemble its first ones."""
        elsewhere = {name: each for name, each in list(self.facts.items()) if name not in spec.LOCAL}
        if not (elsewhere if self.job.elastic else self.job.crosses_hosts):
            return "lo"
        found, wrong = hostcheck.interface(elsewhere)
        if wrong:
            raise Ended(Outcome(HOST, f"nothing was started. {wrong}", may_retry=False))
        return found

    def find_ports(self) -> None:
        """Find the ports of TF_CONFIG on each host."""
        job = self.job
        if job.backend == "multiworker":
            for host in job.used_hosts:
                count = sum(place.host == host for place in job.places)
                self.agents[host.name].send(do="ports", count=count, first=job.port)
            self.until(lambda: len(self.ports) == len(self.agents), job.start_timeout_s, self.silent_hosts)

    def start_workers(self) -> None:
        """Let the agents start the workers, if the engine has no launcher of its own."""
        job = self.job
        for place in job.places:
            self.agents[place.host.name].send(do="start", env=render.rank_env(job, place, self.ports))

    def discover(self) -> None:
        """Start the discovery of an elastic job's hosts, which adds an agent for each new host."""
        pathlib.Path(render.folder(self.job)).mkdir(mode=0o700)
        self.discovery = discovery.Discovery(self.job, render.hosts_file(self.job), self.is_ready)
        try:
            self.discovery.start()
        except ValueError as error:
            raise Ended(Outcome(HOST, f"nothing was started. {error}", may_retry=False)) from error
        self.until(lambda: bool(self.facts), self.job.start_timeout_s, self.silent_hosts)

    def is_ready(self, host: spec.Host) -> bool:
        """Start an agent on a host unless it has one, and return whether it is ready. Called by another thread."""
        name = "localhost" if host.is_here else host.name
        agent = self.agents.get(name)
        if not self.ending and (agent is None or agent.process.poll() is not None):
            self.facts.pop(name, None)
            self.lost.pop(name, None)
            self.swept.discard(name)
            self.add_agent(spec.Host(name, host.slots))
        return name in self.facts

    def silent_hosts(self) -> Outcome:
        if not self.agents:
            why = "no hosts were found: the output of --host-discovery-script is empty"
            return Outcome(HOST, f"nothing was started. {why}", may_retry=False)
        silent = [host for host in self.agents if host not in self.facts] or sorted({*self.agents} - {*self.ports})
        why = hostcheck.why_no_agent(silent[0], self.job.python, list(self.agents[silent[0]].wrote), None)
        return Outcome(HOST, why, may_retry=self.again)

    def missing_workers(self) -> Outcome:
        missing = [f"{p.rank} ({p.host.name})" for p in self.job.places if p.rank not in self.started]
        why = f"not started within {self.job.start_timeout_s:g} s: worker {', '.join(missing)}"
        return Outcome(TIME, why, shows_launcher=True)

    # -- watching -----------------------------------------------------------------------------------------------------

    def watch(self) -> Outcome:
        """Wait until all workers are done. After a first failure, the others have time to report their own errors."""
        job = self.job
        if job.elastic:
            self.until(lambda: self.engine_code is not None, None, None)
            if self.engine_code:
                failed = [rank for rank in self.failures if self.ends.get(rank)]  # replaced workers do not count
                rank = failed[-1] if failed else None
                code = self.engine_code if self.engine_code > 0 else 128 - self.engine_code
                code = code if rank is None else self.ends[rank]
                return Outcome(code, self.failure(rank, "last"), rank, shows_launcher=True)
            return Outcome(0)
        self.until(lambda: self.failures or len(self.ends) == job.workers, None, None)
        if self.failures:
            end = time.monotonic() + min(job.grace_s, self.times.own_error_s)
            self.send_all(do="watch")

            def reported() -> bool:
                quiet = time.monotonic() > min(end, self.active + self.times.quiet_s)
                return quiet or len(self.ends) == job.workers

            with contextlib.suppress(Ended):  # the first failure counts, unless a lost host caused it
                self.until(reported, None, None)
            if self.lost:
                raise Ended(self.host_lost(*min(self.lost.items())))
            rank = self.failures[0]
            return Outcome(self.ends[rank], self.failure(rank, "first"), rank)
        if self.engine is not None:
            late = Outcome(TIME, f"all workers are done, but {job.launcher} did not end")
            self.until(lambda: self.engine_code is not None, max(job.grace_s, 10), lambda: late)
            if self.engine_code:
                code = self.engine_code if self.engine_code > 0 else 128 - self.engine_code
                return Outcome(code, f"all workers are done, but {job.launcher} failed", shows_launcher=True)
        return Outcome(0)

    def until(self, done: Callable[[], Any], limit_s: float | None, otherwise: Callable[[], Outcome] | None) -> None:
        """Handle events until ``done``. After ``limit_s`` seconds, end with the outcome that ``otherwise`` returns."""
        end = None if limit_s is None else time.monotonic() + limit_s
        look = 0.0
        while not done():
            with contextlib.suppress(queue.Empty):
                self.take(self.events.get(timeout=times.POLL_S))
            now = time.monotonic()
            if now < look:
                continue
            look = now + times.POLL_S  # also under a steady flow of events
            if not self.ending:
                self.pass_signals_on()
                self.look_for_lost_hosts(now)
                self.look_for_early_end(now)
                if self.limit is not None and now > self.limit:
                    running = sorted(set(self.started) - set(self.ends))
                    who = f": ending worker {', '.join(map(str, running))}" if running else ""
                    raise Ended(Outcome(TIME, f"not done after {self.job.timeout_s:g} s{who}", may_retry=False))
            if end is not None and otherwise is not None and now > end and not done():
                raise Ended(otherwise())

    def ping(self) -> None:
        """Send signs of life to the agents. Runs in a thread of its own, since a stopped terminal blocks the others."""
        while not self.over.wait(times.sign_of_life_s(self.job.lost_after_s)):
            self.send_all(do="ping")

    def take(self, event: crew.Event) -> None:
        """Handle one event."""
        host, message = event
        what, rank = message["is"], message.get("rank")
        if what in ("output", "exit", "gone", "writing"):
            self.active = time.monotonic()
        if what == "output":
            self.output.write(rank, message["stream"], message["text"].encode("utf-8", "surrogateescape"))
        elif what == "ready":
            self.facts[host] = message
        elif what == "ports":
            if not message["ports"]:
                why = hostcheck.taken(host, message["taken"], message["why"])
                raise Ended(Outcome(HOST, why, may_retry=self.again))
            self.ports[host] = message["ports"]
        elif what == "hello":
            self.take_hello(host, message)
        elif what in ("exit", "gone"):
            self.report_left(host, message)
            self.take_end(host, rank, message.get("code", 128 + signal.SIGKILL))
        elif what == "swept":
            self.swept.add(host)
            self.report_left(host, message)
        elif what in ("closed", "broken", "alone") and host:
            self.take_close(host, message)
        elif what == "closed":
            self.engine_code, self.engine_ended = message["code"], time.monotonic()

    def take_hello(self, host: str, message: Mapping[str, Any]) -> None:
        """Compare the rank, world size and host of a worker that has started with the job's topology."""
        job, rank, size = self.job, message["rank"], message["size"]
        if not job.elastic:
            places = {place.rank: place.host.name for place in job.places}
            found = f"{job.launcher} started a worker on {host} as rank {rank} of {size or 'an unknown number'}"
            if rank is None or (size is not None and size != job.workers) or rank in self.started:
                why = f"expected {job.workers} workers, but {found}: the workers would form several jobs"
                raise Ended(Outcome(HOST, why, shows_launcher=True, may_retry=False))
            if job.backend == "multiworker" and places[rank] != host:  # its TF_CONFIG has another host's address
                why = f"expected worker {rank} on {places[rank]}, but {found}. Give the hosts in {job.launcher}'s order"
                raise Ended(Outcome(HOST, why, shows_launcher=True, may_retry=False))
            planned = list(places.values())
            if sorted([*self.started.values(), host]).count(host) > planned.count(host):
                why = f"expected {planned.count(host)} workers on {host}, but {found}, one too many"
                raise Ended(Outcome(HOST, why, shows_launcher=True, may_retry=False))
        if rank is not None:
            self.started[rank] = host
            self.ends.pop(rank, None)

    def take_end(self, host: str, rank: int | None, code: int) -> None:
        if rank is None or rank in self.ends:
            return
        self.ends[rank] = code
        self.started.setdefault(rank, host)  # it may have ended before it connected
        if code and not self.ending:  # once the job ends, exit codes are no failures
            self.failures.append(rank)

    def report_left(self, host: str, message: Mapping[str, Any]) -> None:
        if message.get("left"):
            log(f"killed leftover processes on {host}: {', '.join(message['left'])}")

    def take_close(self, host: str, message: Mapping[str, Any]) -> None:
        """Handle the end of an agent, which is an error before the job ends."""
        agent = self.agents[host]
        self.swept.add(host)
        if self.ending or self.job.elastic:
            return  # a host may leave an elastic job
        if message["is"] == "broken":
            raise Ended(Outcome(HOST, f"{host} cannot be used: {message['text']}", may_retry=self.again))
        elif host not in self.facts:
            why = hostcheck.why_no_agent(host, self.job.python, list(agent.wrote), message["code"])
            raise Ended(Outcome(HOST, f"nothing was started. {why}", may_retry=self.again))
        else:
            self.lose(host, message.get("text", "the connection to its agent ended"))

    def look_for_lost_hosts(self, now: float) -> None:
        stopped_s, self.looked = now - self.looked, now
        for host, agent in list(self.agents.items()):
            if stopped_s > 1:  # the launcher itself stood still: what the agents sent since is still unread
                agent.last_heard += stopped_s
            if now > agent.last_heard + self.job.lost_after_s and host not in self.lost:
                self.lose(host, f"no answer for {now - agent.last_heard:.0f} s")

    def look_for_early_end(self, now: float) -> None:
        """Fail if the engine's launcher ended, but its workers did not report their ends within a short time."""
        if self.engine_code is None or self.job.elastic or now < self.engine_ended + times.WORKERS_HEARD_S:
            return
        if not self.failures and len(self.ends) < self.job.workers:
            code = self.engine_code if self.engine_code > 0 else 1
            why = f"{self.job.launcher} ended (exit code {self.engine_code}) before the workers were done"
            raise Ended(Outcome(code, why, shows_launcher=True))

    def lose(self, host: str, why: str) -> None:
        self.lost[host] = why
        if not self.job.elastic:
            raise Ended(self.host_lost(host, why))

    def host_lost(self, host: str, why: str) -> Outcome:
        ranks = ", ".join(str(rank) for rank, where in sorted(self.started.items()) if where == host)
        wrote = f" ({self.agents[host].wrote[-1]})" if self.agents[host].wrote else ""
        return Outcome(LOST, f"{host} was lost{wrote}, with worker {ranks or 'none'}: {why}")

    def pass_signals_on(self) -> None:
        """Forward received signals to the workers, and give them the grace period to react."""
        if not self.received:
            return
        number = self.received[0]
        log(f"got {signal.Signals(number).name}: forwarding it to the workers")
        signalled = len(self.received)
        self.send_all(do="leave")
        self.send_all(do="signal", number=number)
        self.ending = True
        end = time.monotonic() + self.job.grace_s
        while self.running() and time.monotonic() < end and len(self.received) == signalled:
            self.poll()
        raise Ended(Outcome(128 + number, f"ended by {signal.Signals(number).name}", may_retry=False))

    # -- ending -------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """End all processes: SIGTERM and SIGKILL for the workers, then the engine's launcher, then the agents."""
        self.ending = True
        if self.discovery is not None:
            self.discovery.end()
        self.send_all(do="leave")
        self.send_all(do="signal", number=signal.SIGTERM)
        grace_s = 0 if self.received else self.job.grace_s  # it has passed already, unless a second signal cut it short
        self.wait_for(lambda: not self.running(), grace_s)
        self.send_all(do="signal", number=signal.SIGKILL)
        self.wait_for(lambda: not self.running(), times.KILLED_S)
        if self.engine is not None:
            for number, seconds in (
                (None, times.ENGINE_EXIT_S),
                (signal.SIGTERM, times.ENGINE_TERM_S),
                (signal.SIGKILL, times.KILLED_S),
            ):
                if number and self.engine_code is None:
                    self.engine.kill(number)
                self.wait_for(lambda: self.engine_code is not None, seconds)
        self.send_all(do="end", grace_s=0)
        self.wait_for(lambda: set(self.agents) <= self.swept | {*self.lost}, times.SWEPT_S)
        for agent in list(self.agents.values()):
            with contextlib.suppress(OSError):
                agent.process.stdin.close()  # type: ignore[union-attr]
        self.wait_for(
            lambda: all(a.process.poll() is not None for h, a in self.agents.items() if h not in self.lost),
            times.AGENT_GONE_S,
        )
        for agent in list(self.agents.values()):
            agent.kill(signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.rmdir(render.folder(self.job))

    def running(self) -> set[int]:
        """The ranks that have started, have not ended, and are not on a lost host."""
        return {rank for rank, host in self.started.items() if rank not in self.ends and host not in self.lost}

    def wait_for(self, done: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done() and time.monotonic() < end:
            self.poll()

    def poll(self) -> None:
        with contextlib.suppress(queue.Empty, Ended):
            self.take(self.events.get(timeout=times.POLL_S))

    def send_all(self, **message: Any) -> None:
        for host, agent in list(self.agents.items()):
            if host not in self.lost:
                agent.send(**message)

    # -- reporting ----------------------------------------------------------------------------------------------------

    def failure(self, rank: int | None, which: str) -> str:
        if rank is None:
            return f"{self.job.launcher} failed (exit code {self.engine_code})"
        code = self.ends[rank]
        how = f"exit code {code}"
        if code > 128:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(code - 128).name}, {how}"
        return f"worker {rank} on {self.started[rank]} failed {which} ({how})"

    def summarise(self, outcome: Outcome, seconds: float) -> None:
        """Report the worker that failed first, its last lines, and the folder of all output."""
        if not outcome.code:
            log(f"done in {seconds:.0f} s")
            return
        log(f"{outcome.why}, after {seconds:.1f} s")
        rank = outcome.rank
        lines = list(self.output.last.get(rank, [])) if rank is not None or outcome.shows_launcher else []
        if rank is not None and not lines:  # it may have ended before it connected; its output then came from its agent
            lines = list(self.agents[self.started[rank]].wrote)
        if lines:
            log(f"last lines of {f'worker {outcome.rank}' if outcome.rank is not None else self.job.launcher}:")
            for line in lines:
                log(f"  | {line}")
        failed = [rank for rank in dict.fromkeys(self.failures) if rank != outcome.rank and rank in self.ends]
        others = [f"worker {rank} (exit code {self.ends[rank]})" for rank in failed]
        if others and outcome.rank is not None:
            log(f"then failed: {', '.join(others)}")
        if self.output.folder:
            log(f"full output: {self.output.folder}")
