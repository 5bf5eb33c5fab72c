"""A training job as Kubernetes's manifests: the folder k8s/, built by kustomize with this job's values.

The folder is data. It says each value once, on a line that is marked as its only place, from where its kustomizations
copy it to all others. So here a copy's marked lines are set, and nothing else is known of what the manifests say.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from distpad import errors
from distpad.launcher import spec

HERE = pathlib.Path(__file__).resolve()
PLACES = (HERE.parents[1] / "k8s", HERE.parents[2] / "k8s")  # of an installed package, of a checkout
FOLDER = next((place for place in PLACES if (place / "overlays").is_dir()), PLACES[-1])
# flag | how the comment on its line begins
MARKS = {
    "--image": "of all pods",
    "--workers": "how many workers|pods that train",
    "--slots": "processes in each pod",
    "--max-restarts": "restarts",
    "--gpus": "GPUs of each pod that trains",
    "--queue": "a LocalQueue of the namespace",
}
MOST_PODS = 100_000  # of an Indexed Job, by Kubernetes's own rule
MOST_RESTARTS = 2**31 - 1  # what its field can hold
# what tells a program's version | the oldest that knows all that the folder uses | what builds a folder with it
PROGRAMS = (
    (("kubectl", "version", "--client"), (1, 27), ("kubectl", "kustomize")),
    (("kustomize", "version"), (5, 0), ("kustomize", "build")),
)
LIMIT_S = 60.0

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_IMAGE = re.compile(
    r"([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:[0-9]+)?/)?"  # the registry
    r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64}|@sha512:[0-9a-f]{128})?"
)


def kinds(folder: pathlib.Path = FOLDER) -> tuple[str, ...]:
    """The kinds of jobs: the folder's overlays. None where there is no folder."""
    return tuple(sorted(path.parent.name for path in folder.glob("overlays/*/kustomization.yaml")))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training in Kubernetes. ``distpad launch --help`` tells of each field; None stands for what the folder says.

    Raises:
      ValueError: a field that is out of its range, or fields that do not go together.
    """

    kind: str
    image: str
    command: tuple[str, ...] = ()  # none: the example that the folder trains
    workers: int | None = None
    slots: int | None = None
    gpus: int = 0
    queue: str | None = None
    namespace: str | None = None
    max_restarts: int | None = None
    folder: pathlib.Path = FOLDER

    def __post_init__(self) -> None:
        if not kinds(self.folder):
            remedy = "Images are made without it: run this where distpad is installed from a wheel or a checkout."
            raise ValueError(f"launch: --k8s needs the folder k8s/, which {self.folder} is not. {remedy}")
        errors.choice("launch", "--k8s", self.kind, kinds(self.folder))
        if not _IMAGE.fullmatch(self.image):
            remedy = "Build and push one: docker build -f k8s/image/Dockerfile.current ."
            rule = "NAME[:TAG][@DIGEST] of an image that the cluster's nodes can pull"
            raise ValueError(errors.sentence("launch", "--image", repr(self.image), rule, remedy))
        for flag, value, low, high in (
            ("--workers", self.workers, 1, MOST_PODS),
            ("--slots", self.slots, 1, spec.MOST_SLOTS),
            ("--gpus", self.gpus, 0, spec.MOST_SLOTS),
            ("--max-restarts", self.max_restarts, 0, MOST_RESTARTS),
        ):
            if value is not None and not low <= value <= high:
                raise ValueError(errors.sentence("launch", flag, value, f"{low} to {high}"))
        for flag, name in (("--queue", self.queue), ("--namespace", self.namespace)):
            if name is not None and not _LABEL.fullmatch(name):
                rule = "at most 63 small letters, digits and hyphens, the first and last no hyphen"
                raise ValueError(errors.sentence("launch", flag, repr(name), rule))
        if any("\0" in word or not _is_text(word) for word in self.command):
            raise ValueError("launch: the command holds a NUL byte, or bytes that are no UTF-8: YAML has none of them.")
        self._check_slots()

    def _check_slots(self) -> None:
        if self.slots is None:
            return
        taking = [kind for kind in kinds(self.folder) if find(self.folder / "overlays" / kind, "--slots")]
        if self.kind not in taking:
            rule = f"none for {self.kind}, with one process in each pod"
            raise ValueError(
                errors.sentence("launch", "--slots", self.slots, rule, f"Take one of {', '.join(taking)}.")
            )
        if self.gpus and self.slots != self.gpus:
            rule = f"{self.gpus}, as --gpus: Horovod has a process for each GPU"
            raise ValueError(errors.sentence("launch", "--slots", self.slots, rule, "Leave it out."))

    @property
    def values(self) -> dict[str, object]:
        """What is to be set, by flags of MARKS."""
        numbers = {"--workers": self.workers, "--slots": self.slots, "--max-restarts": self.max_restarts}
        named = {"--image": self.image, "--gpus": self.gpus or None, "--queue": self.queue}
        return {flag: value for flag, value in {**named, **numbers}.items() if value is not None}


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # a lone surrogate, which is how Python holds a byte that is no UTF-8
        return False
    return True


# -- marked lines -----------------------------------------------------------------------------------------------------


def marked(flag: str) -> re.Pattern[str]:
    r"""A flag's line: what stands before the value, and behind it.

    >>> marked("--workers").sub(r"\g<1>7\g<2>", "  completions: 2 # how many workers: the only place")
    '  completions: 7 # how many workers: the only place'
    """
    return re.compile(rf'(?m)^( *[\w./-]+: "?)[^\s"#]+("? # (?:{MARKS[flag]})[^:\n]*: the only place.*)$')


def find(folder: pathlib.Path, flag: str) -> dict[pathlib.Path, int]:
    """The files with a flag's line, and how many each has: a kustomization's own hide those of what it is built on."""
    own = {path: len(marked(flag).findall(path.read_text(encoding="utf-8"))) for path in folder.glob("*.yaml")}
    if any(own.values()):
        return {path: count for path, count in own.items() if count}
    told = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    below = [(folder / name).resolve() for key in ("resources", "components") for name in told.get(key, ())]
    return {path: count for each in below if each.is_dir() for path, count in find(each, flag).items()}


def put(folder: pathlib.Path, flag: str, value: object) -> None:
    """Set a flag's line, in a kustomization or what it is built on.

    Raises:
      ValueError: there is none, or several.
    """
    found = find(folder, flag)
    if sum(found.values()) != 1:
        rule = f"one line in k8s/ that is marked '# {MARKS[flag]}: the only place'"
        files = ", ".join(f"{path.parent.name}/{path.name}" for path in sorted(found)) or "no file"
        evidence = f"There are {sum(found.values())} (in {files})."
        raise ValueError(errors.sentence("launch", flag, value, rule, evidence, "Restore that folder."))
    (path,) = found
    text = path.read_text(encoding="utf-8")
    path.write_text(marked(flag).sub(lambda line: f"{line[1]}{value}{line[2]}", text), encoding="utf-8")


# -- a kustomization of the user's ------------------------------------------------------------------------------------


def kustomization(job: Job, patches: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What k8s/README.md tells users to write, in a folder beside k8s/."""
    components = [name for name, wanted in (("gpu", job.gpus), ("kueue", job.queue)) if wanted]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": job.namespace} if job.namespace else {}),
        "resources": [f"../k8s/overlays/{job.kind}"],
        "components": [f"../k8s/components/{name}" for name in components],
        "sortOptions": {"order": "fifo"},  # TrainJobs are refused where their runtime does not come before them
        "patches": list(patches),
    }


