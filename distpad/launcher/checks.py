"""Checks of hosts, for `distpad doctor`, and for `distpad launch` before a job starts: pure functions of facts."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Callable

from distpad.launcher import gpus, spec

Facts = Mapping[str, Any]  # of one host, by probe of facts.py
AllFacts = Mapping[str, Facts]  # by host

OK, WARNING, ERROR = "ok", "warning", "error"
GB = 1 << 30
SKEW_S = 5.0
INSTALL_HOROVOD = "launch/install_horovod.sh"
SHM = "docker run --shm-size=8g, or in Kubernetes an emptyDir with medium: Memory at /dev/shm"
HOSTFILE = "OMPI_MCA_orte_default_hostfile"


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check on one host, or on all hosts.

    Attributes:
      state: "ok"; "warning" for a setting that may be intended, or that harms only some jobs; "error" for a problem
        that keeps a job from running, or from correct results.
      evidence: the facts behind the finding.
      remedy: an instruction for the user.
      host: the host's name, or several names, as in "host1, host2"; "all" for a comparison.
      what: the check's name.
    """

    state: str
    evidence: str = ""
    remedy: str = ""
    host: str = ""
    what: str = ""


@dataclasses.dataclass(frozen=True)
class Question:
    """The hosts, ports and code to check. ``slots_given`` is true if the user gave the slots of the hosts."""

    slots: dict[str, int]
    slots_given: bool = False
    ports: tuple[int, ...] = ()
    code: str = ""


OF_A_HOST: dict[str, Callable[[Facts], Iterator[Finding]]] = {}  # by name
OF_ALL_HOSTS: dict[str, Callable[[AllFacts], Iterator[Finding]]] = {}


def rule(registry: dict[str, Any], name: str) -> Callable[[Any], Any]:
    """Register a check of one host, or a comparison of all hosts that answered."""
    return lambda check: registry.setdefault(name, check)


def error(evidence: str, remedy: str, host: str = "") -> Finding:
    return Finding(ERROR, evidence, remedy, host)


def warning(evidence: str, remedy: str) -> Finding:
    return Finding(WARNING, evidence, remedy)


def check(answers: Mapping[str, Mapping[str, Any]], question: Question) -> list[Finding]:
    """Return all findings, errors first. A check that passes yields a finding of state ``ok``.

    Args:
      answers: the result of ``hosts.ask``, by host.
      question: the hosts, ports and code that the user asked about.
    """
    facts: dict[str, Facts] = {}
    found: list[Finding] = []

    def add(host: str, what: str, problems: Iterable[Finding]) -> None:
        several: list[Finding] = []
        with contextlib.suppress(KeyError):  # a probe has failed, which is a finding of its own
            several.extend(problems)
        found.extend(dataclasses.replace(each, host=each.host or host, what=what) for each in several or [Finding(OK)])

    for host, answer in answers.items():
        if "unreachable" in answer:
            add(host, "reach", [error(answer["unreachable"], answer["remedy"])])
            continue
        wanted = question.slots.get(host, 1) if question.slots_given else 0
        facts[host] = {**answer, **answer["facts"], "asked": host, "slots": wanted, "folder": question.code}
        add(host, "reach", [])
        for what, of_host in OF_A_HOST.items():
            add(host, what, of_host(facts[host]))
    for what, of_all in OF_ALL_HOSTS.items() if len(facts) > 1 else ():
        add("all", what, of_all(facts))
    return sorted(found, key=lambda finding: (ERROR, WARNING, OK).index(finding.state))


# -- one host: each check yields the problems in its facts, and raises KeyError where one is missing -------------------


@rule(OF_A_HOST, "clock")
def clock(facts: Facts) -> Iterator[Finding]:
    """Clocks must agree. Otherwise logs of several hosts cannot be compared, and tickets and certificates fail."""
    ahead, behind = facts["time"] - facts["received"], facts["sent"] - facts["time"]
    if max(ahead, behind) > SKEW_S:
        evidence = f"its clock is {max(ahead, behind):.0f} s {'ahead' if ahead > behind else 'behind'}"
        yield warning(evidence, "Synchronise all clocks: timedatectl set-ntp true")


