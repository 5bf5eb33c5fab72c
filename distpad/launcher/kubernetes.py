"""A training job as Kubernetes manifests: kustomize builds the folder k8s/ with the job's values.

The folder holds each value once, on a line marked as its only place. Its kustomizations copy the value from this line.
This module sets the marked lines in a copy of the folder. It knows nothing else about the manifests.
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
PLACES = (HERE.parents[1] / "k8s", HERE.parents[2] / "k8s")  # in an installed package, in a checkout
FOLDER = next((place for place in PLACES if (place / "overlays").is_dir()), PLACES[-1])
# flag | begin of the comment on its line
MARKS = {
    "--image": "of all pods",
    "--workers": "how many workers|pods that train",
    "--slots": "processes in each pod",
    "--max-restarts": "restarts",
    "--gpus": "GPUs of each pod that trains",
    "--queue": "a LocalQueue of the namespace",
}
MOST_PODS = 100_000  # Kubernetes's limit for an Indexed Job
MOST_RESTARTS = 2**31 - 1  # maximum of the field, an int32
# command that prints a program's version | minimum version | command that builds a folder
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
    """The kinds of jobs: the folder's overlays. Empty if the folder does not exist."""
    return tuple(sorted(path.parent.name for path in folder.glob("overlays/*/kustomization.yaml")))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training job in Kubernetes. ``distpad launch --help`` documents each field; None keeps the folder's value.

    Raises:
      ValueError: a field is out of range, or fields contradict each other.
    """

    kind: str
    image: str
    command: tuple[str, ...] = ()  # empty: the example in the folder
    workers: int | None = None
    slots: int | None = None
    gpus: int = 0
    queue: str | None = None
    namespace: str | None = None
    max_restarts: int | None = None
    folder: pathlib.Path = FOLDER

    def __post_init__(self) -> None:
        if not kinds(self.folder):
            remedy = "Container images do not contain it. Use an installation from a wheel or a checkout."
            raise ValueError(f"launch: --k8s needs the folder k8s/, but {self.folder} has no overlays. {remedy}")
        errors.choice("launch", "--k8s", self.kind, kinds(self.folder))
        if not _IMAGE.fullmatch(self.image):
            remedy = "Build and push one: docker build -f k8s/image/Dockerfile ."
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
                rule = "at most 63 lower-case letters, digits and hyphens, without a hyphen at either end"
                raise ValueError(errors.sentence("launch", flag, repr(name), rule))
        if any("\0" in word or not _is_text(word) for word in self.command):
            raise ValueError("launch: the command holds a NUL byte or invalid UTF-8, which YAML cannot represent.")
        self._check_slots()

    def _check_slots(self) -> None:
        if self.slots is None:
            return
        taking = [kind for kind in kinds(self.folder) if find(self.folder / "overlays" / kind, "--slots")]
        if self.kind not in taking:
            rule = f"no --slots for {self.kind}, which runs one process in each pod"
            raise ValueError(errors.sentence("launch", "--slots", self.slots, rule, f"Use one of {', '.join(taking)}."))
        if self.gpus and self.slots != self.gpus:
            rule = f"{self.gpus}, as --gpus: Horovod runs one process per GPU"
            raise ValueError(errors.sentence("launch", "--slots", self.slots, rule, "Omit --slots."))

    @property
    def values(self) -> dict[str, object]:
        """The values to set, by flag of MARKS."""
        numbers = {"--workers": self.workers, "--slots": self.slots, "--max-restarts": self.max_restarts}
        named = {"--image": self.image, "--gpus": self.gpus or None, "--queue": self.queue}
        return {flag: value for flag, value in {**named, **numbers}.items() if value is not None}


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:  # a lone surrogate, Python's representation of an invalid byte
        return False
    return True


# -- marked lines -----------------------------------------------------------------------------------------------------


def marked(flag: str) -> re.Pattern[str]:
    r"""A pattern for a flag's line. Its groups are the text before and after the value.

    >>> marked("--workers").sub(r"\g<1>7\g<2>", "  completions: 2 # how many workers: the only place")
    '  completions: 7 # how many workers: the only place'
    """
    return re.compile(rf'(?m)^( *[\w./-]+: "?)[^\s"#]+("? # (?:{MARKS[flag]})[^:\n]*: the only place.*)$')


def find(folder: pathlib.Path, flag: str) -> dict[pathlib.Path, int]:
    """Count a flag's lines by file, in the kustomization itself, or else in the resources that it builds on."""
    own = {path: len(marked(flag).findall(path.read_text(encoding="utf-8"))) for path in folder.glob("*.yaml")}
    if any(own.values()):
        return {path: count for path, count in own.items() if count}
    own_config = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    below = [(folder / name).resolve() for key in ("resources", "components") for name in own_config.get(key, ())]
    return {path: count for each in below if each.is_dir() for path, count in find(each, flag).items()}


