"""podman with overt as its mount_program, in a place of its own: nothing of the machine's containers is touched.

The place is a mount namespace, held by a sleeping process, with its own /run (where podman, crun and overt keep what
they know), /dev/shm (podman's locks) and /var/lib/containers, and without the second cgroup hierarchy of a hybrid
system, which crun does not take. Storage is on the disk that the test gives.
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "src"
_DEBIAN_PYTHON = "/usr/bin/python3"
"""overt in fuse-overlayfs's place needs nothing but the standard library"""
BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "ls", "cat", "echo", "sleep", "touch", "chown", "rm", "mkdir", "sync", "id", "stat")
NEEDED = ("podman", "buildah", "crun", "conmon", "nsenter")

HOLD = """
mount -t tmpfs -o mode=755 none /run && mount -t tmpfs none /dev/shm && mkdir -p /var/lib/containers &&
mount -t tmpfs none /var/lib/containers || exit
if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified || exit; fi
echo ready
exec sleep 600
"""
# For an ordinary user: one that the machine does not have, with ids to hand out, and a /dev/fuse that all may open.
_HOLD_USER = """
cd {base}/etc && mknod -m 666 fuse c 10 229 && mount --bind fuse /dev/fuse || exit
for file in passwd group subuid subgid; do
    touch /etc/$file && mount --bind $file /etc/$file || exit
done
"""
USER = 61234
_PROGRAM = """\
#!{python}
import sys
sys.path.insert(0, "{source}")
from overt.{module} import main
main()
"""
_STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{base}/storage"
runroot = "/run/containers/storage"
"""
_MOUNT_PROGRAM = """\
[storage.options.overlay]
mount_program = "{base}/bin/fuse-overlayfs"
"""
_CONTAINERS = """\
[containers]
cgroups = "disabled"
default_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]
log_driver = "k8s-file"
netns = "none"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "crun"
"""


def why_not() -> str | None:
    """Why there can be no engine here, if so."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if not os.path.exists(BUSYBOX):
        missing.append("busybox-static")
    return f"not installed: {', '.join(missing)} (make test-containers installs it)" if missing else None


def write_programs(directory: Path, python: str = sys.executable) -> None:
    """What the entry points are in an installed overt."""
    directory.mkdir(parents=True)
    for name, module in (("fuse-overlayfs", "cli.fuse_overlayfs"), ("overt", "cli.main")):
        write_program(directory / name, module, python)


def write_program(file: Path, module: str, python: str = sys.executable) -> None:
    """The entry point `main` of a module of overt's."""
    file.write_text(_PROGRAM.format(python=python, source=SOURCE, module=module))
    file.chmod(0o755)


