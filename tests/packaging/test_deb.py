"""The Debian package, and the service in it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from overt.host import mounts
from overt.server.client import Client
from overt.server.main import CAPABILITIES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    return build(tmp_path_factory.mktemp("deb"))


def build(out: Path) -> Path:
    environment = {**os.environ, "PYTHON": sys.executable, "SOURCE_DATE_EPOCH": "1700000000"}
    done = subprocess.run(
        [ROOT / "tools/deb", out], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["dpkg-deb", "-x", package, directory], check=True, timeout=30)
    return directory


def test_the_same_tree_gives_the_same_package(package: Path, tmp_path: Path) -> None:
    assert build(tmp_path).read_bytes() == package.read_bytes()


def test_it_depends_on_what_the_project_depends_on(package: Path) -> None:
    field = subprocess.run(["dpkg-deb", "-f", package, "Depends"], capture_output=True, text=True, timeout=30).stdout
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, least in (re.fullmatch(r"(\w+)>=([\d.]+)", line).groups() for line in project["dependencies"]):  # type: ignore[union-attr]
        assert f"python3-{name} (>= {least})" in field
    assert f"python3 (>= {project['requires-python'].removeprefix('>=')})" in field


def test_everything_is_in_its_place(unpacked: Path) -> None:
    for place in (
        "usr/bin/overt", "usr/bin/overt-fuse-overlayfs", "usr/bin/overt-runc",
        "usr/sbin/mount.fuse.overt", "usr/sbin/mount.fuseblk.overt",
        "usr/sbin/umount.fuse.overt", "usr/sbin/umount.fuseblk.overt", "usr/lib/systemd/system/overt.service",
        "usr/lib/systemd/system/overt-guard.service", "usr/lib/systemd/system/overt-guard.socket",
        "usr/lib/systemd/system/overt-guard-metrics.service", "usr/share/doc/overt/deploy/grafana/overt-guard.json",
        "usr/share/man/man1/overt.1.gz", "usr/share/man/man8/umount.fuse.overt.8.gz",
        "usr/share/bash-completion/completions/overt", "usr/share/zsh/vendor-completions/_overt",
        "usr/share/fish/vendor_completions.d/overt.fish", "usr/share/doc/overt/docs/containers.md",
    ):  # fmt: skip
        assert (unpacked / place).stat().st_size > 0, place
    assert files(unpacked / "usr/lib/python3/dist-packages/overt") == files(ROOT / "src/overt")
    assert files(unpacked / "usr/share/doc/overt/docs") == files(ROOT / "docs")


def test_every_program_has_a_manual_page(unpacked: Path) -> None:
    pages = unpacked / "usr/share/man"
    for section, directory in (("1", "bin"), ("8", "sbin")):
        programs = {path.name for path in (unpacked / "usr" / directory).iterdir()}
        assert programs == {path.name.removesuffix(f".{section}.gz") for path in (pages / f"man{section}").iterdir()}


def files(directory: Path) -> set[Path]:
    """All below a directory but what Python makes of it."""
    found = (path for path in directory.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {path.relative_to(directory) for path in found}


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("bin/overt", ["--version"], "overt "), ("bin/overt", ["judge", "--list"], "U5-new-fd "),
        ("bin/overt-fuse-overlayfs", ["--version"], "fuse-overlayfs: version"),
        ("bin/overt-runc", ["--guard-runtime", "echo", "state", "x"], "state x"),
        ("sbin/mount.fuse.overt", ["x"], "usage: mount.fuse.overt"),
        ("sbin/umount.fuseblk.overt", [], "usage: umount.fuse.overt"),
    ],
)  # fmt: skip
def test_its_programs_run(unpacked: Path, program: str, words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, unpacked / "usr" / program, *words], capture_output=True, text=True, timeout=30, check=False,
        env={**os.environ, "PYTHONPATH": str(unpacked / "usr/lib/python3/dist-packages")},
    )  # fmt: skip
    assert said in done.stdout + done.stderr


@pytest.mark.root
def test_a_server_with_the_rights_of_the_service(tmp_path: Path) -> None:
    """overt.service's bounding set and no_new_privs: it says so when ready, mounts, and serves files of any owner."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root, and setpriv")
    place = tmp_path / "place"
    place.mkdir()
    fd = mounts.new_mount("tmpfs", [])
    mounts.attach(fd, place)
    os.close(fd)
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    kept = ",".join(["-all", *(f"+{name}" for name in sorted(CAPABILITIES | {"setpcap"}))])
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        server = subprocess.Popen(
            ["setpriv", "--no-new-privs", f"--bounding-set={kept}", sys.executable, "-m", "overt", "serve", "-f",
             "--socket", str(path)],
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert manager.recv(64) == b"READY=1"
            with Client(path) as client:
                names = f"lowerdir={place}/lower,upperdir={place}/upper,workdir={place}/work"
                assert client.mount(str(place / "merged"), names) == []
                file = place / "merged/file"
                file.write_text("x")
                os.chown(file, 7, 7)
                file.chmod(0o4755)
                os.mknod(place / "merged/device", 0o020600, os.makedev(1, 3))
                file.unlink()
                (place / "merged/dir").mkdir()
                assert client.status()["mounts"][0]["syncfs"]
                assert client.umount(str(place / "merged"))["verdict"] == "no error recorded"
        finally:
            server.terminate()
            assert server.wait(30) == 0
            mounts.umount(place, mounts.MNT_DETACH)
