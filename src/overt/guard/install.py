"""Having runtimes hand syncfs(2) to the guard, and taking that back whole.

podman      two files of our own: a profile made from the one that is in use, and a drop-in for containers.conf that
            names it. Taken back by removing them.
a bundle    `linux.seccomp` in its config.json; what it was before is kept beside it.

What is to be done is worked out first, as a list of changes, so that it can be shown without being done.
"""

import json
import tomllib
from pathlib import Path

from overt.guard import profile
from overt.guard.change import Change

PODMAN = Path("/etc/containers")
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
_DROP_IN = Path("containers.conf.d/overt-guard.conf")
PROFILE = Path("overt-guard.json")
_BEFORE = "config.json.before-overt-guard"


def into_podman(directory: Path, socket: str) -> list[Change]:
    """The changes that guard all of podman's containers from their next start; `directory` is /etc/containers.

    Raises ProfileError if the profile in use cannot be changed so, and OSError.
    """
    base = profile.load(str(_in_use(directory)))
    made = directory / PROFILE
    drop_in = f'# Made by `overt guard install podman`.\n[containers]\nseccomp_profile = "{made}"\n'
    return [Change(made, _text(profile.make(base, socket))), Change(directory / _DROP_IN, drop_in)]


def out_of_podman(directory: Path) -> list[Change]:
    """The changes that take it back."""
    return [Change(path, None) for path in (directory / _DROP_IN, directory / PROFILE) if path.exists()]


def into_bundle(bundle: Path, socket: str) -> list[Change]:
    """The changes to an OCI bundle. Raises ProfileError, and OSError if there is no config.json."""
    path = bundle / "config.json"
    before = path.read_text()
    made = profile.make(profile.load(str(path)), socket)
    if json.loads(before).get("linux", {}).get("seccomp") == made:
        return []
    whole = json.loads(before)
    whole["linux"]["seccomp"] = made
    return [Change(bundle / _BEFORE, before), Change(path, _text(whole))]


def out_of_bundle(bundle: Path) -> list[Change]:
    """The changes that take it back. OSError if the guard is not in there."""
    before = bundle / _BEFORE
    return [Change(bundle / "config.json", before.read_text()), Change(before, None)]


def _in_use(directory: Path) -> Path:
    """The profile that containers.conf(5) names, whose later files win; our own does not count."""
    found = DEFAULT_PROFILE
    files = [Path("/usr/share/containers/containers.conf"), directory / "containers.conf"]
    files += sorted((directory / _DROP_IN.parent).glob("*.conf"))
    for path in files:
        if path.exists() and path != directory / _DROP_IN:
            try:
                named = tomllib.loads(path.read_text()).get("containers", {}).get("seccomp_profile")
            except ValueError as error:
                raise profile.ProfileError(f"{path}: {error}") from None
            found = Path(named) if named else found
    return found


def _text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
