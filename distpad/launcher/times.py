"""Periods and time limits of the launcher and the pods' entry point, in seconds, as far as no option sets them.

``DISTPAD_TIME_SCALE`` multiplies the fields of ``Times`` on every host of a job: 3 for a slow network, 0.2 for tests.
The constants do not scale, since they limit local work.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping

SCALE = "DISTPAD_TIME_SCALE"

POLL_S = 0.1  # period of the launcher's event loop
JOIN_AGAIN_S = 0.5  # between two attempts of a pod to reach the others
DISCOVERY_LIMIT_S = 10.0  # one run of --host-discovery-script
AGENT_WITHIN_S = 60.0  # for an agent to listen; in an elastic job, a host's first worker may start earlier
ANSWER_S = 5.0  # for the greeting of an ssh server
LEFTOVERS_S = 2.0  # for pipes that a child of the command still holds open
WORKERS_HEARD_S = 2.0  # for the exit messages of workers after the exit of their engine's launcher
KILLED_S = 2.0  # for killed processes to disappear
SIGN_OF_LIFE_S = 5.0  # between two of the launcher or an agent; less for a short --lost-after-s
AGENT_ENDS_S = 9.0  # for an agent to kill leftover processes on its host, and to exit
ENGINE_EXIT_S = 3.0  # for an engine's launcher to clean up after its workers
ENGINE_TERM_S = 6.0  # for an engine's launcher to end after SIGTERM
LONGEST_BACKOFF_S = 60.0  # maximum pause between two attempts


@dataclasses.dataclass(frozen=True)
class Times:
    """Periods and time limits that scale."""

    lost_s: float = 8.0  # a silent pod of an Indexed Job is lost; TensorFlow ends its training after 10 s
    own_error_s: float = 10.0  # maximum for the other workers to report their own errors after a first failure
    quiet_s: float = 2.0  # less, once they write nothing for this long
    report_s: float = 15.0  # between two reports of missing pods
    discovery_s: float = 1.0  # between two runs of --host-discovery-script
    restart_s: float = 30.0  # for Kubernetes to restart a pod because another one was terminated
    look_s: float = 0.5  # between two checks for missing pods, or for files that workers write


def scaled(environ: Mapping[str, str]) -> Times:
    """The times, scaled by DISTPAD_TIME_SCALE.

    Raises:
      ValueError: DISTPAD_TIME_SCALE is not a number from 0.01 to 100.
    """
    text = environ.get(SCALE) or "1"
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0.01 <= scale <= 100:
        raise ValueError(f"launch: {SCALE} is {text!r}, expected a number from 0.01 to 100.")
    return Times(*(scale * value for value in dataclasses.astuple(Times())))


def sign_of_life_s(lost_after_s: float) -> float:
    """The period of the launcher's and the agents' signs of life."""
    return min(SIGN_OF_LIFE_S, lost_after_s / 4)


@functools.cache
def here() -> Times:
    """This process's times."""
    return scaled(os.environ)
