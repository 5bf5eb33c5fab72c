"""What no schema says: the rules of the API server's own checks, and of the operators' controllers and webhooks.

A manifest that breaks one is accepted, and then does not run; or runs, and is wrong. Read in the sources of Kubernetes,
JobSet 0.12, MPI operator 0.8 and Kubeflow Trainer 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from k8s import manifests
from k8s.manifests import Resource

Rule = Callable[[Sequence[Resource]], Iterator[str]]

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1035
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
ROOTS_KEYS = "/".join(("", "root", ".ssh"))  # the operators' default, where the key is root's alone
OPEN_MPI = tuple(
    f"OMPI_MCA_{name}"
    for name in ("orte_default_hostfile", "orte_keep_fqdn_hostnames", "orte_set_default_slots", "plm_rsh_args")
)
JOB_FAILURES = (
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"),
)


def findings(resources: Sequence[Resource]) -> list[str]:
    return [f"{rule.__name__}: {each}" for rule in RULES for each in rule(resources)]


def container(pod: Resource) -> dict[str, Any]:
    (only,) = pod["spec"]["containers"]
    return only


def variables(pod: Resource) -> dict[str, Any]:
    """Values by name; None where it is taken from elsewhere."""
    return {each["name"]: each.get("value") for each in container(pod).get("env", ())}


# -- all pods ---------------------------------------------------------------------------------------------------------


def references(resources: Sequence[Resource]) -> Iterator[str]:
    """What a pod names is there: volumes, claims, its account, the variables in its arguments."""
    there = {manifests.called(resource) for resource in resources}
    for path, pod in manifests.pods(resources).items():
        spec, only = pod["spec"], container(pod)
        volumes = [volume["name"] for volume in spec.get("volumes", ())]
        mounts = only.get("volumeMounts", ())
        yield from (f"{path}: no volume {each['name']}" for each in mounts if each["name"] not in volumes)
        paths = [each["mountPath"] for each in mounts]
        yield from (f"{path}: {each} is mounted twice" for each in sorted(set(paths)) if paths.count(each) > 1)
        names = [each["name"] for each in only.get("env", ())]
        yield from (f"{path}: {name} is set twice" for name in sorted(set(names)) if names.count(name) > 1)
        yield from (f"{path}: {name} is empty" for name, value in variables(pod).items() if value == "")
        for word in (*only.get("command", ()), *only.get("args", ())):
            yield from (f"{path}: no variable {name}" for name in re.findall(r"\$\((\w+)\)", word) if name not in names)
        wanted = [f"ServiceAccount/{spec['serviceAccountName']}"]
        claims = [volume.get("persistentVolumeClaim") for volume in spec.get("volumes", ())]
        wanted += [f"PersistentVolumeClaim/{claim['claimName']}" for claim in claims if claim]
        yield from (f"{path}: there is no {name}" for name in wanted if name not in there)


def shared_memory(resources: Sequence[Resource]) -> Iterator[str]:
    """/dev/shm is memory with a limit, which is part of the container's."""
    for path, pod in manifests.pods(resources).items():
        mounted = {each["mountPath"]: each["name"] for each in container(pod).get("volumeMounts", ())}
        volumes = {volume["name"]: volume.get("emptyDir", {}) for volume in pod["spec"].get("volumes", ())}
        found = volumes.get(mounted.get("/dev/shm"), {})
        if found.get("medium") != "Memory" or "sizeLimit" not in found:
            yield f"{path}: /dev/shm is {found}"
        elif gibibytes(found["sizeLimit"]) >= gibibytes(
            container(pod)["resources"].get("limits", {}).get("memory", "0Gi")
        ):
            yield f"{path}: /dev/shm may take all of the memory"


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()
    return int(number) / {"Mi": 1024, "Gi": 1}[unit]


def resources_are_limits(resources: Sequence[Resource]) -> Iterator[str]:
    """Requests are limits: for GPUs Kubernetes asks for it, for the rest it keeps pods from being evicted."""
    for path, pod in manifests.pods(resources).items():
        told = container(pod)["resources"]
        if told.get("requests") != told.get("limits") or not {"cpu", "memory"} <= set(told.get("limits", {})):
            yield f"{path}: {told}"


