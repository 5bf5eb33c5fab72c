"""Rules beyond the schemas: the API server's own checks, and those of the operators' controllers and webhooks.

A manifest that breaks such a rule is accepted, but does not run, or runs incorrectly. The rules come from the sources
of Kubernetes, JobSet 0.12, MPI operator 0.8 and Kubeflow Trainer 2.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from k8s import manifests, podrules
from k8s.manifests import Resource
from k8s.podrules import container, variables

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")  # DNS-1035
ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
ROOTS_KEYS = "/".join(("", "root", ".ssh"))  # the operators' default, where only root can read the key
OPEN_MPI = tuple(
    f"OMPI_MCA_{name}"
    for name in ("orte_default_hostfile", "orte_keep_fqdn_hostnames", "orte_set_default_slots", "plm_rsh_args")
)
JOB_FAILURES = (
    *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"),
)


def findings(resources: Sequence[Resource]) -> list[str]:
    return [f"{rule.__name__}: {each}" for rule in RULES for each in rule(resources)]


# -- Jobs, and what JobSets make ---------------------------------------------------------------------------------------


def job_fields(resources: Sequence[Resource]) -> Iterator[str]:
    """The API server's rules for a Job beyond its schema."""
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
    """Wrong usage and commands that cannot be started end a Job at once. A disruption does not count as a failure."""
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
    """Pods have names that resolve before the pods are ready, and variables that hold these names."""
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
        env = variables(template)
        wanted = {"DISTPAD_WORKERS": str(spec["completions"]), "DISTPAD_SERVICE": template["spec"].get("subdomain")}
        yield from (f"{key} is {env.get(key)}, not {value}" for key, value in wanted.items() if env.get(key) != value)


# -- JobSet -----------------------------------------------------------------------------------------------------------


def jobset_specs(resources: Sequence[Resource]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The spec and name of each JobSet, including the JobSets that TrainJobs create from their runtimes."""
    for resource in manifests.of_kind(resources, "JobSet"):
        yield resource["metadata"]["name"], resource["spec"]
    names = [resource["metadata"]["name"] for resource in manifests.of_kind(resources, "TrainJob")]
    for resource in manifests.of_kind(resources, "TrainingRuntime"):
        yield from ((name, resource["spec"]["template"]["spec"]) for name in names)


def jobset(resources: Sequence[Resource]) -> Iterator[str]:
    """The errors of JobSet's webhook, and settings with which pods do not find one another."""
    for name, spec in jobset_specs(resources):
        jobs = [each["name"] for each in spec["replicatedJobs"]]
        for number, each in enumerate(spec["replicatedJobs"]):
            pods = each["template"]["spec"].get("completions") or workers(resources)
            host = f"{name}-{each['name']}-{each.get('replicas', 1) - 1}-{pods - 1}"
            if not LABEL.fullmatch(f"{host}-12345"):  # the pod's name has a random suffix
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
    # The Job controller's message (pkg/controller/job/pod_failure_policy.go), and its required form.
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
    """The errors that the MPI operator's controller reports as events, and those that it ignores silently."""
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
            yield "workers run forever"
        if not spec.get("runPolicy", {}).get("backoffLimit"):
            yield "a drained node of the launcher ends the job"
        elastic = container(roles["Launcher"]["template"])["command"][2] == "mpi-elastic-launcher"
        if spec.get("launcherCreationPolicy") != ("AtStartup" if elastic else "WaitForWorkersReady"):
            yield f"launcherCreationPolicy is {spec.get('launcherCreationPolicy')}"
        env = variables(roles["Launcher"]["template"])
        wanted = {"DISTPAD_WORKERS": roles["Worker"].get("replicas"), "DISTPAD_SLOTS": spec.get("slotsPerWorker", 1)}
        yield from (f"{key} is {env.get(key)}" for key, value in wanted.items() if env.get(key) != str(value))
        yield from _mpi_pods(roles["Launcher"]["template"], roles["Worker"]["template"], spec.get("sshAuthMountPath"))


def _mpi_pods(launcher: Resource, worker: Resource, keys: str | None) -> Iterator[str]:
    """Rules for launchers and workers of both operators."""
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
    """The number of pods is the TrainJob's."""
    return max([job["spec"].get("trainer", {}).get("numNodes", 1) for job in manifests.of_kind(resources, "TrainJob")])


def trainjob(resources: Sequence[Resource]) -> Iterator[str]:
    """The errors of Trainer's webhooks, and the labels by which Trainer identifies jobs."""
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
            yield f"{ANCESTOR} is for node alone: {ancestors}"  # the job with this label gets numNodes pods
        templates = {name: each["template"]["spec"]["template"] for name, each in jobs.items()}
        yield from (f"{name}'s container" for name, pod in templates.items() if container(pod)["name"] != "node")
        yield from (
            f"{name} has {each['replicas']} replicas" for name, each in jobs.items() if each.get("replicas", 1) > 1
        )
        env = variables(templates["launcher" if "mpi" in policy else "node"])
        if env.get("DISTPAD_WORKERS") != str(trainer.get("numNodes")):
            yield f"DISTPAD_WORKERS is {env.get('DISTPAD_WORKERS')}"
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


RULES: tuple[podrules.Check, ...] = (*podrules.RULES, job_fields, not_retried, indexed_job, jobset, mpijob, trainjob)
