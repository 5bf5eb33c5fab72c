"""Each check of manifests detects its errors: it reports a manifest that is changed in one place."""

from __future__ import annotations

import json
import pathlib
import subprocess

import pytest
import yaml

from k8s import controllers, manifests, schemas

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("manifests")]  # builds are cached

JOB, JOBSET, MPIJOB, TRAINJOB = "Job/train", "JobSet/train", "MPIJob/train", "TrainJob/train"
MULTIWORKER = MPI = "TrainingRuntime/train"
NODE = "spec.replicatedJobs.0.template"
REPLICAS, NODES = "spec.mpiReplicaSpecs.Worker.replicas", "spec.trainer.numNodes"
POLICY = "NetworkPolicy/train"
RUNTIME = "spec.template.spec"
OF_NODE = f"{RUNTIME}.replicatedJobs.0.template"
LAUNCHER, WORKER = (f"spec.mpiReplicaSpecs.{role}.template.spec.containers.0" for role in ("Launcher", "Worker"))


# -- what a schema refuses: test_crds.py has a fault for each rule of the operators' -----------------------------------------------------------------------------------

# overlay | resource | path | value (None: removed) | message
UNFIT = (
    ("indexed-job", JOB, "spec.completion", 2, "'completion' was unexpected"),
    ("indexed-job", JOB, "spec.completions", "2", "is not of type 'integer'"),
    ("indexed-job", JOB, "spec.template.spec.containers.0.securityContext.readOnlyRootFileSystem", True, "unexpected"),
    ("indexed-job", "Service/train", "spec.headless", True, "unexpected"),
    ("jobset", JOBSET, "spec.replicatedJobs.-", {"name": "node", "template": {}}, "is a duplicate"),
    ("jobset", JOBSET, "metadata.label", {}, "unexpected"),
    ("trainjob", MULTIWORKER, f"{OF_NODE}.spec.template.spec.volumes.0.hostpath", {}, "unexpected"),
)


@pytest.mark.parametrize(("overlay", "name", "path", "value", "message"), UNFIT)
def test_schemas_refuse(overlay, name, path, value, message):
    found = schemas.findings(manifests.find(manifests.changed(overlay, name, path, value), name))
    assert any(message in each for each in found), found


@pytest.mark.parametrize("version", schemas.VERSIONS)
def test_each_version_of_kubernetes_is_asked(version):
    resources = manifests.changed("jobset", JOBSET, f"{NODE}.spec.template.spec.hostNetworks", True)
    assert (
        sum(f"{version}: " in each for each in schemas.findings(manifests.find(resources, JOBSET))) == 2
    )  # Job and Pod


# overlay | resource | path | value | CEL rule
RULES = (
    ("jobset", JOBSET, "spec.startupPolicy", {"startupPolicyOrder": "InOrder"}, None),
    ("trainjob", MULTIWORKER, "spec.mlPolicy", {"mpi": {}, "torch": {}}, "Only one of the policy"),
    ("trainjob", TRAINJOB, "metadata.name", "1st", "RFC 1035"),
    ("trainjob", TRAINJOB, "metadata.name", "a" * 64, "no more than 63"),
    ("trainjob", TRAINJOB, "spec.managedBy", "me", "must be"),
)


@pytest.mark.parametrize(("overlay", "name", "path", "value", "message"), RULES)
def test_rules_in_cel_refuse(overlay, name, path, value, message):
    changed = manifests.find(manifests.overlay(overlay), name)
    manifests.put(changed, path, value)
    if message is None:  # a rule on two fields: change the other one too
        assert not schemas.findings(changed)
        first = {"name": "first", "template": changed["spec"]["replicatedJobs"][0]["template"]}
        changed["spec"]["replicatedJobs"].insert(0, first)
        changed["spec"]["replicatedJobs"][1]["dependsOn"] = [{"name": "first", "status": "Ready"}]
        message = "DependsOn"
    found = schemas.findings(changed)
    assert any(message in each for each in found), found


