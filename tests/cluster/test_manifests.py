"""Every manifest fits the schema of what reads it, and names only what exists."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml

from tests.cluster.crd_schemas import crd_schema
from tests.cluster.ray_commands import complaint

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
IMAGE_FOLDER = "/home/ray/rose_ray"
"""Where the Dockerfile puts the project."""

CONFIG_FILE = "/etc/rose-ray/job.yaml"
KUBERNETES = "1.33"
RAY_VERSION = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]  # type: ignore[index]
RAY_UP = sorted(CLUSTER.glob("ray-up-*.yaml"))
MANIFESTS = [path for path in sorted(CLUSTER.glob("*.yaml")) if path not in RAY_UP]


def documents() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in yaml.safe_load_all(path.read_text()):
            yield f"{path.name}:{document['kind']}", document


DOCUMENTS = dict(documents())
OF_RAY = [name for name, document in DOCUMENTS.items() if document["apiVersion"] == "ray.io/v1"]
OF_CORE = [name for name, document in DOCUMENTS.items() if document["apiVersion"] == "batch/v1"]
OF_KUEUE = [name for name, document in DOCUMENTS.items() if document["apiVersion"].startswith("kueue.")]


def values(node: Any, key: str) -> Iterator[Any]:
    """Yield what stands under a key anywhere below."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for each in node:
            yield from values(each, key)


def misspelt(node: Any, key: str) -> Any:
    """Return a copy with one key, wherever it stands, misspelt."""
    if isinstance(node, dict):
        return {f"{k}x" if k == key else k: misspelt(v, key) for k, v in node.items()}
    return [misspelt(each, key) for each in node] if isinstance(node, list) else node


def test_every_manifest_is_checked() -> None:
    assert sorted([*OF_RAY, *OF_CORE, *OF_KUEUE]) == sorted(DOCUMENTS)
    assert {DOCUMENTS[name]["kind"] for name in OF_RAY} == {"RayCluster", "RayJob", "RayCronJob"}


@pytest.mark.parametrize("name", OF_RAY)
def test_ray_resources_fit_kuberays_schema(name: str) -> None:
    document = DOCUMENTS[name]
    validator = jsonschema.Draft202012Validator(crd_schema(document["kind"]))
    assert [error.message for error in validator.iter_errors(document)] == []
    for key in ("rayVersion", "groupName", "sizeLimit"):
        assert not validator.is_valid(misspelt(document, key)), key


@pytest.mark.parametrize("name", OF_CORE)
def test_core_resources_fit_kubernetes_schema(name: str) -> None:
    document = DOCUMENTS[name]
    kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for key in ("concurrencyPolicy", "restartPolicy", "image", "allowPrivilegeEscalation"):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(misspelt(document, key), KUBERNETES, strict=True)


