"""The manifests are what the API takes; and a guard in a container that has what the DaemonSet's has, and no more."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from overt.guard import oci, profile, supervisor
from overt.lab import Disk

from .daemons import SYNC, VOLUMES, Daemons, daemons, lose, remove, why_not
from .ground import SOURCE, wait_until

schemas = pytest.importorskip("kubernetes_validate", reason="not installed: kubernetes-validate")
yaml = pytest.importorskip("yaml")

DEPLOY = SOURCE.parent / "deploy/kubernetes"
VERSIONS = ("1.30", "1.33", schemas.latest_version().rpartition(".")[0])
DEBIAN = Path("/usr/share/containers/seccomp.json")


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


MANIFESTS = [path.name for path in sorted(DEPLOY.glob("*.yaml"))]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_the_apis_schema_takes_the_manifests(name: str, version: str) -> None:
    assert objects(name)
    for each in objects(name):
        schemas.validate(each, version, strict=True)


def test_the_examples_say_what_their_image_needs_to_start() -> None:
    """postgres's initialises no database without a password, and ends."""
    pods = objects("example.yaml")
    assert len(pods) == 2
    for pod in pods:
        for each in pod["spec"]["containers"]:
            assert each["image"].startswith("postgres:")
            assert [set(value) for value in each["env"] if value["name"] == "POSTGRES_PASSWORD"] == [{"name", "value"}]


def test_a_field_that_the_api_has_not_is_noticed() -> None:
    (whole,) = objects("runtimeclass.yaml")
    with pytest.raises(schemas.ValidationError):
        schemas.validate({**whole, "handlers": ["overt"]}, VERSIONS[0], strict=True)


def pod() -> dict[str, Any]:
    """The DaemonSet's pod."""
    (found,) = [each for each in objects("overt-guard.yaml") if each["kind"] == "DaemonSet"]
    return dict(found["spec"]["template"]["spec"])


def container(name: str) -> dict[str, Any]:
    (found,) = [each for each in pod()["containers"] if each["name"] == name]
    return dict(found)


