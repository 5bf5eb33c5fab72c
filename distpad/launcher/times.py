"""How long the launcher and the pods' entry point wait: all periods and limits that no option sets, in seconds.

``DISTPAD_TIME_SCALE`` multiplies the fields of ``Times``, on every host of a job: 3 for a network that stalls longer
than a host may be silent, 0.2 for tests. The constants below do not scale, since they bound work, not patience.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping

SCALE = "DISTPAD_TIME_SCALE"

POLL_S = 0.1  # between two looks at what has happened
JOIN_AGAIN_S = 0.5  # between two attempts of a pod to reach the others
DISCOVERY_LIMIT_S = 10.0  # one run of --host-discovery-script
AGENT_WITHIN_S = 60.0  # an elastic job's agent may come after its host's first worker
ANSWER_S = 5.0  # an ssh server's greeting
LEFTOVERS_S = 2.0  # for pipes that a child of the command still holds
FLUSH_S = 2.0  # the last messages of a connection
WORKERS_HEARD_S = 2.0  # within which workers' ends are heard after their engine's
KILLED_S = 2.0  # within which processes are gone that were killed
SWEPT_S = 6.0  # within which an agent has ended what the job left on its host
AGENT_GONE_S = 3.0  # within which an agent ends after its last message
ENGINE_EXIT_S = 3.0  # an engine's launcher may clean up after its workers, ...
ENGINE_TERM_S = 6.0  # and again after SIGTERM
LONGEST_BACKOFF_S = 60.0  # between two attempts


@dataclasses.dataclass(frozen=True)
class Times:
    """Patience and periods, before they are scaled."""

    beat_s: float = 2.0  # between two signs of life of an agent or a pod
    ping_s: float = 5.0  # between two signs of life of the launcher
    agent_lost_s: float = 15.0  # the launcher gives up an agent that is silent for this long
    lost_s: float = 20.0  # agents give up a launcher, and pods one another, after this silence
    own_error_s: float = 10.0  # at most, for the others to report what they see of a first failure
    report_s: float = 15.0  # between two reports of whom a pod waits for
    discovery_s: float = 1.0  # between two runs of --host-discovery-script
    look_s: float = 0.5  # between two looks at pods that are not there yet


def scaled(environ: Mapping[str, str]) -> Times:
    """The times under these variables.

    Raises:
      ValueError: DISTPAD_TIME_SCALE is no number from 0.01 to 100.
    """
    text = environ.get(SCALE) or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.01 <= scale <= 100:
        raise ValueError(f"launch: {SCALE} is {text!r}, expected a number from 0.01 to 100.")
    return Times(*(scale * value for value in dataclasses.astuple(Times())))


@functools.cache
def here() -> Times:
    """This process's times."""
    return scaled(os.environ)