def test_the_queue_holds_what_the_queued_job_asks_for() -> None:
    flavor, queue, local = (DOCUMENTS[name] for name in OF_KUEUE)
    job = DOCUMENTS["rayjob-kueue.yaml:RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    (group,) = queue["spec"]["resourceGroups"]
    (offered,) = group["flavors"]
    assert offered["name"] == flavor["metadata"]["name"]
    quota = {each["name"]: each["nominalQuota"] for each in offered["resources"]}
    assert set(quota) == set(group["coveredResources"])
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    head, worker = (requests(each["template"]) for each in (cluster["headGroupSpec"], workers))
    submitter = requests(job["spec"]["submitterPodTemplate"])
    for resource, most in quota.items():
        once = sum(number(each.get(resource, "0")) for each in (head, submitter))
        wanted = once + workers["replicas"] * number(worker.get(resource, "0"))
        assert wanted == number(most), resource


def requests(template: dict[str, Any]) -> dict[str, str]:
    (container,) = template["spec"]["containers"]
    found: dict[str, str] = container["resources"]["requests"]
    return found


def number(quantity: str | int) -> float:
    return float(str(quantity).removesuffix("Gi"))


@pytest.mark.parametrize("name", OF_RAY)
def test_what_kuberay_needs_beyond_its_schema(name: str) -> None:
    document = DOCUMENTS[name]
    assert len(document["metadata"]["name"]) <= 47
    assert set(values(document, "rayVersion")) == {RAY_VERSION}
    for head in values(document, "headGroupSpec"):
        assert head["rayStartParams"]["num-cpus"] == "0"
    if document["kind"] != "RayCluster":
        assert set(values(document, "shutdownAfterJobFinishes")) == {True}  # or there is no TTL, and no queue
        assert all(count > 0 for count in values(document, "backoffLimit"))
    autoscaled = list(values(document, "enableInTreeAutoscaling"))
    queued = "suspend" in document["spec"]
    assert autoscaled == ([] if queued else [True])
    assert set(values(document, "minReplicas")) == ({8} if queued else {0})


def test_the_nightly_job_does_not_overlap_and_ends_with_the_jobs_own_exit_code() -> None:
    (name,) = OF_CORE
    spec = DOCUMENTS[name]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    command = container["command"]
    assert "--no-wait" not in command
    service = f"http://{DOCUMENTS['raycluster.yaml:RayCluster']['metadata']['name']}-head-svc:8265"
    assert command[command.index("--address") + 1] == service


def commands() -> Iterator[tuple[str, list[str]]]:
    for name, document in DOCUMENTS.items():
        for entrypoint in values(document, "entrypoint"):
            yield name, shlex.split(entrypoint)
        for command in (each for each in values(document, "command") if "--" in each):
            yield name, command[command.index("--") + 1 :]


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_commands_exist_in_the_image(name: str, command: list[str]) -> None:
    python, script, config = command
    assert python == "python" and config == CONFIG_FILE
    assert (ROOT / script.removeprefix(f"{IMAGE_FOLDER}/")).is_file()
    mounted = {mount["mountPath"] for mounts in values(DOCUMENTS[name], "volumeMounts") for mount in mounts}
    # The driver runs on the head, which has the job's YAML; the nightly pod only hands its path on.
    assert str(Path(CONFIG_FILE).parent) in mounted or name in OF_CORE


def test_images_are_one_and_secrets_come_by_reference() -> None:
    assert len({image for document in DOCUMENTS.values() for image in values(document, "image")}) == 1
    for name, document in DOCUMENTS.items():
        for variable in (each for variables in values(document, "env") for each in variables):
            assert "valueFrom" in variable or variable["name"] == "RAY_AUTH_MODE", name
    tokens = {options["secretName"] for document in DOCUMENTS.values() for options in values(document, "authOptions")}
    (nightly,) = (each["name"] for name in OF_CORE for each in values(DOCUMENTS[name], "secretKeyRef"))
    assert tokens == {nightly}
    text = "".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())
    assert not re.search(r"(SECRET_ACCESS_KEY|HF_TOKEN)\s*[=:]\s*\S", text)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_files_fit_rays_schema(path: Path) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, schema)
    for key in ("cluster_name", "ssh_user", "max_workers"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt(copy.deepcopy(content), key), schema)
    node_types = content.get("available_node_types", {})
    assert all(head in node_types for head in values(content, "head_node_type"))
    images = {image for document in DOCUMENTS.values() for image in values(document, "image")}
    assert content["docker"]["image"] in images


def test_commands_of_the_readme_exist() -> None:
    text = (CLUSTER / "README.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert {line.split()[0] for line in lines} <= {"docker", "kubectl", "ray"}
    files = re.findall(r"(?:cluster|examples|jobs)/[\w.-]+", "\n".join(lines))
    assert files and all((ROOT / file).is_file() for file in files)
    named = set(re.findall(r"`([\w-]+\.yaml)`", text))
    assert {path.name for path in CLUSTER.glob("*.yaml")} <= named


def ray_lines(text: str) -> list[str]:
    """Lines of a shell that call ``ray``, as they stand."""
    return [line.strip() for line in text.splitlines() if re.match(r"\s*ray [a-z]", line)]


def ray_commands() -> Iterator[tuple[str, str]]:
    """Every command line of ``ray`` that a file gives, with the file's name."""
    for name, document in DOCUMENTS.items():
        for command in (each for each in values(document, "command") if each[0] == "ray"):
            yield name, shlex.join(command)
    for path in RAY_UP:
        content = yaml.safe_load(path.read_text())
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            for commands in values(content, key):
                yield from ((path.name, line) for command in commands for line in command.split("&&") if "ray " in line)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), CLUSTER / "README.md"):
        blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
        yield from ((path.name, line) for block in blocks for line in ray_lines(block.replace("\\\n", " ")))
        yield from ((path.name, line) for line in re.findall(r"`(ray [a-z][^`]*)`", path.read_text()))


@pytest.mark.parametrize(("name", "line"), list(dict.fromkeys(ray_commands())))
def test_ray_has_every_command_and_option_that_is_named(name: str, line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    assert program == "ray"
    assert complaint(words) is None, name


def test_what_ray_does_not_have_is_found() -> None:
    assert complaint(["start", "--head", "--port=6379"]) is None
    assert complaint(["start", "--heed"]) is not None
    assert complaint(["job", "submit", "--address", "http://head:8265", "--no-wait", "--", "python", "--heed"]) is None
    assert complaint(["job", "submit", "--submision-id", "x", "--", "python"]) is not None
    assert complaint(["job", "sumbit"]) == "ray job: no command 'sumbit'"
    assert complaint(["job"]) == "ray job: a subcommand is missing"
