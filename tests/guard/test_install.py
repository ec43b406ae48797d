"""Installing the guard into engines, and taking it back whole."""

import json
import os
import stat
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from overt.guard import engines, install, profile, runners
from overt.guard.change import Change

from .test_units import rules


def test_a_bundle_is_taken_back_whole(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"ociVersion": "1.0.2",  "linux": {}}')
    changes = install.into_bundle(tmp_path, "/run/g")
    assert config.read_text().count("seccomp") == 0  # nothing is done yet
    for change in changes:
        change.make()
    assert json.loads(config.read_text())["linux"]["seccomp"]["listenerPath"] == "/run/g"
    assert install.into_bundle(tmp_path, "/run/g") == []
    for change in install.out_of_bundle(tmp_path):
        change.make()
    assert os.listdir(tmp_path) == ["config.json"]
    assert config.read_text() == '{"ociVersion": "1.0.2",  "linux": {}}'
    assert install.out_of_bundle(tmp_path) == []


def overt_guard(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "overt", "guard", *words], stderr=subprocess.PIPE, text=True, timeout=30, check=False,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"}, **more,
    )  # fmt: skip


def test_a_bundle_whose_name_is_no_utf_8_is_installed_into_and_taken_back(tmp_path: Path) -> None:
    bundle = tmp_path / os.fsdecode(b"bundle-\xff")
    bundle.mkdir()
    (bundle / "config.json").write_text('{"ociVersion": "1.0.2",  "linux": {}}')
    for verb, options, files in (("install", ["--socket", "/run/g"], 2), ("uninstall", [], 1)):
        for dry_run in (["--dry-run"], []):
            done = overt_guard(verb, "bundle", str(bundle), *options, *dry_run, stdout=subprocess.PIPE)
            assert (done.returncode, done.stderr) == (0, "")
            assert "/bundle-\\xff/config.json" in done.stdout
        assert len(os.listdir(bundle)) == files


def test_a_standard_output_that_is_full_does_not_leave_half_of_it_installed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.2",  "linux": {}}')
    with open("/dev/full", "w") as full:
        done = overt_guard("install", "bundle", str(tmp_path), "--socket", "/run/g", stdout=full)
    assert (done.returncode, done.stderr) == (1, "overt: standard output: No space left on device\n")
    assert install.into_bundle(tmp_path, "/run/g") == []


def test_what_was_changed_in_a_bundle_meanwhile_is_kept(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    text = '{"ociVersion": "1.0.2",  "linux": {"seccomp": null}}'
    config.write_text(text)
    make(install.into_bundle(tmp_path, "/run/g"))
    whole = json.loads(config.read_text())
    config.write_text(json.dumps({**whole, "hostname": "later"}))
    make(install.into_bundle(tmp_path, "/run/other"))
    assert "/run/other" in config.read_text()
    assert (tmp_path / "config.json.before-overt-guard").read_text() == text
    make(install.out_of_bundle(tmp_path))
    assert json.loads(config.read_text()) == {
        "ociVersion": "1.0.2", "linux": {"seccomp": None}, "hostname": "later"
    }  # fmt: skip
    assert os.listdir(tmp_path) == ["config.json"]
    make(install.into_bundle(tmp_path, "/run/g"))
    config.write_text('{"ociVersion": "1.0.2", "linux": {"seccomp": null} }')  # somebody has made it anew
    make(install.out_of_bundle(tmp_path))
    assert files_of(tmp_path) == {"config.json": '{"ociVersion": "1.0.2", "linux": {"seccomp": null} }'}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"ociVersion": "1"}', "no `linux`"),
        ('{"ociVersion": "1", "linux": {"seccomp": {}}}', r"linux\.seccomp: .*no defaultAction"),
        ("[" * 100000, "nested too deeply"),
        ("5", "not a bundle's config.json: not an object"),
        ("{", "not a bundle's config.json: "),
        ("{}", "not a bundle's config.json: no ociVersion"),
    ],
)
def test_a_bundle_that_has_no_place_for_a_profile_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(profile.ProfileError, match=why):
        install.into_bundle(tmp_path, "/run/g")


