"""Checks of hosts, for `distpad doctor`, and for `distpad launch` before a job starts: pure functions of facts."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterator, Mapping
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


# -- one host: each check yields the problems in its facts ------------------------------------------------------------


def probes(facts: Facts) -> Iterator[Finding]:
    """Each failed probe is a warning, since the state of its subject is unknown."""
    for name, why in facts["errors"].items():
        yield Finding(WARNING, f"{name} could not be checked: {why}", "Check it manually.")


def tensorflow(facts: Facts) -> Iterator[Finding]:
    """TensorFlow must be installed and must load."""
    if not any(name.startswith(("tensorflow", "tf-nightly")) for name in facts.get("packages", {"tensorflow": ""})):
        make = "launch/environment.sh makes a whole environment."
        yield Finding(ERROR, "TensorFlow is not installed in this Python", make)
    elif why := _engine(facts, "tensorflow").get("error"):
        again = "Install it again, for this Python and this processor."
        yield Finding(ERROR, f"TensorFlow does not load: {why}", again)


def keras(facts: Facts) -> Iterator[Finding]:
    """TensorFlow up to 2.15 needs Keras 2. Later releases need Keras 3."""
    found, version, release = facts.get("packages", {}).get("keras", ""), *_tensorflow(facts)
    if found and release and (int(found.split(".")[0]) >= 3) != (release >= (2, 16)):
        fitting = "'keras>=3'" if release >= (2, 16) else f"'keras=={release[0]}.{release[1]}.*'"
        yield Finding(ERROR, f"Keras {found} does not go with TensorFlow {version}", f"pip install {fitting}")


def addons(facts: Facts) -> Iterator[Finding]:
    """TensorFlow Addons support TensorFlow up to 2.15."""
    found, version, release = facts.get("packages", {}).get("tensorflow-addons"), *_tensorflow(facts)
    if found and release > (2, 15):
        evidence = f"TensorFlow Addons {found} support TensorFlow up to 2.15, here is {version}"
        yield Finding(WARNING, evidence, "Uninstall them, or use TensorFlow 2.15.")


def horovod(facts: Facts) -> Iterator[Finding]:
    """An installed Horovod must load. pip's cache ignores the TensorFlow that a wheel was built for."""
    if why := _engine(facts, "horovod").get("error"):
        build = f"Build it for the installed TensorFlow: {INSTALL_HOROVOD} --force"
        yield Finding(ERROR, f"Horovod does not load: {why}", build)


def nccl(facts: Facts) -> Iterator[Finding]:
    """Horovod on GPUs needs NCCL. Without NCCL, gradients go through the CPU's memory, slowly and without a warning."""
    built, count = _engine(facts, "horovod").get("built_with"), gpus.count(facts.get("gpus", {}))
    if count and built is not None and "nccl" not in built:
        evidence = f"{count} GPUs, but Horovod was built without NCCL (it has {', '.join(built) or 'nothing'})"
        yield Finding(ERROR, evidence, f"In an environment with tensorflow[and-cuda]: {INSTALL_HOROVOD} --force")


def seen_gpus(facts: Facts) -> Iterator[Finding]:
    """TensorFlow must see all GPUs of the host, or as many as a launcher expects, and have code for them."""
    engine, driver, environment = _engine(facts, "tensorflow"), facts.get("gpus", {}), facts.get("environment", {})
    if "for_gpus" not in engine or not driver:
        return
    wanted = int(environment.get("DISTPAD_GPUS") or 0)
    expected = wanted or gpus.count(driver) or (1 if driver.get("error") else 0)
    if engine["gpus"] < expected:
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        why, remedy = gpus.why_unseen(expected, engine, driver, visible, driver["wheels"])
        meant = not wanted and engine["gpus"] and why.startswith("CUDA_VISIBLE_DEVICES")
        yield Finding(
            WARNING if meant else ERROR, f"TensorFlow sees {engine['gpus']} of {expected} GPUs: {why}", remedy
        )
    elif unfit := gpus.unsupported(engine, driver):
        yield Finding(ERROR if unfit[2] else WARNING, unfit[0], unfit[1])