def time_to_end(resources: Sequence[Resource]) -> Iterator[str]:
    """The entry point gives up on the training before Kubernetes gives up on the pod."""
    for path, pod in manifests.pods(resources).items():
        words = container(pod)["command"]
        grace = float(words[words.index("--grace-s") + 1]) if "--grace-s" in words else 0
        if grace >= pod["spec"].get("terminationGracePeriodSeconds", 30):
            yield f"{path}: --grace-s {grace:g} is more than the pod has"


def security(resources: Sequence[Resource]) -> Iterator[str]:
    """Beyond the standard *restricted*: no token, nothing to be written but volumes, no secret in a variable."""
    for path, pod in manifests.pods(resources).items():
        spec, only = pod["spec"], container(pod)
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{path}: gets a token"
        if only.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{path}: may write anywhere"
        if variables(pod).get("HOME") not in [each["mountPath"] for each in only["volumeMounts"]]:
            yield f"{path}: HOME cannot be written"
        taken = [*only.get("envFrom", ()), *(each.get("valueFrom", {}) for each in only.get("env", ()))]
        yield from (f"{path}: a secret in a variable" for each in taken if set(each) & {"secretRef", "secretKeyRef"})
        shown = " ".join([*only.get("command", ()), *only.get("args", ()), *map(str, variables(pod).values())])
        yield from (f"{path}: {word}" for word in re.findall(r"(?i)\S*(?:password|api[_-]?key)\S*", shown))
    for account in manifests.of_kind(resources, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield f"{manifests.called(account)}: hands out tokens"


def network(resources: Sequence[Resource]) -> Iterator[str]:
    """The policy is for all pods of the job, and lets them through to one another, at all TCP ports, and to DNS."""
    policies = manifests.of_kind(resources, "NetworkPolicy")
    if len(policies) != 1:
        yield f"{len(policies)} policies"
        return
    spec = policies[0]["spec"]
    chosen = spec["podSelector"].get("matchLabels", {})
    for path, pod in manifests.pods(resources).items():
        if not chosen or not chosen.items() <= pod["metadata"].get("labels", {}).items():
            yield f"{path}: is not chosen by {chosen}"
    own = [{"podSelector": {"matchLabels": chosen}}]
    if spec.get("policyTypes") != ["Ingress", "Egress"]:
        yield f"policyTypes are {spec.get('policyTypes')}"
    if spec.get("ingress") != [{"from": own, "ports": [{"protocol": "TCP"}]}]:
        yield f"ingress is {spec.get('ingress')}"
    inside, *others = spec.get("egress") or [None]
    if inside != {"to": own, "ports": [{"protocol": "TCP"}]}:
        yield f"egress begins with {inside}"
    dns = [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    if [rule.get("ports") for rule in others] != [dns] or not all(rule.get("to") for rule in others):
        yield f"egress beyond the job is {others}"


# -- Jobs, and what JobSets make ---------------------------------------------------------------------------------------


def job_fields(resources: Sequence[Resource]) -> Iterator[str]:
    """What the API server asks of a Job beyond its schema."""
    for path, job in manifests.jobs(resources).items():
        spec = job["spec"]
        policy = spec.get("podFailurePolicy")
        if policy and spec["template"]["spec"].get("restartPolicy") != "Never":
            yield f"{path}: podFailurePolicy needs restartPolicy Never"
        if policy and spec.get("podReplacementPolicy") != "Failed":
            yield f"{path}: podReplacementPolicy is {spec.get('podReplacementPolicy')}: a pod could be there twice"
        if "backoffLimitPerIndex" in spec:
            yield f"{path}: backoffLimitPerIndex is for pods that do not need one another"
        if spec.get("completionMode") != "Indexed":
            yield f"{path}: pods have no numbers"
        if spec.get("completions") != spec.get("parallelism"):
            yield f"{path}: {spec.get('parallelism')} pods at once of {spec.get('completions')}"
        for rule in (policy or {}).get("rules", ()):
            codes = rule.get("onExitCodes", {}).get("values", [1])
            if ("onExitCodes" in rule) == ("onPodConditions" in rule):
                yield f"{path}: a rule is of exit codes or of conditions"
            if codes != sorted(set(codes)) or 0 in codes or not all(0 <= code <= 255 for code in codes):
                yield f"{path}: exit codes {codes}"


def not_retried(resources: Sequence[Resource]) -> Iterator[str]:
    """Wrong usage and commands that cannot be started end a Job at once; a disruption is not counted as a failure."""
    for path, job in manifests.jobs(resources).items():
        rules = job["spec"].get("podFailurePolicy", {}).get("rules", ())
        final = [rule["onExitCodes"] for rule in rules[:1] if rule["action"] == "FailJob" and "onExitCodes" in rule]
        serves_ssh = container(job["spec"]["template"])["command"][2] == "mpi-worker"
        if final != [{"operator": "In", "values": [2, 126, 127]}] and not serves_ssh:
            yield f"{path}: 2, 126 and 127 are not final"
        wanted = "Ignore" if job["kind"] == "Job" and path.startswith("Job/") else "FailJob"  # JobSet decides
        disrupted = {"action": wanted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
        if disrupted not in rules:
            yield f"{path}: a disruption is counted"


def indexed_job(resources: Sequence[Resource]) -> Iterator[str]:
    """Pods have names that lead to them, ready or not, and they are told which."""
    services = {service["metadata"]["name"]: service["spec"] for service in manifests.of_kind(resources, "Service")}
    for job in manifests.of_kind(resources, "Job"):
        spec, template = job["spec"], job["spec"]["template"]
        name = f"{job['metadata']['name']}-{spec['completions'] - 1}"
        if not LABEL.fullmatch(name):
            yield f"{name} is no host name"
        service = services.get(template["spec"].get("subdomain"), {})
        if service.get("clusterIP") != "None":
            yield f"subdomain {template['spec'].get('subdomain')} is no headless Service"
        if service.get("publishNotReadyAddresses") is not True:
            yield "pods are not found before they are ready"
        if not service.get("selector", {}).items() <= template["metadata"]["labels"].items():
            yield f"the Service chooses {service.get('selector')}"
        told = variables(template)
        wanted = {"DISTPAD_WORKERS": str(spec["completions"]), "DISTPAD_SERVICE": template["spec"].get("subdomain")}
        yield from (f"{key} is {told.get(key)}, not {value}" for key, value in wanted.items() if told.get(key) != value)


# -- JobSet -----------------------------------------------------------------------------------------------------------


def jobset_specs(resources: Sequence[Resource]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each JobSet's spec and the name that it will have: a TrainJob becomes one of its runtime's."""
    for resource in manifests.of_kind(resources, "JobSet"):
        yield resource["metadata"]["name"], resource["spec"]
    names = [resource["metadata"]["name"] for resource in manifests.of_kind(resources, "TrainJob")]
    for resource in manifests.of_kind(resources, "TrainingRuntime"):
        yield from ((name, resource["spec"]["template"]["spec"]) for name in names)


def jobset(resources: Sequence[Resource]) -> Iterator[str]:
    """What JobSet's webhook refuses, and what would make pods that do not find one another."""
    for name, spec in jobset_specs(resources):
        jobs = [each["name"] for each in spec["replicatedJobs"]]
        for number, each in enumerate(spec["replicatedJobs"]):
            pods = each["template"]["spec"].get("completions") or workers(resources)
            host = f"{name}-{each['name']}-{each.get('replicas', 1) - 1}-{pods - 1}"
            if not LABEL.fullmatch(host):
                yield f"{host} is no host name"
            earlier = set(jobs[:number])
            named = {dependency["name"] for dependency in each.get("dependsOn", ())}
            yield from (
                f"{each['name']} depends on {other}, which is not before it" for other in sorted(named - earlier)
            )
            if each["template"]["spec"].get("backoffLimit") != 0:
                yield f"{each['name']}: pods are replaced one by one"
        targets = {
            target
            for policy in (spec.get("successPolicy", {}), *spec.get("failurePolicy", {}).get("rules", ()))
            for target in policy.get("targetReplicatedJobs", ())
        }
        yield from (f"there is no {target}" for target in sorted(targets - set(jobs)))
        if not all(spec.get("network", {}).get(key) for key in ("enableDNSHostnames", "publishNotReadyAddresses")):
            yield f"network is {spec.get('network')}"
        yield from _jobset_failures(spec.get("failurePolicy", {}))


def _jobset_failures(policy: dict[str, Any]) -> Iterator[str]:
    if not 1 <= policy.get("maxRestarts", 0) <= 10:
        yield f"maxRestarts is {policy.get('maxRestarts')}"
    if policy.get("restartStrategy") != "BlockingRecreate":
        yield "a pod could be there twice"
    names = [rule["name"] for rule in policy.get("rules", ())]
    yield from (f"rule {name}" for name in names if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", name))
    if len(set(names)) < len(names):
        yield f"rules {names}"
    reasons = {reason for rule in policy.get("rules", ()) for reason in rule.get("onJobFailureReasons", ())}
    yield from (f"no Job fails by {reason}" for reason in sorted(reasons - set(JOB_FAILURES)))
    # What the Job controller writes (pkg/controller/job/pod_failure_policy.go), and what has to follow.
    for message, action in (
        ("Container node for pod a/b failed with exit code 2 matching FailJob rule at index 0", "FailJobSet"),
        (
            "Pod a/b has condition DisruptionTarget matching FailJob rule at index 2",
            "RestartJobSetAndIgnoreMaxRestarts",
        ),
    ):
        found = [
            rule["action"]
            for rule in policy.get("rules", ())
            if "PodFailurePolicy" in rule.get("onJobFailureReasons", ["PodFailurePolicy"])
            and any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""]))
        ]
        if found[:1] != [action]:
            yield f"{message!r} is met by {found[:1]}, not {action}"


# -- MPI operator -----------------------------------------------------------------------------------------------------


def mpijob(resources: Sequence[Resource]) -> Iterator[str]:
    """What the MPI operator's controller refuses with an event, and what it would do in silence."""
    for job in manifests.of_kind(resources, "MPIJob"):
        spec, roles = job["spec"], job["spec"]["mpiReplicaSpecs"]
        if set(roles) != {"Launcher", "Worker"}:
            yield f"roles {sorted(roles)}"
            continue
        if roles["Launcher"].get("replicas") != 1:
            yield f"{roles['Launcher'].get('replicas')} launchers"
        if roles["Worker"].get("replicas", 0) < 1:
            yield "no workers"
        name = f"{job['metadata']['name']}-worker-{roles['Worker'].get('replicas', 1) - 1}"
        if not LABEL.fullmatch(name):
            yield f"{name} is no host name"
        for role, replica in roles.items():
            if replica.get("restartPolicy") not in ("Never", "OnFailure"):
                yield f"{role} has restartPolicy {replica.get('restartPolicy')}"
            if "restartPolicy" in replica["template"]["spec"]:
                yield f"{role}'s template has a restartPolicy, which is overridden with a warning"
        if roles["Worker"].get("restartPolicy") != "OnFailure":
            yield "a worker pod that failed is not replaced"
        if spec.get("runPolicy", {}).get("cleanPodPolicy") not in ("Running", "All"):
            yield "workers run for ever"
        if spec.get("runPolicy", {}).get("backoffLimit") != 0:
            yield "the launcher's Job has no podFailurePolicy: it would start again what must not be"
        elastic = container(roles["Launcher"]["template"])["command"][2] == "mpi-elastic-launcher"
        if spec.get("launcherCreationPolicy") != ("AtStartup" if elastic else "WaitForWorkersReady"):
            yield f"launcherCreationPolicy is {spec.get('launcherCreationPolicy')}"
        told = variables(roles["Launcher"]["template"])
        wanted = {"DISTPAD_WORKERS": roles["Worker"].get("replicas"), "DISTPAD_SLOTS": spec.get("slotsPerWorker", 1)}
        yield from (f"{key} is {told.get(key)}" for key, value in wanted.items() if told.get(key) != str(value))
        yield from _mpi_pods(roles["Launcher"]["template"], roles["Worker"]["template"], spec.get("sshAuthMountPath"))


def _mpi_pods(launcher: Resource, worker: Resource, keys: str | None) -> Iterator[str]:
    """Launchers and workers of both operators."""
    if keys in (None, ROOTS_KEYS):
        yield f"sshAuthMountPath is {keys}: keys are root's alone there"
    for pod in (launcher, worker):
        if not pod["spec"].get("securityContext", {}).get("fsGroup"):
            yield "no fsGroup: keys cannot be read"
        yield from (f"{name} is the operator's to set" for name in variables(pod) if name in OPEN_MPI)
        yield from (f"{name} is the operator's to set" for name in variables(pod) if name == "K_MPI_JOB_ROLE")
    if container(worker)["command"][:3] != ["distpad", "pod", "mpi-worker"]:
        yield f"workers run {container(worker)['command']}"
    ports = {port["name"]: port["containerPort"] for port in container(worker).get("ports", ())}
    if container(worker).get("readinessProbe", {}).get("tcpSocket") != {"port": "ssh"} or ports != {"ssh": 2222}:
        yield "a worker is ready before its sshd is"


# -- Kubeflow Trainer -------------------------------------------------------------------------------------------------


def workers(resources: Sequence[Resource]) -> int:
    """As many pods as a TrainJob asks for."""
    return max([job["spec"].get("trainer", {}).get("numNodes", 1) for job in manifests.of_kind(resources, "TrainJob")])


def trainjob(resources: Sequence[Resource]) -> Iterator[str]:
    """What Trainer's webhooks refuse, and the names by which it knows what is what."""
    for place, job in enumerate(resources):
        if job["kind"] != "TrainJob":
            continue
        reference, trainer = job["spec"]["runtimeRef"], job["spec"].get("trainer", {})
        before = {manifests.called(resource): resource for resource in resources[:place]}
        runtime = before.get(f"{reference.get('kind', 'ClusterTrainingRuntime')}/{reference['name']}")
        if runtime is None:
            yield f"there is no runtime {reference} before the TrainJob"
            continue
        policy = runtime["spec"].get("mlPolicy", {})
        if policy.get("numNodes") != trainer.get("numNodes"):
            yield f"the runtime has {policy.get('numNodes')} nodes"
        jobs = {each["name"]: each for each in runtime["spec"]["template"]["spec"]["replicatedJobs"]}
        if set(jobs) != {"node", *(["launcher"] if "mpi" in policy else [])}:
            yield f"replicated jobs are {sorted(jobs)}"
            continue
        ancestors = {name: each["template"].get("metadata", {}).get("labels", {}) for name, each in jobs.items()}
        if [name for name, labels in ancestors.items() if labels.get(ANCESTOR) == "trainer"] != ["node"]:
            yield f"{ANCESTOR} is for node alone: {ancestors}"  # who has it gets numNodes pods
        templates = {name: each["template"]["spec"]["template"] for name, each in jobs.items()}
        yield from (f"{name}'s container" for name, pod in templates.items() if container(pod)["name"] != "node")
        yield from (
            f"{name} has {each['replicas']} replicas" for name, each in jobs.items() if each.get("replicas", 1) > 1
        )
        told = variables(templates["launcher" if "mpi" in policy else "node"])
        if told.get("DISTPAD_WORKERS") != str(trainer.get("numNodes")):
            yield f"DISTPAD_WORKERS is {told.get('DISTPAD_WORKERS')}"
        if "mpi" in policy:
            yield from _mpi_runtime(runtime, policy["mpi"], jobs)


def _mpi_runtime(runtime: Resource, policy: dict[str, Any], jobs: dict[str, Any]) -> Iterator[str]:
    launcher, node = (jobs[name]["template"]["spec"]["template"] for name in ("launcher", "node"))
    if jobs["launcher"].get("dependsOn") != [{"name": "node", "status": "Ready"}]:
        yield "the launcher does not wait for the nodes"
    if jobs["launcher"]["template"]["spec"].get("parallelism") != 1:
        yield "several launchers"
    if runtime["spec"]["template"]["spec"].get("successPolicy", {}).get("targetReplicatedJobs") != ["launcher"]:
        yield "it ends when sshd does"
    if policy.get("runLauncherAsNode"):
        yield "the launcher, which has no GPU, trains"
    if str(policy.get("numProcPerNode")) != variables(launcher).get("DISTPAD_SLOTS"):
        yield f"{policy.get('numProcPerNode')} processes a pod, of {variables(launcher).get('DISTPAD_SLOTS')} slots"
    yield from _mpi_pods(launcher, node, policy.get("sshAuthMountPath"))


RULES: tuple[Rule, ...] = (
    *(references, shared_memory, resources_are_limits, time_to_end, security, network),
    *(job_fields, not_retried, indexed_job, jobset, mpijob, trainjob),
)