@pytest.mark.root
@pytest.mark.parametrize("engine", ["docker", "bundle"])
def test_a_secret_stays_one_and_its_owner_group_and_xattrs_are_kept(
    tmp_path: Path, wrapper: engines.Wrapped, engine: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = tmp_path / "etc"
    directory.mkdir()
    path = directory / ("daemon.json" if engine == "docker" else "config.json")
    path.write_text('{"ociVersion": "1", "linux": {}}')
    os.chown(path, 12, 34)
    path.chmod(0o640)
    os.setxattr(path, "user.note", b"mine")
    if engine == "docker":
        changes = engines.into_docker(directory, wrapper, default=True)
    else:
        changes = install.into_bundle(directory, "/run/g")
    before, written = (change.path for change in changes)
    make(changes)
    assert written == path and sorted(os.listdir(directory)) == sorted([before.name, path.name])
    for each in (before, path):
        st = each.stat()
        assert (st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)) == (12, 34, 0o640), each
        assert os.getxattr(each, "user.note") == b"mine"


def test_podmans_profile_is_made_from_the_one_in_use_and_taken_back_whole(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps({**profile.MINIMAL, "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_ERRNO"}]}))
    (tmp_path / "containers.conf").write_text(f'[containers]\nseccomp_profile = "{own}"\n')
    for _ in range(2):  # the second time it is made from the same one, not from ours
        for change in install.into_podman(tmp_path, "/run/g"):
            change.make()
    made = json.loads((tmp_path / "overt-guard.json").read_text())
    assert [rules(made, name) for name in ("mount", "syncfs")] == [["SCMP_ACT_ERRNO"], ["SCMP_ACT_NOTIFY"]]
    for change in install.out_of_podman(tmp_path):
        change.make()
    assert sorted(os.listdir(tmp_path)) == ["containers.conf", "own.json"]
    assert install.out_of_podman(tmp_path) == []


@pytest.mark.parametrize("before", [[], ["other.conf"]])
def test_a_directory_of_podmans_that_was_there_stays(tmp_path: Path, before: list[str]) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(profile.MINIMAL))
    (tmp_path / "containers.conf").write_text(f'[containers]\nseccomp_profile = "{own}"\n')
    (tmp_path / "containers.conf.d").mkdir()
    for name in before:
        (tmp_path / "containers.conf.d" / name).touch()
    make(install.into_podman(tmp_path, "/run/g"))
    assert install.into_podman(tmp_path, "/run/g") == []
    make(install.out_of_podman(tmp_path))
    assert os.listdir(tmp_path / "containers.conf.d") == before


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"ociVersion": "1.0.2", "linux": {}}')
    words = ["guard", "install", "bundle", str(tmp_path), "--dry-run", "--socket", "/run/g"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "overt", *words], capture_output=True, text=True, timeout=30, check=True, env=environment
    )
    assert done.stdout.count("would write") == 2
    assert os.listdir(tmp_path) == ["config.json"]


# Docker and containerd


def named(path: Path, profile_path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'[containers]\nseccomp_profile = "{profile_path}"\n')


def test_a_profile_that_would_be_undone_by_a_later_file_is_not_installed(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(profile.MINIMAL))
    drop_ins = tmp_path / "containers.conf.d"
    named(drop_ins / "early.conf", own)
    make(install.into_podman(tmp_path, "/run/g"))
    named(drop_ins / "site.conf", own)  # the same after it was installed
    with pytest.raises(profile.ProfileError, match=r"site\.conf is read after overt-guard\.conf .*own\.json: rename"):
        install.into_podman(tmp_path, "/run/g")
    named(drop_ins / "site.conf", tmp_path / "overt-guard.json")  # which is ours
    assert install.into_podman(tmp_path, "/run/g") == []
    (drop_ins / "site.conf").write_text("[containers]\npids_limit = 5\n")
    assert install.into_podman(tmp_path, "/run/g") == []


@pytest.mark.parametrize("engine", ["podman", "docker", "containerd"])
def test_whoever_installs_is_told_which_containers_have_to_be_created_again(
    tmp_path: Path, wrapper: engines.Wrapped, engine: str
) -> None:
    own = tmp_path / "own.json"
    own.write_text(json.dumps(profile.MINIMAL))
    named(tmp_path / "containers.conf", own)
    (tmp_path / "config.toml").write_text("version = 2\n")

    def run(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "overt", "guard", *words, engine, "--directory", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=environment).stdout

    created = "then: create containers that"
    assert created not in run("install", "--dry-run")
    assert f"{created} exist already again: they are not guarded" in run("install")
    assert run("install") == "nothing to do\n"
    lost = {"podman": "do not start without the guard"}.get(engine, "do not start any more")
    last = run("uninstall").splitlines()[-1]
    assert last.startswith(created) and lost in last
    assert run("uninstall") == "nothing to do\n"