@pytest.mark.parametrize(
    ("overlay", "name", "path", "value"),
    [
        ("trainjob", TRAINJOB, NODES, 3),
        ("trainjob-mpi", TRAINJOB, "spec.runtimeRef.name", "other"),
        ("jobset", JOBSET, "spec.failurePolicy.maxRestarts", 9),
        ("jobset", JOBSET, "spec.network.subdomain", "other"),
    ],
)
def test_what_cannot_be_changed_later(overlay, name, path, value):
    """The READMEs therefore instruct: delete, and apply again."""
    old, new = (
        manifests.find(manifests.overlay(overlay), name),
        manifests.find(manifests.changed(overlay, name, path, value), name),
    )
    assert not schemas.findings(old, old) and not schemas.findings(new)
    assert any("immutable" in each or "oldSelf" in each for each in schemas.findings(new, old))


def test_every_rule_of_the_crds_can_be_evaluated():
    """No rule is skipped because of unsupported CEL syntax."""
    rules = {
        rule["rule"]
        for schema in schemas.crds().values()
        for _, part in manifests.walk(schema)
        if isinstance(part, dict) and isinstance(part.get("x-kubernetes-validations"), list)
        for rule in part["x-kubernetes-validations"]
    }
    assert len(rules) >= 10
    for rule in rules:
        schemas._compiled(rule)


# -- what only the controllers refuse ---------------------------------------------------------------------------------