def slots(facts: Facts) -> Iterator[Finding]:
    """Each worker needs a GPU, or a core on hosts without GPUs."""
    host, wanted, have = facts["asked"], facts["slots"], gpus.count(facts.get("gpus", {}))
    cores = facts.get("machine", {}).get("cores") or wanted
    if have and wanted > have:
        write = f"Write {host}:{have}. Workers should not share a GPU."
        yield Finding(ERROR, f"{wanted} slots, but {have} GPUs", write)
    elif not have and wanted > cores:
        write = f"Write {host}:{cores}. Workers that share a core are slow."
        yield Finding(WARNING, f"{wanted} slots, but {cores} cores", write)


def mpi(facts: Facts) -> Iterator[Finding]:
    """mpirun must belong to the MPI library that Horovod loads. Another mpirun starts N jobs of one, or fails."""
    library, mpirun = _engine(facts, "horovod").get("mpi", ""), _mpirun(facts)
    if "mpirun" not in facts or not library:
        return
    if not mpirun:
        evidence = f"Horovod has MPI ({_mpi(library)}), but no mpirun is on PATH"
        yield Finding(WARNING, evidence, "Add it to PATH, or launch with --gloo.")
    elif _family(library) != _family(mpirun):
        evidence = f"Horovod loads {_mpi(library)}, but mpirun is {_mpi(mpirun)}"
        remedy = f"Change PATH, or: {INSTALL_HOROVOD} --force builds it for the MPI on PATH."
        yield Finding(ERROR, evidence, remedy)


def operator(facts: Facts) -> Iterator[Finding]:
    """Open MPI 5 ignores the hosts that an operator sets for version 4, and runs all workers on one host."""
    environment = facts.get("environment", {})
    mpirun, file = _mpirun(facts), environment.get(HOSTFILE)
    obeyed = environment.get("PRTE_MCA_prte_default_hostfile") == file
    if file is not None and not obeyed and _family(mpirun) >= ("Open MPI", 5):
        remedy = f"Set PRTE_MCA_prte_default_hostfile={file}, or call mpirun --hostfile {file}"
        yield Finding(ERROR, f"{_mpi(mpirun)} ignores {HOSTFILE}: all workers would run on this host", remedy)