@rule(OF_A_HOST, "probes")
def probes(facts: Facts) -> Iterator[Finding]:
    """Each failed probe is a warning, since the state of its subject is unknown."""
    for name, why in facts["errors"].items():
        yield warning(f"{name} could not be checked: {why}", "Check it manually.")


@rule(OF_A_HOST, "TensorFlow")
def tensorflow(facts: Facts) -> Iterator[Finding]:
    """TensorFlow must be installed and must load."""
    if not any(name.startswith(("tensorflow", "tf-nightly")) for name in facts["packages"]):
        yield error("TensorFlow is not installed in this Python", "launch/environment.sh makes a whole environment.")
    elif why := _engine(facts, "tensorflow").get("error"):
        yield error(f"TensorFlow does not load: {why}", "Install it again, for this Python and this processor.")


@rule(OF_A_HOST, "Keras")
def keras(facts: Facts) -> Iterator[Finding]:
    """TensorFlow up to 2.15 needs Keras 2. Later releases need Keras 3."""
    found, version, release = facts["packages"]["keras"], *_tensorflow(facts)
    if release and (int(found.split(".")[0]) >= 3) != (release >= (2, 16)):
        fitting = "'keras>=3'" if release >= (2, 16) else f"'keras=={release[0]}.{release[1]}.*'"
        yield error(f"Keras {found} does not go with TensorFlow {version}", f"pip install {fitting}")


@rule(OF_A_HOST, "Addons")
def addons(facts: Facts) -> Iterator[Finding]:
    """TensorFlow Addons support TensorFlow up to 2.15."""
    found, version, release = facts["packages"]["tensorflow-addons"], *_tensorflow(facts)
    if release > (2, 15):
        evidence = f"TensorFlow Addons {found} support TensorFlow up to 2.15, here is {version}"
        yield warning(evidence, "Uninstall them, or use TensorFlow 2.15.")


@rule(OF_A_HOST, "Horovod")
def horovod(facts: Facts) -> Iterator[Finding]:
    """An installed Horovod must load. pip's cache ignores the TensorFlow that a wheel was built for."""
    if why := _engine(facts, "horovod").get("error"):
        yield error(
            f"Horovod does not load: {why}", f"Build it for the installed TensorFlow: {INSTALL_HOROVOD} --force"
        )


@rule(OF_A_HOST, "Horovod's NCCL")
def nccl(facts: Facts) -> Iterator[Finding]:
    """Horovod on GPUs needs NCCL. Without NCCL, gradients go through the CPU's memory, slowly and without a warning."""
    built, count = _engine(facts, "horovod")["built_with"], gpus.count(facts["gpus"])
    if count and "nccl" not in built:
        evidence = f"{count} GPUs, but Horovod was built without NCCL (it has {', '.join(built) or 'nothing'})"
        yield error(evidence, f"In an environment with tensorflow[and-cuda]: {INSTALL_HOROVOD} --force")


@rule(OF_A_HOST, "GPUs")
def seen_gpus(facts: Facts) -> Iterator[Finding]:
    """TensorFlow must see all GPUs of the host, or as many as a launcher expects, and have code for them."""
    engine, driver, environment = _engine(facts, "tensorflow"), facts["gpus"], facts["environment"]
    wanted = int(environment.get("DISTPAD_GPUS") or 0)
    expected = wanted or gpus.count(driver) or (1 if driver.get("error") else 0)
    if engine["gpus"] < expected:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        why, remedy = gpus.why_unseen(expected, engine, driver, visible, driver["wheels"])
        meant = not wanted and engine["gpus"] and why.startswith("CUDA_VISIBLE_DEVICES")
        evidence = f"TensorFlow sees {engine['gpus']} of {expected} GPUs: {why}"
        yield Finding(WARNING if meant else ERROR, evidence, remedy)
    elif unfit := gpus.unsupported(engine, driver):
        yield Finding(ERROR if unfit[2] else WARNING, unfit[0], unfit[1])


@rule(OF_A_HOST, "slots")
def slots(facts: Facts) -> Iterator[Finding]:
    """Each worker needs a GPU, or a core on hosts without GPUs."""
    host, wanted, have, cores = facts["asked"], facts["slots"], gpus.count(facts["gpus"]), facts["machine"]["cores"]
    if have and wanted > have:
        yield error(f"{wanted} slots, but {have} GPUs", f"Write {host}:{have}. Workers should not share a GPU.")
    elif not have and wanted > cores:
        yield warning(
            f"{wanted} slots, but {cores} cores", f"Write {host}:{cores}. Workers that share a core are slow."
        )