@pytest.fixture
def wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[engines.Wrapped]:
    """With programs of these names on the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in (engines.PROGRAM, "runc", "crun"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    yield engines.Wrapped("/run/g", None)


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: path.read_bytes().decode() for path in directory.iterdir() if path.is_file()}


def make(changes: list[Change]) -> None:
    for change in changes:
        change.make()


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        None, "{}", '{ "log-level":"warn" }', '{"runtimes": {"x": {"path": "crun"}},\n"default-runtime": "x"}',
        '{"runtimes": {}}', "", "\n", '{"runtimes": null, "default-runtime": null}', '{\r\n  "debug": true\r\n}\r\n',
    ],
)  # fmt: skip
def test_dockers_configuration_is_taken_back_whole(
    tmp_path: Path, wrapper: engines.Wrapped, text: str | None, default: bool
) -> None:
    path = tmp_path / "daemon.json"
    if text is not None:
        path.write_bytes(text.encode())
    for each in (False, default, False):  # it is made from the original each time, and a default stays one
        make(engines.into_docker(tmp_path, wrapper, default=each))
    assert engines.into_docker(tmp_path, wrapper, default=default) == []
    made, was = json.loads(path.read_text()), json.loads((text or "").strip() or "{}")
    ours = made["runtimes"].pop("overt")
    assert ours["path"].endswith("/overt-runc")
    assert ours["runtimeArgs"][-1] == str(tmp_path / "programs" / ("crun" if "crun" in str(text) else "runc"))
    assert made.get("default-runtime") == ("overt" if default else was.get("default-runtime"))
    make(engines.out_of_docker(tmp_path))
    assert files_of(tmp_path) == ({} if text is None else {"daemon.json": text})
    assert engines.out_of_docker(tmp_path) == []


def test_what_was_changed_in_dockers_configuration_meanwhile_is_kept(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    path = tmp_path / "daemon.json"
    path.write_text('{"default-runtime": "crun", "runtimes": {"crun": {"path": "crun"}}}')
    make(engines.into_docker(tmp_path, wrapper, default=True))
    whole = json.loads(path.read_text())
    assert whole["runtimes"]["overt"]["runtimeArgs"][-1].endswith("/crun")  # what was the default
    path.write_text(json.dumps({**whole, "debug": True}))
    make(engines.out_of_docker(tmp_path))
    assert files_of(tmp_path).keys() == {"daemon.json"}
    assert json.loads(path.read_text()) == {
        "default-runtime": "crun", "runtimes": {"crun": {"path": "crun"}}, "debug": True
    }  # fmt: skip


SETTINGS = st.dictionaries(
    st.text(min_size=1, max_size=5).filter(lambda key: key not in ("runtimes", "default-runtime")), st.text(max_size=5),
    max_size=3,
)  # fmt: skip
RUNTIMES = st.none() | st.dictionaries(st.sampled_from(["runc", "crun", "x"]), st.just({"path": "crun"}), max_size=2)


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SETTINGS, RUNTIMES, st.none() | st.sampled_from(["runc", "x"]), st.booleans(), st.sampled_from([None, 3]), SETTINGS
)
def test_whatever_is_in_dockers_configuration_is_there_after_uninstalling(
    wrapper: engines.Wrapped, whole: dict[str, Any], runtimes: dict[str, Any] | None, used: str | None, default: bool,
    indent: int | None, later: dict[str, str],
) -> None:  # fmt: skip
    assume(used in (None, "runc") or used in (runtimes or {}))
    whole = {**whole, **({} if runtimes is None else {"runtimes": runtimes})}
    whole |= {} if used is None else {"default-runtime": used}
    with tempfile.TemporaryDirectory() as name:
        directory, path = Path(name), Path(name, "daemon.json")
        path.write_text(json.dumps(whole, indent=indent))
        before = path.read_text()
        make(engines.into_docker(directory, wrapper, default=default))
        make(engines.out_of_docker(directory))
        assert files_of(directory) == {"daemon.json": before}
        make(engines.into_docker(directory, wrapper, default=default))
        path.write_text(json.dumps({**json.loads(path.read_text()), **later}))  # somebody else, meanwhile
        make(engines.out_of_docker(directory))
        assert json.loads(path.read_text()) == {**whole, **later}


def test_a_link_to_a_configuration_elsewhere_stays_one(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "daemon.json").symlink_to("elsewhere.json")
    make(engines.into_docker(tmp_path, wrapper, default=False))
    assert "overt" in (tmp_path / "elsewhere.json").read_text()
    make(engines.out_of_docker(tmp_path))
    assert os.readlink(tmp_path / "daemon.json") == "elsewhere.json"
    assert (tmp_path / "elsewhere.json").read_text() == "{}"


V2 = """version = 2
# a comment
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  pod_annotations = ["a.*"]
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
    SystemdCgroup = true
    BinaryName = "crun"
