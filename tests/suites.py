"""The suites of tests/run.sh: what each runs, and what it costs."""

from __future__ import annotations

import pathlib
import re
from typing import NamedTuple

TESTS = pathlib.Path(__file__).resolve().parent

PYTEST = 'python -m pytest --junitxml="$REPORT"'
SCRIPTS = r"git ls-files | grep -E '\.(sh|sbatch)$|^\.ci/run$' | xargs shellcheck -x -P SCRIPTDIR"
OPENMPI5 = "launch/environment.sh {} --openmpi5 --horovod >&2"
TOOLS = "tests/k8s/tools.sh"
NIGHTLY = f'folder=$(tests/nightly/install.sh) && PYTHONPATH="$folder:$PYTHONPATH" {PYTEST} tests/nightly'
LAUNCH = "tests/launch --ignore tests/launch/test_launcher.py"


class Suite(NamedTuple):
    """One row. The command runs in the checkout, with the environment's programs first on PATH."""

    name: str
    stack: str
    cores: float  # that it keeps busy: less than one where it mostly waits
    seconds: int  # that it takes by default on a free machine: the longest start first
    limit: int  # minutes after which it is ended
    command: str  # by default; "" where it runs under --all alone
    under_all: str = ""  # where that is another: marks and modules are chosen here, wide tests by tests/conftest.py


def together(count: int) -> str:
    """So many tests at once, where they wait more than they compute: those of one xdist_group one after the other."""
    return f"{PYTEST} -n {count} --dist loadgroup"


def world(spec: str, *arguments: str) -> str:
    """The tests of tests/replicas and tests/workers in an engine, with so many replicas."""
    return " ".join(["python tests/worlds.py", spec, *arguments, '--junitxml="$REPORT"'])


def with_tensorflow(folder: str) -> list[str]:
    """The modules of a folder that use TensorFlow or Keras: the others need one stack, since both are Python 3.11."""
    uses = re.compile(r"\b(tf|tensorflow|keras)\.\w|\bimport (tensorflow|keras)\b")
    paths = sorted((TESTS / folder).rglob("test_*.py"))
    return [f"tests/{path.relative_to(TESTS)}" for path in paths if uses.search(path.read_text(encoding="utf-8"))]


def core(name: str, stack: str, cores: float, seconds: int, also: str = "") -> Suite:
    """An engine or a number of replicas of which the core is enough by default, since another suite has all of it."""
    expression = f'-k "core or {also}"' if also else "-m core"
    return Suite(name, stack, cores, seconds, 30, world(name, expression), world(name))


KERAS = "keras or optimizer or test_fit or predicting"  # what runs fit: Keras 2 and 3 go ways of their own there
# what takes long to trace, and is in Keras 2 as in Keras 3, or the same under each engine
LONG = (
    "any_nest or do_not_wait or weights_are_a_tensor or fit_with_batch_normalization or fit_names or next_epoch or "
    "each_output or collectives_of_a_plain"
)
ALIKE = "test_fit_counts or workers_continue"  # on several workers in both
# what replicas of one worker show for the workers of other engines too, but for its core
SHARED = "test_ctc or every_loss or test_fit_ctc or minimal or layers_certified or predicting or metrics"
SEVERAL = f"workers or {KERAS}"  # what several workers of a strategy do otherwise than several replicas of one worker
SUITES = [
    Suite("lint", "current", 1, 15, 5, f"ruff check . && ruff format --check . && mypy distpad && {SCRIPTS}"),
    Suite("single", "current", 1, 130, 15, f"{PYTEST} tests/single"),
    Suite("docs", "current", 1, 70, 15, f"{PYTEST} tests/docs"),
    Suite("mirrored:2", "current", 1, 150, 30, world("mirrored:2")),
    core("multiworker:2", "current", 1.5, 110, SEVERAL),
    core("horovod:2", "current", 1.5, 150, f"not ({SHARED})"),
    core("local", "current", 1, 10),
    core("onedevice", "current", 1, 10),
    Suite("mirrored:1", "current", 1, 0, 30, "", world("mirrored:1")),
    core("mirrored:4", "current", 1, 30),
    core("horovod:3", "current", 2, 30),
    core("mpirun:2", "current", 1.5, 40),
    Suite("examples", "current", 1, 170, 40, f"{PYTEST} tests/examples"),
    Suite("nightly", "current", 1, 20, 10, NIGHTLY, f"{NIGHTLY} tests/single/backends/test_keras_masks.py"),
    Suite("launch", "current", 1.5, 80, 20, f"{together(2)} {LAUNCH}"),
    Suite("launcher", "current", 1, 90, 20, f"{together(4)} tests/launch/test_launcher.py"),
    Suite("faults", "current", 0.5, 360, 120, f"{together(2)} tests/faults"),
    Suite(
        *("cluster", "current", 1.5, 240, 35, f"{together(3)} tests/cluster"),
        under_all=f"{OPENMPI5.format('current')} && {together(3)} tests/cluster",
    ),
    # by file, since the manifests of a kind are built once in a process
    Suite("k8s", "current", 1.5, 150, 60, f"{TOOLS} && {PYTEST} -n 2 --dist loadfile tests/k8s"),
    Suite("mutants", "current", 1, 0, 60, "", "python tests/mutants.py"),
    Suite(
        *(
            "single",
            "classic",
            1,
            90,
            15,
            f"{PYTEST} -m 'not one_stack' {{}}".format(" ".join(with_tensorflow("single"))),
        ),
        under_all=f"{PYTEST} tests/single",
    ),
    core("mirrored:2", "classic", 1, 80, f"(({KERAS}) and not ({LONG})) or (test_every_loss and tfa) or test_ctc.py"),
    *(
        Suite(name, "classic", 1.5, 50, 30, world(name, f'-k "({KERAS}) and not ({LONG} or {ALIKE})"'), world(name))
        for name in ("multiworker:2", "horovod:2")
    ),
    Suite("local", "classic", 1, 0, 30, "", world("local")),
    Suite("mirrored:4", "classic", 1, 0, 30, "", world("mirrored:4")),
    Suite("examples", "classic", 1, 15, 40, f"{PYTEST} -m 'not one_stack' tests/examples", f"{PYTEST} tests/examples"),
    Suite("faults", "classic", 1, 0, 120, "", f"{together(2)} tests/faults"),
    Suite("launch", "classic", 1.5, 0, 20, "", f"{together(2)} {LAUNCH}"),
    Suite(
        *("smoke", "classic", 1, 0, 30, ""),
        f"{OPENMPI5.format('classic')} && {TOOLS} && {PYTEST} -m smoke tests/cluster tests/k8s/test_running.py",
    ),
]