@rule(OF_A_HOST, "MPI")
def mpi(facts: Facts) -> Iterator[Finding]:
    """mpirun must belong to the MPI library that Horovod loads. Another mpirun starts N jobs of one, or fails."""
    library, mpirun = _engine(facts, "horovod")["mpi"], _mpirun(facts)
    if library and not mpirun:
        evidence = f"Horovod has MPI ({' '.join(_mpi(library))}), but no mpirun is on PATH"
        yield warning(evidence, "Add it to PATH, or launch with --gloo.")
    elif library and _family(library) != _family(mpirun):
        evidence = f"Horovod loads {' '.join(_mpi(library))}, but mpirun is {' '.join(_mpi(mpirun))}"
        yield error(evidence, f"Change PATH, or: {INSTALL_HOROVOD} --force builds it for the MPI on PATH.")


@rule(OF_A_HOST, "operator")
def operator(facts: Facts) -> Iterator[Finding]:
    """Open MPI 5 ignores the hosts that an operator sets for version 4, and runs all workers on one host."""
    environment, mpirun = facts["environment"], _mpirun(facts)
    file, kind, version = environment[HOSTFILE], *_mpi(mpirun)
    is_5 = kind == "Open MPI" and int(version.split(".")[0]) >= 5
    if is_5 and environment.get("PRTE_MCA_prte_default_hostfile") != file:
        remedy = f"Set PRTE_MCA_prte_default_hostfile={file}, or call mpirun --hostfile {file}"
        yield error(f"{kind} {version} ignores {HOSTFILE}: all workers would run on this host", remedy)


@rule(OF_A_HOST, "/dev/shm")
def shared_memory(facts: Facts) -> Iterator[Finding]:
    """Containers get 64 MB by default, with which NCCL fails during training (NVIDIA/nccl#290)."""
    size, free = facts["shared_memory"]["size"], facts["shared_memory"]["free"]
    evidence = f"/dev/shm has {size // 2**20} MB, {free // 2**20} MB of it free"
    if size >= GB and free >= GB // 4:
        return
    if gpus.count(facts["gpus"]):
        yield error(f"{evidence}: too little for NCCL", f"Increase it to 1 GB or more: {SHM}")
    else:
        yield warning(evidence, f"Workers on one host use it, and NCCL needs 1 GB: {SHM}")


@rule(OF_A_HOST, "open files")
def open_files(facts: Facts) -> Iterator[Finding]:
    """Each worker opens a connection to each other worker, and the files of the data."""
    soft = facts["machine"]["open_files"]["soft"]
    if 0 <= soft < 1024:
        yield warning(f"a process may open only {soft} files", "ulimit -n 4096")


@rule(OF_A_HOST, "TF_CONFIG")
def tf_config(facts: Facts) -> Iterator[Finding]:
    """TF_CONFIG, if set, must name this host at its task's index. Otherwise the workers wait forever."""
    found = facts["tf_config"] or {"cluster": {}}
    remedy = "Unset it, or let distpad launch --backend multiworker write it."
    if "error" in found:
        yield error(f"TF_CONFIG is set, but {found['error']}", remedy)
    elif found["cluster"] and "address" not in found:
        task, sizes = found["task"], ", ".join(f"{len(each)} {kind}" for kind, each in found["cluster"].items())
        yield error(f"TF_CONFIG says task {task['type']} {task['index']}, but names {sizes}", remedy)
    elif found["cluster"] and not found["is_here"]:
        yield error(f"TF_CONFIG says that this host is {found['address']}, no address of this host", remedy)


@rule(OF_A_HOST, "ports")
def ports(facts: Facts) -> Iterator[Finding]:
    """The ports in the question must be free."""
    for port, why in facts["ports"]["taken"].items():
        find = f"Find its process with ss -ltnp 'sport = :{port}', or use another port."
        yield error(f"port {port} is not free: {why.lower()}", find)


# -- all hosts that answered: each check compares them ----------------------------------------------------------------