POD = "spec.template.spec"
PLAIN = f"{POD}.containers.0"
# overlay | resource | path | value (None: removed) | the check that reports it
WRONG = (
    ("indexed-job", JOB, f"{PLAIN}.volumeMounts.0.name", "dta", "references"),
    ("indexed-job", JOB, f"{PLAIN}.volumeMounts.0.mountPath", "/tmp", "references"),
    ("indexed-job", JOB, f"{PLAIN}.args.-", "$(NOBODY)", "references"),
    ("indexed-job", JOB, f"{PLAIN}.env.-", {"name": "HOME", "value": "/tmp"}, "references"),
    ("indexed-job", JOB, f"{PLAIN}.env.1.value", "", "references"),
    ("indexed-job", JOB, "spec.template.metadata.labels.app", "from values.yaml", "references"),
    ("indexed-job", JOB, f"{POD}.volumes.1.emptyDir", {}, "shared_memory"),
    ("indexed-job", JOB, f"{POD}.volumes.1.emptyDir.sizeLimit", None, "shared_memory"),
    ("indexed-job", JOB, f"{POD}.volumes.1.emptyDir.sizeLimit", "8Gi", "shared_memory"),
    ("mpijob", MPIJOB, f"{WORKER}.volumeMounts.1.mountPath", "/shm", "shared_memory"),
    ("indexed-job", JOB, f"{PLAIN}.resources.requests.memory", "1Gi", "resources_are_limits"),
    ("jobset", JOBSET, f"{NODE}.spec.template.spec.containers.0.resources", {}, "resources_are_limits"),
    ("indexed-job", JOB, f"{POD}.terminationGracePeriodSeconds", 30, "time_to_end"),
    ("indexed-job", JOB, f"{POD}.automountServiceAccountToken", None, "security"),
    ("indexed-job", JOB, "spec.template.metadata.labels", {"sidecar.istio.io/inject": "true"}, "security"),
    ("trainjob", MULTIWORKER, f"{OF_NODE}.spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", False, "restricted"),
    ("indexed-job", JOB, f"{POD}.hostNetwork", True, "restricted"),
    ("indexed-job", JOB, f"{PLAIN}.ports", [{"containerPort": 80, "hostPort": 80}], "restricted"),
    ("indexed-job", JOB, f"{PLAIN}.livenessProbe", {"tcpSocket": {"host": "other", "port": 1}}, "restricted"),
    ("indexed-job", JOB, f"{POD}.volumes.-", {"name": "x", "nfs": {"server": "s", "path": "/"}}, "restricted"),
    ("indexed-job", JOB, f"{POD}.initContainers", [{"name": "first", "image": "x"}], "restricted"),
    ("indexed-job", JOB, f"{POD}.securityContext.runAsNonRoot", None, "restricted"),
    ("indexed-job", JOB, f"{POD}.securityContext.runAsUser", 0, "restricted"),
    ("indexed-job", JOB, f"{POD}.securityContext.sysctls", [{"name": "kernel.msgmax", "value": "1"}], "restricted"),
    ("mpijob", MPIJOB, f"{WORKER}.securityContext.allowPrivilegeEscalation", None, "restricted"),
    ("mpijob", MPIJOB, f"{LAUNCHER}.securityContext.capabilities.drop.0", "NET_RAW", "restricted"),
    ("mpijob", MPIJOB, f"{LAUNCHER}.securityContext.capabilities.add", ["SYS_PTRACE"], "restricted"),
    ("indexed-job", JOB, f"{PLAIN}.envFrom", [{"secretRef": {"name": "x"}}], "security"),
    ("indexed-job", JOB, f"{PLAIN}.env.-", {"name": "A", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}, "security"),
    ("indexed-job", JOB, f"{PLAIN}.args.-", "--password=1", "security"),
    ("jobset", POLICY, "spec.podSelector", {}, "network"),
    ("jobset", POLICY, "spec.podSelector.matchLabels.app", "x", "network"),
    ("jobset", POLICY, "spec.policyTypes", ["Ingress"], "network"),
    ("jobset", POLICY, "spec.ingress.0.from", None, "network"),
    ("jobset", POLICY, "spec.ingress.0.ports.0.port", 2222, "network"),
    ("jobset", POLICY, "spec.egress.1", None, "network"),
    ("jobset", POLICY, "spec.egress.-", {}, "network"),
    ("jobset", POLICY, "spec.egress.1.to", [{"podSelector": {}}], "network"),
    ("indexed-job", JOB, "spec.parallelism", 1, "job_fields"),
    ("indexed-job", JOB, "spec.completionMode", None, "job_fields"),
    ("indexed-job", JOB, "spec.podReplacementPolicy", None, "job_fields"),
    ("indexed-job", JOB, "spec.backoffLimitPerIndex", 1, "job_fields"),
    ("indexed-job", JOB, f"{POD}.restartPolicy", "OnFailure", "job_fields"),
    ("indexed-job", JOB, "spec.podFailurePolicy.rules.0.onExitCodes.values", [2, 127, 126], "job_fields"),
    ("jobset", JOBSET, f"{NODE}.spec.podFailurePolicy.rules.0.onExitCodes.values.-", 0, "job_fields"),
    ("indexed-job", JOB, "spec.podFailurePolicy.rules.0", None, "not_retried"),
    ("indexed-job", JOB, "spec.podFailurePolicy.rules.2", None, "not_retried"),
    ("jobset", JOBSET, f"{NODE}.spec.podFailurePolicy.rules.1.action", "Ignore", "not_retried"),
    ("trainjob-mpi", MPI, f"{RUNTIME}.replicatedJobs.1.template.spec.podFailurePolicy", None, "not_retried"),
    ("indexed-job", JOB, "metadata.name", "a" * 62, "indexed_job"),
    ("indexed-job", JOB, f"{POD}.subdomain", "other", "indexed_job"),
    ("indexed-job", "Service/train", "spec.clusterIP", None, "indexed_job"),
    ("indexed-job", "Service/train", "spec.publishNotReadyAddresses", False, "indexed_job"),
    ("indexed-job", "Service/train", "spec.selector.app", "x", "indexed_job"),
    ("indexed-job", JOB, "spec.completions", 3, "indexed_job"),
    ("jobset", JOBSET, "metadata.name", "a" * 55, "jobset"),
    ("jobset", JOBSET, "spec.network.publishNotReadyAddresses", False, "jobset"),
    ("jobset", JOBSET, f"{NODE}.spec.backoffLimit", 6, "jobset"),
    ("jobset", JOBSET, "spec.replicatedJobs.0.dependsOn", [{"name": "node", "status": "Ready"}], "jobset"),
    ("jobset", JOBSET, "spec.successPolicy", {"operator": "All", "targetReplicatedJobs": ["other"]}, "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.maxRestarts", 0, "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.restartStrategy", None, "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.rules.0.name", "not final", "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.rules.0.name", "final", "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.rules.0.onJobFailureReasons", ["Failed"], "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.rules.0.onJobFailureMessagePatterns", None, "jobset"),
    ("jobset", JOBSET, "spec.failurePolicy.rules.1", None, "jobset"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Launcher.replicas", 2, "mpijob"),
    ("mpijob", MPIJOB, REPLICAS, 0, "mpijob"),
    ("mpijob", MPIJOB, REPLICAS, 3, "mpijob"),
    ("mpijob", MPIJOB, "spec.slotsPerWorker", 2, "mpijob"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Launcher", None, "mpijob"),
    ("mpijob", MPIJOB, "metadata.name", "a" * 55, "mpijob"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Launcher.restartPolicy", "Always", "mpijob"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Worker.restartPolicy", "Never", "mpijob"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Worker.template.spec.restartPolicy", "Never", "mpijob"),
    ("mpijob", MPIJOB, "spec.runPolicy.cleanPodPolicy", None, "mpijob"),
    ("mpijob", MPIJOB, "spec.runPolicy.backoffLimit", 0, "mpijob"),
    ("mpijob", MPIJOB, "spec.launcherCreationPolicy", None, "mpijob"),
    ("mpijob-elastic", MPIJOB, "spec.launcherCreationPolicy", "WaitForWorkersReady", "mpijob"),
    ("mpijob", MPIJOB, "spec.sshAuthMountPath", None, "mpijob"),
    ("mpijob", MPIJOB, "spec.sshAuthMountPath", controllers.ROOTS_KEYS, "mpijob"),
    ("mpijob", MPIJOB, "spec.mpiReplicaSpecs.Worker.template.spec.securityContext.fsGroup", None, "mpijob"),
    ("mpijob", MPIJOB, f"{LAUNCHER}.env.-", {"name": "OMPI_MCA_plm_rsh_args", "value": "-v"}, "mpijob"),
    ("mpijob", MPIJOB, f"{WORKER}.env.-", {"name": "K_MPI_JOB_ROLE", "value": "worker"}, "mpijob"),
    ("mpijob", MPIJOB, f"{WORKER}.command", ["/usr/sbin/sshd", "-De", "-p2222"], "mpijob"),
    ("mpijob", MPIJOB, f"{WORKER}.readinessProbe", None, "mpijob"),
    ("mpijob", MPIJOB, f"{WORKER}.ports.0.containerPort", 22, "mpijob"),
    ("trainjob", TRAINJOB, "spec.runtimeRef.kind", None, "trainjob"),
    ("trainjob", TRAINJOB, "spec.runtimeRef.name", "other", "trainjob"),
    ("trainjob", TRAINJOB, NODES, 3, "trainjob"),
    ("trainjob", MULTIWORKER, f"{RUNTIME}.replicatedJobs.0.name", "worker", "trainjob"),
    ("trainjob", MULTIWORKER, f"{RUNTIME}.replicatedJobs.0.replicas", 2, "trainjob"),
    ("trainjob", MULTIWORKER, f"{OF_NODE}.metadata.labels", {}, "trainjob"),
    ("trainjob", MULTIWORKER, f"{OF_NODE}.spec.template.spec.containers.0.name", "train", "trainjob"),
    ("trainjob-mpi", MPI, f"{RUNTIME}.replicatedJobs.1.template.metadata", {"labels": {controllers.ANCESTOR: "trainer"}}, "trainjob"),
    ("trainjob-mpi", MPI, f"{RUNTIME}.replicatedJobs.1.dependsOn", None, "trainjob"),
    ("trainjob-mpi", MPI, f"{RUNTIME}.replicatedJobs.1.template.spec.parallelism", 2, "trainjob"),
    ("trainjob-mpi", MPI, f"{RUNTIME}.successPolicy", None, "trainjob"),
    ("trainjob-mpi", MPI, "spec.mlPolicy.mpi.numProcPerNode", 2, "trainjob"),
    ("trainjob-mpi", MPI, "spec.mlPolicy.mpi.runLauncherAsNode", True, "trainjob"),
    ("trainjob-mpi", MPI, "spec.mlPolicy.mpi.sshAuthMountPath", None, "trainjob"),
)  # fmt: skip


@pytest.mark.parametrize(("overlay", "name", "path", "value", "check"), WRONG)
def test_controllers_rules_bite(overlay, name, path, value, check):
    found = controllers.findings(manifests.changed(overlay, name, path, value))
    assert any(each.startswith(f"{check}: ") for each in found), found


def test_every_rule_is_shown_to_refuse():
    assert {check for *_, check in WRONG} == {rule.__name__ for rule in controllers.RULES}


def test_a_runtime_comes_before_its_job():
    resources = manifests.overlay("trainjob")
    assert [resource["kind"] for resource in resources][-2:] == ["TrainingRuntime", "TrainJob"]
    assert any("before the TrainJob" in each for each in controllers.findings(resources[::-1]))


# -- checkov ----------------------------------------------------------------------------------------------------------

# check | why it is skipped
LEFT_OUT = {
    "CKV_K8S_21": "the namespace is chosen where it is applied: kubectl apply -n",
    "CKV_K8S_43": "the image, with its digest, is the user's to name: kustomize edit set image",
}
# check | path in the pod's spec | value
CARELESS = (
    ("CKV_K8S_16", "containers.0.securityContext.privileged", True),
    ("CKV_K8S_20", "containers.0.securityContext.allowPrivilegeEscalation", True),
    ("CKV_K8S_22", "containers.0.securityContext.readOnlyRootFilesystem", None),
    ("CKV_K8S_37", "containers.0.securityContext.capabilities", {"add": ["NET_RAW"]}),
    ("CKV_K8S_31", "securityContext.seccompProfile", None),
    ("CKV_K8S_38", "automountServiceAccountToken", None),
    ("CKV_K8S_40", "securityContext.runAsUser", 100),
    ("CKV_K8S_13", "containers.0.resources.limits.memory", None),
    ("CKV_K8S_14", "containers.0.image", "distpad:latest"),
    ("CKV_K8S_17", "hostPID", True),
    ("CKV_K8S_35", "containers.0.env", [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "x", "key": "y"}}}]),
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, list[dict]]:
    """checkov's reports by file, for all overlays, and for overlays with one careless change each."""
    folder = tmp_path_factory.mktemp("checkov")
    for overlay in manifests.OVERLAYS:
        written(folder, overlay, manifests.with_components(overlay, ("network-policy",)))
    for check, path, value in CARELESS:
        runtime = manifests.of_kind(manifests.overlay("trainjob"), "TrainingRuntime")
        (pod,) = manifests.pods(runtime).values()
        manifests.put(pod["spec"], path, value)
        written(folder, check, runtime)
    flags = ["--framework", "kubernetes", "--output", "json", "--skip-download", "--skip-check", ",".join(LEFT_OUT)]
    command = [manifests.tool("checkov"), "--directory", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)["results"]