"""
V3 = """version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = true
    BinaryName = "crun"
# no newline"""


@pytest.mark.parametrize(
    ("text", "plugin"),
    [
        (None, "io.containerd.grpc.v1.cri"), (V2.replace("\n", "\r\n"), "io.containerd.grpc.v1.cri"),
        ("version = 2", "io.containerd.grpc.v1.cri"),
        (V2, "io.containerd.grpc.v1.cri"), (V3, "io.containerd.cri.v1.runtime"),
    ],
)  # fmt: skip
def test_containerds_configuration_is_added_to_and_taken_back_whole(
    tmp_path: Path, wrapper: engines.Wrapped, text: str | None, plugin: str
) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_bytes(text.encode())
    for _ in range(2):
        make(engines.into_containerd(tmp_path, wrapper))
    assert engines.into_containerd(tmp_path, wrapper) == []
    assert path.read_bytes().startswith((text or "").encode())
    runtimes = tomllib.loads(path.read_text())["plugins"][plugin]["containerd"]["runtimes"]
    assert runtimes["runc"]["runtime_type"] == "io.containerd.runc.v2"
    script = tmp_path / "overt-runc"
    expected = {"runtime_type": "io.containerd.runc.v2", "options": {"BinaryName": str(script)}}
    if text and "crun" in text:
        expected = {**runtimes["runc"], "options": {"SystemdCgroup": True, "BinaryName": str(script)}}
    assert runtimes["overt"] == expected
    runtime = "crun" if text and "crun" in text else "runc"
    assert f"--guard-socket /run/g --guard-runtime {tmp_path}/programs/{runtime} " in script.read_text()
    assert os.access(script, os.X_OK)
    make(engines.out_of_containerd(tmp_path))
    assert files_of(tmp_path) == ({} if text is None else {"config.toml": text})
    assert engines.out_of_containerd(tmp_path) == []


def test_what_was_added_to_containerds_configuration_meanwhile_is_kept(
    tmp_path: Path, wrapper: engines.Wrapped
) -> None:
    make(engines.into_containerd(tmp_path, wrapper))
    path = tmp_path / "config.toml"
    path.write_text(path.read_text() + "[debug]\nlevel = 'info'\n")
    assert engines.into_containerd(tmp_path, wrapper._replace(socket="/run/other"))
    make(engines.out_of_containerd(tmp_path))
    assert files_of(tmp_path) == {"config.toml": "version = 2\n[debug]\nlevel = 'info'\n"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "version 1 is not known"),
        ("no", "config.toml"),
        ("version = 2\nplugins = {}", "config.toml"),
        ('version = 2\n[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.overt]', "not ours"),
        (V2.replace("runc.v2", "runc.v1"), "runtime_type is io.containerd.runc.v1"),
        ("version = 2\nplugins = 5", "plugins is not a table"),
        ("version = [2]", r"version \[2\] is not known"),
        (V2.replace('"crun"', "5"), "BinaryName is not the name"),
    ],
)
def test_a_configuration_that_cannot_be_added_to_is_refused(
    tmp_path: Path, wrapper: engines.Wrapped, text: str, why: str
) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(engines.InstallError, match=why):
        engines.into_containerd(tmp_path, wrapper)
    (tmp_path / "daemon.json").write_text("[]")
    with pytest.raises(engines.InstallError, match=r"daemon\.json: not an object"):
        engines.into_docker(tmp_path, wrapper, default=False)