def command_patch(command: Sequence[str], resources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The patch that puts a command in the place of the example's, which is where a container has arguments.

    Raises:
      ValueError: several containers have arguments, or none.
    """
    found = [(resource, path) for resource in resources for path in _arguments(resource)]
    if len(found) != 1:
        raise ValueError(f"launch: {len(found)} containers have args, expected one, the training's. Restore k8s/.")
    ((resource, path),) = found
    target = {"kind": resource["kind"], "name": resource["metadata"]["name"]}
    return {"target": target, "patch": _as_yaml([{"op": "replace", "path": path, "value": list(command)}])}


def _arguments(value: Any, path: str = "") -> Iterator[str]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        if key == "args":
            yield f"{path}/{key}"
        else:
            yield from _arguments(each, f"{path}/{key}")


def _as_yaml(value: Any) -> str:
    """All in quotes: YAML's versions do not agree on which words are numbers or booleans."""
    return yaml.safe_dump(value, default_style='"', sort_keys=False)


# -- building ---------------------------------------------------------------------------------------------------------


def build(job: Job) -> str:
    """The manifests, ready for ``kubectl apply -f -``.

    Raises:
      ValueError: there is no kubectl, or a folder k8s/ that this does not fit.
    """
    program = _builder()
    with tempfile.TemporaryDirectory(prefix="distpad-k8s-") as name:
        mine = pathlib.Path(name) / "mine"
        mine.mkdir()
        # without the files' modes: what is installed may be for reading alone
        shutil.copytree(job.folder, mine.parent / "k8s", copy_function=shutil.copyfile)
        own = mine / "kustomization.yaml"
        own.write_text(_as_yaml(kustomization(job)), encoding="utf-8")
        for flag, value in job.values.items():
            put(mine, flag, value)
        built = _run([*program, str(mine)])
        if job.command:
            patch = command_patch(job.command, list(yaml.safe_load_all(built)))
            own.write_text(_as_yaml(kustomization(job, [patch])), encoding="utf-8")
            built = _run([*program, str(mine)])
    return built


def _builder() -> Sequence[str]:
    """What builds a folder: kubectl, which those have who apply the manifests, or kustomize."""
    there = []
    for asked, oldest, builds in PROGRAMS:
        if shutil.which(asked[0]) is None:
            continue
        try:
            told = re.search(r"v(\d+)\.(\d+)", _run(asked))
        except ValueError:  # such as a name on PATH that leads nowhere
            told = None
        if told and (int(told[1]), int(told[2])) >= oldest:
            return builds
        there.append(f"{asked[0]} {told[0] if told else 'of unknown version'}")
    wanted = " or ".join(f"{asked[0]} {oldest[0]}.{oldest[1]}" for asked, oldest, _ in PROGRAMS)
    remedy = "See https://kubernetes.io/docs/tasks/tools/ for how to install kubectl."
    raise ValueError(
        f"launch: --k8s found {' and '.join(there) or 'no kubectl'} on PATH, expected {wanted}, or newer. {remedy}"
    )


def _run(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"launch: {argv[0]} cannot be used: {error}.") from error
    if done.returncode:
        raise ValueError(f"launch: {argv[0]} {argv[1]} failed: {done.stderr.strip()}")
    return done.stdout