def write_image(file: Path) -> None:
    """A root filesystem of one program, for `podman import`."""
    with tarfile.open(file, "w") as tar:
        for name in ("bin", "etc", "tmp", "proc", "sys", "dev", "run"):
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(entry)
        tar.add(os.path.realpath(BUSYBOX), "bin/busybox")
        for name in APPLETS:
            entry = tarfile.TarInfo(f"bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(entry)


class Engine:
    """See above; `base` is a directory on the disk for storage."""

    def __init__(self, base: Path, holder: int, *, shared: bool, user: int | None = None) -> None:
        self.base = base
        self.holder = holder
        self._prefix = ["nsenter", "-t", str(holder), "-m"]
        if user is not None:
            self._prefix += ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
        self.environment = {
            "PATH": f"{base}/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(base), "LC_ALL": "C.UTF-8",
            "XDG_RUNTIME_DIR": f"{base}/run",
            "CONTAINERS_STORAGE_CONF": f"{base}/storage.conf", "CONTAINERS_CONF": f"{base}/containers.conf",
        }  # fmt: skip
        if not shared:
            self.environment["OVERT_SERVER"] = ""

    def run(
        self, *words: str, status: Sequence[int] = (0,), given: bytes = b"", timeout: float = 60, **environment: str
    ) -> str:
        """Run a command in the engine's place; what it printed. Its exit status has to be among `status`."""
        done = subprocess.run(
            [*self._prefix, *words], env={**self.environment, **environment}, input=given,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False, cwd="/",
        )  # fmt: skip
        text = done.stdout.decode(errors="replace")
        assert done.returncode in status, f"{' '.join(words)}: status {done.returncode}\n{text}"
        return text

    def podman(self, *words: str, status: Sequence[int] = (0,), given: bytes = b"") -> str:
        """Run podman."""
        return self.run("podman", *words, status=status, given=given)

    def mounts(self) -> list[str]:
        """overt's mounts in this place."""
        return [line for line in self.run("cat", "/proc/self/mounts").splitlines() if ".overt " in line]


@contextmanager
def engine(base: Path, *, shared: bool, on_kernel: bool = False) -> Iterator[Engine]:
    """An engine with the image `tiny`. `shared`: one server for all its mounts, where overt.service has it.
    `on_kernel`: the kernel mounts its overlays, and not overt.
    """
    _write(base, sys.executable, on_kernel=on_kernel)
    server = None
    with held(HOLD) as holder:
        made = Engine(base, holder, shared=shared)
        if shared:
            server = _serve(made)
        try:
            made.podman("import", "-q", str(base / "tiny.tar"), "tiny")
            yield made
        finally:
            made.podman("rm", "--all", "--force", "--time", "0")
        assert made.mounts() == []
        if server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0


@contextmanager
def rootless(base: Path) -> Iterator[Engine]:
    """An engine of an ordinary user's, with the image `tiny`."""
    _write(base, _DEBIAN_PYTHON)
    etc = base / "etc"
    etc.mkdir()
    for name, line in (("passwd", f"somebody:x:{USER}:{USER}::{base}:/bin/sh"), ("group", f"somebody:x:{USER}:")):
        (etc / name).write_text(Path("/etc", name).read_text() + line + "\n")
    for name in ("subuid", "subgid"):
        (etc / name).write_text("somebody:300000:65536\n")
    (base / "run").mkdir(mode=0o700)
    for path in (base, base / "run"):
        os.chown(path, USER, USER)
    with held(_HOLD_USER.format(base=base) + HOLD) as holder:
        made = Engine(base, holder, shared=False, user=USER)
        try:
            made.podman("import", "-q", str(base / "tiny.tar"), "tiny")
            yield made
        finally:
            made.podman("rm", "--all", "--force", "--time", "0")
            made.podman("system", "migrate")  # ends the process that holds podman's namespaces


def why_not_rootless() -> str | None:
    """Why there can be no engine of an ordinary user's, if so."""
    if shutil.which("newuidmap") is None:
        return "not installed: uidmap (make test-containers installs it)"
    look = f"import sys; sys.path.insert(0, {str(SOURCE)!r}); import overt; sys.exit(sys.version_info < (3, 11))"
    words = ["setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups", _DEBIAN_PYTHON, "-c", look]
    if subprocess.run(words, capture_output=True, check=False, cwd="/").returncode:
        return f"an ordinary user cannot run {_DEBIAN_PYTHON} (3.11 or later) on {SOURCE}"
    return None


def _write(base: Path, python: str, *, on_kernel: bool = False) -> None:
    write_programs(base / "bin", python)
    write_image(base / "tiny.tar")
    (base / "storage.conf").write_text((_STORAGE + ("" if on_kernel else _MOUNT_PROGRAM)).format(base=base))
    (base / "containers.conf").write_text(_CONTAINERS)


@contextmanager
def held(script: str) -> Iterator[int]:
    """A mount namespace in which `script` was run; a process in it."""
    holder = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        yield holder.pid
    finally:
        holder.kill()
        holder.communicate()


def _serve(made: Engine) -> "subprocess.Popen[bytes]":
    ready, tell = os.pipe()
    words = ["overt", "serve", "-f", "--socket", "/run/overt/serve.sock", "--ready-fd", str(tell)]
    with open(made.base / "serve.log", "wb") as log:
        server = subprocess.Popen(
            ["nsenter", "-t", str(made.holder), "-m", *words], env=made.environment, pass_fds=[tell],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    os.close(tell)
    assert os.read(ready, 1) == b"\n"
    os.close(ready)
    return server