@rule(OF_ALL_HOSTS, "names")
def names(facts: AllFacts) -> Iterator[Finding]:
    """Each host must resolve all names, its own included, to addresses that other hosts can reach.

    Gloo resolves the name of its own host and sends the address to the other workers.
    """
    for host, _, finding in wrong_names(facts):
        yield dataclasses.replace(finding, host=host)


@rule(OF_ALL_HOSTS, "versions")
def versions(facts: AllFacts) -> Iterator[Finding]:
    """Packages, Python and MPI must have the same version on all hosts."""
    packages = {host: each["packages"] for host, each in _having(facts, "packages")}
    every = sorted({name for each in packages.values() for name in each})
    rows = {name: {host: each.get(name, "") for host, each in packages.items()} for name in every}
    rows["Python"] = {
        host: ".".join(each["python"]["version"].split(".")[:2]) for host, each in _having(facts, "python")
    }
    rows["mpirun"] = {host: _mpirun(each) for host, each in _having(facts, "mpirun")}
    for hosts, evidence in differing(rows):
        yield error(evidence, "Install the same version everywhere.", hosts)


@rule(OF_ALL_HOSTS, "builds")
def builds(facts: AllFacts) -> Iterator[Finding]:
    """Horovod must have the same build on all hosts. A rank without NCCL waits forever for ranks with NCCL."""
    engines = {host: _engine(each, "horovod") for host, each in _having(facts, "engines")}
    found = {host: " ".join(each["built_with"]) for host, each in _having(engines, "built_with")}
    for hosts, evidence in differing({"Horovod's build": found}):
        yield error(evidence, f"Build Horovod again on all hosts: {INSTALL_HOROVOD} --force", hosts)


@rule(OF_ALL_HOSTS, "distpad's code")
def own_code(facts: AllFacts) -> Iterator[Finding]:
    """distpad must be the same on all hosts, since messages between its workers carry no version."""
    return _same_files(facts, "distpad", "distpad's own code", "Install the same distpad everywhere.")


@rule(OF_ALL_HOSTS, "code")
def code(facts: AllFacts) -> Iterator[Finding]:
    """The folder of ``--code`` must be the same. Workers with different programs hang, or train different models."""
    folder = next(iter(facts.values()))["folder"]
    return _same_files(facts, "code", f"the code in {folder}", f"Copy it there: rsync -a {folder}/ HOST:{folder}/")


def _same_files(facts: AllFacts, key: str, what: str, remedy: str) -> Iterator[Finding]:
    found = {host: each[key] for host, each in _having(facts, key) if each[key] is not None}
    common: Facts = max(found.values(), key=list(found.values()).count, default={})
    for host, files in found.items():
        different = sorted(name for name in {*files, *common} if files.get(name) != common.get(name))
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            evidence = f"{what} differs from the other hosts' in {', '.join(different[:3])}{more}"
            yield error(evidence, remedy, host)


# -- before a job starts ----------------------------------------------------------------------------------------------


def problems(job: spec.Job, facts: AllFacts) -> list[str]:
    """List the problems that keep the job from starting, one sentence each."""
    found = [f"{name} of {host}: {why}." for host, each in facts.items() for name, why in each["errors"].items()]
    wrong = [*versions(facts)]
    if len(facts) > 1 and job.controller != "mpi":  # Open MPI chooses the addresses itself
        for host, is_own, finding in wrong_names(facts):
            if not is_own or job.controller == "gloo":  # only Gloo resolves its own name
                wrong.append(dataclasses.replace(finding, evidence=f"on {host}, {finding.evidence}"))
    for host, each in facts.items() if job.gpus_each else ():  # a worker's TensorFlow may see fewer: it checks again
        needed = job.gpus_each * max(1, sum(place.host.name == host for place in job.places))
        is_cpu_build = "tensorflow-cpu" in each["packages"] and "tensorflow" not in each["packages"]
        if is_cpu_build or each["gpus"].get("error") or gpus.count(each["gpus"]) < needed:
            build = {"for_gpus": not is_cpu_build, "cuda": "0", "cudnn": ""}
            why, remedy = gpus.why_unseen(needed, build, each["gpus"], None, {})
            wrong.append(error(f"{host} has no {needed} GPUs for its workers: {why}", remedy))
    return [*found, *(f"{finding.evidence}. {finding.remedy}" for finding in wrong)]