def test_the_daemonset_grants_the_capabilities_that_the_guard_keeps() -> None:
    granted = {name.lower() for name in container("guard")["securityContext"]["capabilities"]["add"]}
    assert granted == supervisor.CAPABILITIES | {"setpcap"}
    assert container("metrics")["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_nothing_in_the_daemonset_ends_the_guard() -> None:
    guard, beside = container("guard"), container("metrics")
    assert "limits" not in guard["resources"] and "memory" in guard["resources"]["requests"]
    assert not [key for key in guard if key.endswith("Probe")]
    probe = beside["readinessProbe"]["exec"]["command"]
    assert probe[-2:] == guard["command"][-2:] == beside["command"][3:5] == ["--socket", "/run/overt/guard.sock"]
    assert "livenessProbe" not in beside


def test_the_daemonsets_pod_may_be_of_its_priority_and_use_the_hosts_directories() -> None:
    (quota,) = [each for each in objects("overt-guard.yaml") if each["kind"] == "ResourceQuota"]
    (scope,) = quota["spec"]["scopeSelector"]["matchExpressions"]
    assert pod()["priorityClassName"] in scope["values"] and scope["scopeName"] == "PriorityClass"
    assert pod()["securityContext"]["seLinuxOptions"] == {"type": "spc_t"}


def test_the_manifests_agree_with_each_other() -> None:
    (runtime_class,) = objects("runtimeclass.yaml")
    by_profile, by_runtime = objects("example.yaml")
    assert by_runtime["spec"]["runtimeClassName"] == runtime_class["metadata"]["name"]
    wanted = by_profile["spec"]["securityContext"]["seccompProfile"]["localhostProfile"]
    assert f"mv /seccomp/{wanted}.unready /seccomp/{wanted}" in pod()["initContainers"][0]["command"][-1]


# Profiles as nodes read them


def test_a_profile_in_oci_form_has_what_holds_for_default_capabilities() -> None:
    if not DEBIAN.exists():
        pytest.skip("no /usr/share/containers/seccomp.json (Debian: golang-github-containers-common)")
    base = profile.load(str(DEBIAN))
    made = oci.resolve(base, machine="x86_64")
    assert made["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]

    def actions(given: dict[str, Any], name: str) -> set[str]:
        return {rule["action"] for rule in given["syscalls"] if name in rule["names"]}

    assert actions(made, "chroot") == {"SCMP_ACT_ALLOW"}  # CAP_SYS_CHROOT is a default
    assert actions(made, "bpf") == {"SCMP_ACT_ERRNO"}
    assert actions(oci.resolve(base, frozenset({"CAP_SYS_ADMIN"})), "bpf") == {"SCMP_ACT_ALLOW"}
    assert actions(made, "arch_prctl") == {"SCMP_ACT_ALLOW"}
    assert actions(oci.resolve(base, machine="aarch64"), "arch_prctl") == set()
    assert {key for rule in made["syscalls"] for key in rule} <= {"names", "action", "errnoRet", "args"}
    assert oci.resolve(made) is made
    assert profile.make(made, "/run/g")["listenerPath"] == "/run/g"
    with pytest.raises(ValueError, match="no architecture is known for vax"):
        oci.resolve(base, machine="vax")


@pytest.mark.parametrize(("release", "there"), [("4.7.0", False), ("4.8.0-rc1", True), ("6.18.44-x", True)])
def test_a_rule_for_kernels_from_a_version_on(release: str, there: bool) -> None:
    rule = {"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "includes": {"minKernel": "4.8"}}
    base = {"defaultAction": "SCMP_ACT_ERRNO", "archMap": [], "syscalls": [rule]}
    assert bool(oci.resolve(base, machine="x86_64", release=release)["syscalls"]) is there


# In a container


def filter_of_the_unit(directory: Path) -> list[str]:
    """Options of ctr's for the calls that overt-guard.service forbids; none if systemd is not here to list them."""
    if shutil.which("systemd-analyze") is None:
        return []
    unit = (SOURCE.parent / "systemd/overt-guard.service").read_text()
    (groups,) = re.findall(r"^SystemCallFilter=~(.*)$", unit, re.MULTILINE)
    assert "RestrictNamespaces=yes" in unit
    words = ["systemd-analyze", "syscall-filter", *groups.split()]
    listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30).stdout
    names = re.findall(r"^    (\w+)$", listed, re.MULTILINE)
    assert {"settimeofday", "reboot", "swapon"} <= set(names)
    rule = {"names": [*names, "setns", "unshare"], "action": "SCMP_ACT_ERRNO"}
    path = directory / "unit.json"
    path.write_text(json.dumps({**profile.MINIMAL, "syscalls": [rule]}))
    return ["--seccomp", "--seccomp-profile", str(path)]


@contextmanager
def guard_in_a_container(here: Daemons, disk: Disk, options: list[str]) -> Iterator[Path]:
    """Started by containerd as the DaemonSet's; its image is the machine's /usr and this Python. The socket's path.

    `options`: further ones of ctr's.
    """
    run = here.base / "run"
    run.mkdir()
    (here.base / "rootfs").mkdir()
    for name in ("proc", "sys", "dev", "etc", "tmp", "run"):
        (here.base / "rootfs" / name).mkdir()
    security = container("guard")["securityContext"]
    assert pod()["hostPID"] and security["seccompProfile"] == {"type": "Unconfined"}
    (propagation,) = {
        each["mountPropagation"] for each in container("guard")["volumeMounts"] if "mountPropagation" in each
    }
    assert propagation == "HostToContainer"
    image = [*VOLUMES, *{sys.prefix, sys.base_prefix, str(SOURCE)}]
    mounts = [
        *((path, "rbind:ro") for path in image if not path.startswith("/usr/")),
        (str(run), "rbind:rw"), (disk.path, "rbind:rw:rslave"),
    ]  # fmt: skip
    words = [word for path, how in mounts for word in ("--mount", f"type=bind,src={path},dst={path},options={how}")]
    assert security["capabilities"]["drop"] == ["ALL"]
    added = {f"CAP_{name}" for name in security["capabilities"]["add"]}
    words += [word for name in oci.DEFAULT_CAPABILITIES - added for word in ("--cap-drop", name)]
    words += [word for name in added - oci.DEFAULT_CAPABILITIES for word in ("--cap-add", name)]
    socket = run / "guard.sock"
    here.run(
        "ctr", "run", "-d", "--read-only", "--with-ns", f"pid:/proc/{os.getpid()}/ns/pid",
        "--env", f"PYTHONPATH={SOURCE}", *words, *options,
        "--rootfs", str(here.base / "rootfs"), "guard",
        sys.executable, "-m", "overt", "guard", "run", "-f", "--socket", str(socket),
    )  # fmt: skip
    try:
        wait_until(socket.exists, "the guard listens")
        yield socket
    finally:
        here.run("ctr", "task", "kill", "-s", "SIGTERM", "guard")
        deadline = time.monotonic() + 20
        while "RUNNING" in here.run("ctr", "task", "ls") and time.monotonic() < deadline:
            time.sleep(0.1)
        remove(here, "guard")


@pytest.mark.root
@pytest.mark.timeout(110)
def test_a_guard_with_the_daemonsets_rights_tells_containers_with_the_nodes_profile(tmp_path: Path) -> None:
    """And without the calls that the systemd unit forbids: one guard has to do with the least of both."""
    problem = why_not("containerd", "ctr") or (None if DEBIAN.exists() else f"no {DEBIAN}")
    if problem:
        pytest.skip(problem)
    with (
        Disk("ext4", size=512 << 20) as disk, daemons(disk) as here, here.containerd(),
        guard_in_a_container(here, disk, filter_of_the_unit(tmp_path)) as socket, ExitStack() as stack,
    ):  # fmt: skip
        node = tmp_path / "overt-guard.json"
        node.write_text(here.overt("guard", "profile", "--oci", "--from", str(DEBIAN), "--socket", str(socket)))
        volumes = [
            word for source, path in [*((path, path) for path in VOLUMES), (str(here.base), "/host")]
            for word in ("--mount", f"type=bind,src={source},dst={path},options=rbind:ro")
        ]  # fmt: skip
        image = "docker.io/library/tiny:latest"
        for name in ("one", "other"):
            words = ["--seccomp", "--seccomp-profile", str(node), *volumes]
            here.run("ctr", "run", "-d", *words, image, name, "/bin/sleep", "99")
            stack.callback(remove, here, name)

        def execute(name: str, *words: str, status: int = 0) -> str:
            return here.run("ctr", "task", "exec", "--exec-id", f"e{len(words)}", name, *words, status=(status,))

        assert [execute(name, *SYNC) for name in ("one", "other")] == ["", ""]
        write = ("ctr", "task", "exec", "--exec-id", "w", "one", "/bin/sh", "-c", "cat </host/page >/lost")
        lose(disk, write, here)
        for name in ("one", "other"):
            assert "Input/output error" in execute(name, *SYNC, status=1)
            assert execute(name, *SYNC) == ""
        status = json.loads(here.overt("guard", "status", "--json", "--socket", str(socket)))
        assert status["crashes"] == 0
        assert {(upper["eyes"], upper["refused"]) for upper in status["uppers"]} == {("probes+trace", "")}
