"""A job as text: its command lines and variables, without its secrets."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from distpad.launcher import gpus, render, spec


def describe(job: spec.Job, environ: Mapping[str, str], secrets: Mapping[str, str], mpi: str = "") -> Iterator[str]:
    """Yield the lines of ``--dry-run``: the commands that ``run`` starts, in shell syntax.

    Args:
      job: the job.
      environ: the launcher's environment.
      secrets: the secrets' values, which the text hides.
      mpi: as in ``render.engine_argv``.
    """
    for host in job.used_hosts:
        yield f"# the agent of {host.name}"
        yield shlex.join(render.agent_argv(job, host, environ))
    argv = render.engine_argv(job, mpi)
    if job.launcher == "mpirun" and not mpi:
        yield "# mpirun was not found here: these are the options of Open MPI 4"
    yield f"# the workers, by {job.launcher}" if argv else f"# the workers, {len(job.places)}, started by the agents"
    yield shlex.join(argv or render.worker_argv(job))
    yield f"# the command, in each worker, in {shlex.quote(job.cwd)}"
    yield shlex.join(job.command)
    for host in job.used_hosts:
        yield f"# its variables on {host.name}, besides the engine's" + ("" if host.is_here else " and the login's")
        for name, value in sorted(render.worker_env(job, host, environ, secrets).items()):
            yield f"{name}={shlex.quote(render.redacted(name, value, secrets))}"
        if job.hides_gpus:
            here = environ if host.is_here else {}
            count = job.slots_per_host or 1 if job.elastic else sum(place.host == host for place in job.places)
            yield f"# CUDA_VISIBLE_DEVICES of its workers on {host.name}, by local rank"
            yield " ".join(gpus.of_worker(job.gpus_each, rank, here) for rank in range(count))
    if not argv:
        ports = {host.name: range(job.port or 2222, 65535) for host in job.used_hosts}
        yield "# further variables of worker 0" + ("" if job.port else " (each start finds free ports)")
        for name, value in render.rank_env(job, job.places[0], ports).items():
            yield f"{name}={shlex.quote(value)}"