def written(folder: pathlib.Path, name: str, resources: list) -> None:
    """Write manifests for checkov. It skips custom resources, so their pods are written separately, as Jobs."""
    built_in = [resource for resource in resources if schemas.is_built_in(resource)]
    templates = manifests.pods([resource for resource in resources if resource not in built_in])
    apart = [
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"pod-{number}"}, "spec": {"template": pod}}
        for number, pod in enumerate(templates.values())
    ]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump_all([*built_in, *apart]))


@pytest.mark.wide
def test_checkov_finds_nothing(reports):
    files = {f"/{overlay}.yaml" for overlay in manifests.OVERLAYS}
    failed = [each for each in reports["failed_checks"] if each["file_path"] in files]
    assert not [f"{each['check_id']} {each['file_path']} {each['resource']}" for each in failed]
    passed = [each for each in reports["passed_checks"] if each["file_path"] in files]
    assert {(each["file_path"], each["resource"].split(".")[0]) for each in passed} >= {(file, "Job") for file in files}
    assert len(passed) > 60 * len(manifests.OVERLAYS)


@pytest.mark.wide
def test_checkov_bites(reports):
    failed = {(each["file_path"], each["check_id"]) for each in reports["failed_checks"]}
    assert failed >= {(f"/{check}.yaml", check) for check, _, _ in CARELESS}