def test_a_runtime_that_is_not_installed_is_named(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    with pytest.raises(engines.InstallError, match="not on the PATH: youki"):
        engines.into_docker(tmp_path, wrapper._replace(runtime="youki"), default=False)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"runtimes": {"overt": "x"}}', "the runtime overt is not an object"),
        ('{"runtimes": {"runc": null}}', "the runtime runc is not an object"),
        ('{"runtimes": {"runc": {"path": 5}}}', "the runtime runc is not an object with a path"),
        ('{"runtimes": []}', "runtimes is not an object"),
        ('{"default-runtime": ["a"]}', "default-runtime is not a name"),
        ("{" * 10 + "[" * 100000, "daemon.json"),
        (
            '{"default-runtime": "io.containerd.runsc.v1"}',
            r"io\.containerd\.runsc\.v1: name the program with --runtime",
        ),
        (
            '{"default-runtime": "kata", "runtimes": {"kata": {"runtimeType": "io.containerd.kata.v2"}}}',
            "kata: name the program with --runtime",
        ),
    ],
)
@pytest.mark.parametrize("default", [False, True])
def test_dockers_configuration_is_refused_where_it_is_not_clear_what_it_starts(
    tmp_path: Path, wrapper: engines.Wrapped, text: str, why: str, default: bool
) -> None:
    (tmp_path / "daemon.json").write_text(text)
    with pytest.raises(engines.InstallError, match=why):
        engines.into_docker(tmp_path, wrapper, default=default)
    if "--runtime" in why:
        assert engines.into_docker(tmp_path, wrapper._replace(runtime="crun"), default=default)


def test_bytes_that_are_no_text_are_named(tmp_path: Path, wrapper: engines.Wrapped) -> None:
    (tmp_path / "daemon.json").write_bytes(b"\xff{}")
    with pytest.raises(OSError, match=r"not UTF-8.*daemon\.json"):
        engines.into_docker(tmp_path, wrapper, default=False)


def test_a_script_that_containerds_configuration_still_names_is_not_removed(
    tmp_path: Path, wrapper: engines.Wrapped
) -> None:
    make(engines.into_containerd(tmp_path, wrapper))
    path = tmp_path / "config.toml"
    path.write_text(path.read_text().replace("# overt guard: begin", "# begin"))
    with pytest.raises(engines.InstallError, match="remove it by hand"):
        engines.out_of_containerd(tmp_path)


def test_the_engine_to_check_is_the_one_with_the_guard(
    tmp_path: Path, wrapper: engines.Wrapped, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("podman", "docker"):
        (tmp_path / "programs" / name).touch(mode=0o755)
    monkeypatch.setattr(install, "PODMAN", tmp_path / "podman")
    monkeypatch.setattr(engines, "DOCKER", tmp_path)
    monkeypatch.setattr(engines, "CONTAINERD", tmp_path)
    assert runners.installed() == "podman"
    make(engines.into_docker(tmp_path, wrapper, default=False))  # where there was no daemon.json
    assert runners.installed() == "docker"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("install", "podman", "--default"), "--default is for docker"),
        (("install", "podman", "--runtime", "crun"), "--runtime is for docker and containerd"),
        (("install", "containerd", "--default"), "--default is for docker"),
        (("install", "podman", "/"), "podman takes no directory of a bundle"),
        (("uninstall", "bundle", "/", "--directory", "/etc"), "--directory is not for bundle"),
        (("install", "dokcer"), "Invalid value for 'ENGINE'"),
        (("install", "bundle", "/no-such"), "Invalid value for 'BUNDLE'"),
        (("install", "docker", "--directory", "/no-such"), "Invalid value for '--directory'"),
        ((), "Missing command"),
    ],
)
def test_what_is_not_for_an_engine_is_a_mistake_in_the_command_line(words: tuple[str, ...], complaint: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "overt", "guard", *words], capture_output=True, text=True, timeout=30, check=False,
        env=environment,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr and done.stderr.count("\n") == 1