def put(folder: pathlib.Path, flag: str, value: object) -> None:
    """Set the value on a flag's line, in a kustomization or in the resources that it builds on.

    Raises:
      ValueError: no line is marked, or several are.
    """
    found = find(folder, flag)
    if sum(found.values()) != 1:
        rule = f"one line in k8s/ marked '# {MARKS[flag]}: the only place'"
        files = ", ".join(f"{path.parent.name}/{path.name}" for path in sorted(found)) or "no file"
        evidence = f"There are {sum(found.values())} (in {files})."
        raise ValueError(errors.sentence("launch", flag, value, rule, evidence, "Restore that folder."))
    (path,) = found
    text = path.read_text(encoding="utf-8")
    path.write_text(marked(flag).sub(lambda line: f"{line[1]}{value}{line[2]}", text), encoding="utf-8")


# -- the user's own kustomization -------------------------------------------------------------------------------------


def kustomization(job: Job, patches: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A kustomization as k8s/README.md documents it, for a folder next to k8s/."""
    components = [name for name, wanted in (("gpu", job.gpus), ("kueue", job.queue)) if wanted]
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **({"namespace": job.namespace} if job.namespace else {}),
        "resources": [f"../k8s/overlays/{job.kind}"],
        "components": [f"../k8s/components/{name}" for name in components],
        "sortOptions": {"order": "fifo"},  # the runtime of a TrainJob must precede it
        "patches": list(patches),
    }


def command_patch(command: Sequence[str], resources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The patch that replaces the example's command: the arguments of the only container that has any.

    Raises:
      ValueError: several containers have arguments, or no container has.
    """
    found = [(resource, path) for resource in resources for path in _arguments(resource)]
    if len(found) != 1:
        raise ValueError(
            f"launch: {len(found)} containers have args, expected only the training container. Restore k8s/."
        )
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
    """Convert to YAML with all scalars quoted, since YAML 1.1 and 1.2 parse some plain words differently."""
    return yaml.safe_dump(value, default_style='"', sort_keys=False)


# -- building ---------------------------------------------------------------------------------------------------------


def build(job: Job) -> str:
    """Return the manifests, ready for ``kubectl apply -f -``.

    Raises:
      ValueError: kubectl is missing or too old, or the folder k8s/ was changed.
    """
    program = _builder()
    with tempfile.TemporaryDirectory(prefix="distpad-k8s-") as name:
        mine = pathlib.Path(name) / "mine"
        mine.mkdir()
        # without the files' modes, since an installed folder may be read-only
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
    """The command that builds a folder: kubectl, or else kustomize."""
    found = []
    for asked, oldest, builds in PROGRAMS:
        if shutil.which(asked[0]) is None:
            continue
        try:
            version = re.search(r"v(\d+)\.(\d+)", _run(asked))
        except ValueError:  # such as a broken link on PATH
            version = None
        if version and (int(version[1]), int(version[2])) >= oldest:
            return builds
        found.append(f"{asked[0]} {version[0] if version else 'of unknown version'}")
    wanted = " or ".join(f"{asked[0]} {oldest[0]}.{oldest[1]}" for asked, oldest, _ in PROGRAMS)
    remedy = "To install kubectl, see https://kubernetes.io/docs/tasks/tools/."
    raise ValueError(
        f"launch: --k8s found {' and '.join(found) or 'no kubectl'} on PATH, expected {wanted} or newer. {remedy}"
    )


def _run(argv: Sequence[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"launch: {argv[0]} cannot be used: {error}.") from error
    if done.returncode:
        raise ValueError(f"launch: {argv[0]} {argv[1]} failed: {done.stderr.strip()}")
    return done.stdout
