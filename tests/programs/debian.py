"""A minimal Debian system: this machine's release, from where this machine gets its own packages."""

import os
import platform
import shutil
from pathlib import Path

from .ground import Failed, run

_NO_NETWORK = ("Failed getting release file", "Couldn't download", "Couldn't find these debs")


class NoNetwork(Exception):
    """Debian's packages cannot be had here; the text says why."""


def _source() -> tuple[str, str]:
    """(release, URI) of this machine's own source of Debian's main packages."""
    release = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    if shutil.which("apt-get") is None:
        raise NoNetwork("not a Debian system: there is no apt-get")
    for line in run("apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)").splitlines():
        words = line.split()
        if words[:2] == [release, "main"]:
            return release, words[2]
    raise NoNetwork(f"apt has no source of {release or 'this release'}'s main packages")


def _acquire() -> str:
    """How apt reaches its sources here (proxies, expiry), as lines of apt.conf(5)."""
    lines = run("apt-config", "dump").splitlines()
    return "\n".join(line for line in lines if line.startswith(("Acquire::http", "Acquire::Check"))) + "\n"


def _proxy() -> dict[str, str]:
    """The same for debootstrap's wget."""
    line = run("apt-config", "shell", "proxy", "Acquire::http::Proxy").strip()
    return {"http_proxy": line.partition("=")[2].strip("'\"")} if line else {}


def bootstrap(root: Path) -> None:
    """Make the system at `root`; NoNetwork where that cannot be."""
    if shutil.which("debootstrap") is None:
        raise NoNetwork("debootstrap is not installed")
    release, uri = _source()
    try:
        run("debootstrap", "--variant=minbase", release, root, uri, timeout=400, env=_proxy())
    except Failed as failure:
        log = root / "debootstrap/debootstrap.log"
        if any(words in str(failure) for words in _NO_NETWORK):
            raise NoNetwork(str(failure).splitlines()[-1]) from None
        raise Failed(f"{failure}\n{log.read_text()[-4000:] if log.exists() else ''}") from None
    configure(root)


def configure(root: Path) -> None:
    """Have apt in the system at `root` reach its sources as this machine does, and start no services."""
    (root / "etc/apt/apt.conf.d/99machine").write_text(_acquire())
    if os.path.isdir("/etc/apt/auth.conf.d"):
        shutil.copytree("/etc/apt/auth.conf.d", root / "etc/apt/auth.conf.d", dirs_exist_ok=True)
    for name in ("resolv.conf", "hosts"):
        shutil.copyfile(f"/etc/{name}", root / "etc" / name)
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)


_ENTER = """
mount --rbind /dev "$1/dev"
mount -t proc proc "$1/proc"
exec chroot "$1" /bin/sh -euc "$2"
"""


def inside(root: Path, script: str, timeout: float = 120.0) -> str:
    """Run a shell script in the system at `root`, with /proc and /dev, in namespaces that end with it."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    return run(*namespaces, "sh", "-euc", _ENTER, "sh", root, script, timeout=timeout, env=env)