def shared_memory(facts: Facts) -> Iterator[Finding]:
    """Containers get 64 MB by default, with which NCCL fails during training (NVIDIA/nccl#290)."""
    found = facts.get("shared_memory", {})
    if not found or (found["size"] >= GB and found["free"] >= GB // 4):
        return
    evidence = f"/dev/shm has {found['size'] // 2**20} MB, {found['free'] // 2**20} MB of it free"
    if gpus.count(facts.get("gpus", {})):
        yield Finding(ERROR, f"{evidence}: too little for NCCL", f"Increase it to 1 GB or more: {SHM}")
    else:
        yield Finding(WARNING, evidence, f"Workers on one host use it, and NCCL needs 1 GB: {SHM}")


def open_files(facts: Facts) -> Iterator[Finding]:
    """Each worker opens a connection to each other worker, and the files of the data."""
    soft = facts.get("machine", {}).get("open_files", {}).get("soft", -1)
    if 0 <= soft < 1024:
        yield Finding(WARNING, f"a process may open only {soft} files", "ulimit -n 4096")


def tf_config(facts: Facts) -> Iterator[Finding]:
    """TF_CONFIG, if set, must name this host at its task's index. Otherwise the workers wait forever."""
    found = facts.get("tf_config")
    if not found:
        return
    remedy = "Unset it, or let distpad launch --backend multiworker write it."
    if "error" in found:
        yield Finding(ERROR, f"TF_CONFIG is set, but {found['error']}", remedy)
    elif found["cluster"] and "address" not in found:
        task, sizes = found["task"], ", ".join(f"{len(each)} {kind}" for kind, each in found["cluster"].items())
        yield Finding(ERROR, f"TF_CONFIG says task {task['type']} {task['index']}, but names {sizes}", remedy)
    elif found["cluster"] and not found["is_here"]:
        evidence = f"TF_CONFIG says that this host is {found['address']}, no address of this host"
        yield Finding(ERROR, evidence, remedy)


def ports(facts: Facts) -> Iterator[Finding]:
    """The ports in the question must be free."""
    for port, why in facts.get("ports", {}).get("taken", {}).items():
        find = f"Find its process with ss -ltnp 'sport = :{port}', or use another port."
        yield Finding(ERROR, f"port {port} is not free: {why.lower()}", find)


def clock(facts: Facts) -> Iterator[Finding]:
    """Clocks must agree. Otherwise logs of several hosts cannot be compared, and tickets and certificates fail."""
    ahead, behind = facts["time"] - facts["received"], facts["sent"] - facts["time"]
    if max(ahead, behind) > SKEW_S:
        evidence = f"its clock is {max(ahead, behind):.0f} s {'ahead' if ahead > behind else 'behind'}"
        yield Finding(WARNING, evidence, "Synchronise all clocks: timedatectl set-ntp true")


# -- all hosts that answered: each check compares them ----------------------------------------------------------------


def names(facts: AllFacts) -> Iterator[Finding]:
    """Each host must resolve all names, its own included, to addresses that other hosts can reach.

    Gloo resolves the name of its own host and sends the address to the other workers.
    """
    for host, _, finding in wrong_names(facts):
        yield dataclasses.replace(finding, host=host)


def versions(facts: AllFacts) -> Iterator[Finding]:
    """Packages, Python and MPI must have the same version on all hosts."""
    packages = sorted({name for each in facts.values() for name in each.get("packages", {})})
    rows = {
        name: {host: each["packages"].get(name, "") for host, each in _having(facts, "packages")} for name in packages
    }
    minor = r"\d+\.\d+"
    rows["Python"] = {host: re.findall(minor, each["python"]["version"])[0] for host, each in _having(facts, "python")}
    rows["mpirun"] = {host: _mpirun(each) for host, each in _having(facts, "mpirun")}
    for hosts, evidence in differing(rows):
        yield Finding(ERROR, evidence, "Install the same version everywhere.", hosts)


def builds(facts: AllFacts) -> Iterator[Finding]:
    """Horovod must have the same build on all hosts. A rank without NCCL waits forever for ranks with NCCL."""
    built = {host: _engine(each, "horovod").get("built_with") for host, each in facts.items()}
    found = {host: " ".join(names) for host, names in built.items() if names is not None}
    for hosts, evidence in differing({"Horovod's build": found}):
        again = f"Build Horovod again on all hosts: {INSTALL_HOROVOD} --force"
        yield Finding(ERROR, evidence, again, hosts)


def own_code(facts: AllFacts) -> Iterator[Finding]:
    """distpad must be the same on all hosts, since messages between its workers carry no version."""
    yield from _same_files(facts, "distpad", "distpad's own code", "Install the same distpad everywhere.")


def code(facts: AllFacts) -> Iterator[Finding]:
    """The folder of ``--code`` must be the same. Workers with different programs hang, or train different models."""
    folder = next(iter(facts.values()))["folder"]
    remedy = f"Copy it there: rsync -a {folder}/ HOST:{folder}/"
    yield from _same_files(facts, "code", f"the code in {folder}", remedy)


def _same_files(facts: AllFacts, key: str, what: str, remedy: str) -> Iterator[Finding]:
    found = {host: each[key] for host, each in _having(facts, key) if each[key] is not None}
    common: Facts = max(found.values(), key=list(found.values()).count, default={})
    for host, files in found.items():
        different = sorted(name for name in {*files, *common} if files.get(name) != common.get(name))
        if different:
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            evidence = f"{what} differs from the other hosts' in {', '.join(different[:3])}{more}"
            yield Finding(ERROR, evidence, remedy, host)


# name | check of one host
OF_A_HOST: dict[str, Callable[[Facts], Iterator[Finding]]] = {
    "clock": clock,
    "probes": probes,
    "TensorFlow": tensorflow,
    "Keras": keras,
    "Addons": addons,
    "Horovod": horovod,
    "Horovod's NCCL": nccl,
    "GPUs": seen_gpus,
    "slots": slots,
    "MPI": mpi,
    "operator": operator,
    "/dev/shm": shared_memory,
    "open files": open_files,
    "TF_CONFIG": tf_config,
    "ports": ports,
}
# name | comparison of all hosts that answered
OF_ALL_HOSTS: dict[str, Callable[[AllFacts], Iterator[Finding]]] = {
    "names": names,
    "versions": versions,
    "builds": builds,
    "distpad's code": own_code,
    "code": code,
}


def check(answers: Mapping[str, Mapping[str, Any]], question: Question) -> list[Finding]:
    """Return all findings, errors first. A check that passes yields a finding of state ``ok``.

    Args:
      answers: the result of ``hosts.ask``, by host.
      question: the hosts, ports and code that the user asked about.
    """
    facts: dict[str, Facts] = {}
    found: list[Finding] = []

    def add(host: str, what: str, problems: list[Finding]) -> None:
        found.extend(dataclasses.replace(each, host=each.host or host, what=what) for each in problems or [Finding(OK)])

    for host, answer in answers.items():
        if "unreachable" in answer:
            add(host, "reach", [Finding(ERROR, answer["unreachable"], answer["remedy"])])
            continue
        wanted = question.slots.get(host, 1) if question.slots_given else 0
        facts[host] = {**answer, **answer["facts"], "asked": host, "slots": wanted, "folder": question.code}
        add(host, "reach", [])
        for what, of_host in OF_A_HOST.items():
            add(host, what, [*of_host(facts[host])])
    if len(facts) > 1:
        for what, of_all in OF_ALL_HOSTS.items():
            add("all", what, [*of_all(facts)])
    order = (ERROR, WARNING, OK)
    return sorted(found, key=lambda finding: order.index(finding.state))


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
            wrong.append(Finding(ERROR, f"{host} has no {needed} GPUs for its workers: {why}", remedy))
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
                yield here, is_own, Finding(ERROR, f"{which} does not resolve", remedy)
            elif any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
                problem = f"{which} resolves to {', '.join(addresses)}, the loopback, which other hosts cannot reach"
                yield here, is_own, Finding(ERROR, problem, "Set its real address in /etc/hosts there.")


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
    return facts.get("engines", {}).get(name) or {}


def _mpirun(facts: Facts) -> str:
    return (facts.get("mpirun") or {}).get("version", "")


def _tensorflow(facts: Facts) -> tuple[str, tuple[int, ...]]:
    """TensorFlow's version, and its first two numbers; "" and () if it is not known."""
    packages = facts.get("packages", {})
    found = [packages[name] for name in ("tensorflow", "tensorflow-cpu", "tensorflow-gpu") if name in packages]
    version = _engine(facts, "tensorflow").get("version") or (found[0] if found else "")
    return version, tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _family(banner: str) -> tuple[str, int]:
    """The MPI implementation. For Open MPI also its major version, since 5 does not load libraries built for 4."""
    kinds = {"Open MPI": "Open MPI", "HYDRA": "MPICH", "MPICH": "MPICH", "Intel": "Intel MPI"}
    kind = next((kinds[mark] for mark in kinds if mark in banner), banner)
    version = re.search(r"(\d+)\.\d+", banner)
    return kind, int(version[1]) if version and kind == "Open MPI" else 0


def _mpi(banner: str) -> str:
    version = re.search(r"\d+\.[\d.]+\w*", banner)
    return f"{_family(banner)[0]} {version[0]}" if version else _family(banner)[0]