def differing(rows: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the rows whose values differ between hosts.

    Args:
      rows: values by host, by name.

    Returns:
      The hosts whose value is not the most common one (of equally common ones, the first host's), and the evidence.

    >>> [*differing({"numpy": {"a": "1.26.4", "b": "2.4.6", "c": "2.4.6"}, "keras": {"a": "3", "b": "3", "c": "3"}})]
    [('a', 'numpy differs: a has 1.26.4, b c have 2.4.6')]
    """
    for name, found in rows.items():
        values = [*found.values()]
        if len(set(values)) > 1:
            common = max(values, key=values.count)
            groups = {value: [host for host in found if found[host] == value] for value in values}
            listed = (f"{' '.join(g)} {'has' if len(g) == 1 else 'have'} {v or 'none'}" for v, g in groups.items())
            yield ", ".join(host for host in found if found[host] != common), f"{name} differs: {', '.join(listed)}"


def wrong_names(facts: AllFacts) -> Iterator[tuple[str, bool, Finding]]:
    """Names that do not resolve, or that resolve to the loopback: other hosts would then connect to themselves.

    Returns:
      For each wrong name, the resolving host, whether it is the host's own name, and the finding.
    """
    known = {*facts, *(each["host"] for each in facts.values())}  # a host that does not answer has a finding already
    for here, each in _having(facts, "names"):
        for name, addresses in each["names"].items():
            is_own = name in (here, each["host"])
            which = f"its own name {name}" if is_own else f"the name {name}"
            if name not in known:
                continue
            if not addresses:
                remedy = "Add it to the DNS, or to /etc/hosts there."
                yield here, is_own, error(f"{which} does not resolve", remedy)
            elif any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
                problem = f"{which} resolves to {', '.join(addresses)}, the loopback, which other hosts cannot reach"
                yield here, is_own, error(problem, "Set its real address in /etc/hosts there.")


def interface(facts: AllFacts) -> tuple[str, str]:
    """Return the network interface that holds the address of each host's name on all hosts, and the error if none does.

    horovodrun can search for an interface, but starts servers for it with their key on a command line.
    """
    on = {}
    for host, each in facts.items():
        own = {*each["names"].get(host, []), *each["names"].get(each["host"], [])}
        on[host] = sorted(name for name, addresses in each["interfaces"].items() if own & set(addresses))
    common = sorted(set.intersection(*(set(names) for names in on.values())) - {"lo"})
    if common:
        return common[0], ""
    listed = ", ".join(f"{host} has {' and '.join(names) or 'none'}" for host, names in on.items())
    return "", f"no network interface holds the addresses on all hosts ({listed}). Choose one with --network-interface."


# -- reading facts ----------------------------------------------------------------------------------------------------


def _having(facts: AllFacts, key: str) -> list[tuple[str, Facts]]:
    """The hosts whose facts contain ``key``."""
    return [(host, each) for host, each in facts.items() if key in each]


def _engine(facts: Facts, name: str) -> Facts:
    return facts["engines"].get(name) or {}


def _mpirun(facts: Facts) -> str:
    return (facts["mpirun"] or {"version": ""})["version"]


def _tensorflow(facts: Facts) -> tuple[str, tuple[int, ...]]:
    """TensorFlow's version, and its first two numbers; "" and () if it is not known."""
    packages, engine = facts["packages"], (facts.get("engines") or {}).get("tensorflow") or {}
    found = [packages[name] for name in ("tensorflow", "tensorflow-cpu", "tensorflow-gpu") if name in packages]
    version = engine.get("version") or (found[0] if found else "")
    return version, tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _mpi(banner: str) -> tuple[str, str]:
    """The MPI implementation and its version, as it prints them."""
    kinds = {"Open MPI": "Open MPI", "HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI"}
    version = re.search(r"\d+\.[\d.]+\w*", banner)
    return next((kinds[mark] for mark in kinds if mark in banner), banner), version[0] if version else ""


def _family(banner: str) -> tuple[str, str]:
    """The MPI implementation. For Open MPI also its major version, since 5 does not load libraries built for 4."""
    kind, version = _mpi(banner)
    return kind, version.split(".")[0] if kind == "Open MPI" else ""
