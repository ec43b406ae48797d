"""Having runtimes hand syncfs(2) to the guard, and taking that back whole.

podman      two files of our own: a profile made from the one that is in use, and a drop-in for containers.conf that
            names it. Taken back by removing them, and the drop-in's directory if it was not there before.
a bundle    `linux.seccomp` in its config.json; what was there before is kept beside, and taken back as it was unless
            somebody has changed the file meanwhile: then only the profile is.

What is to be done is worked out first, as a list of changes, so that it can be shown without being done.
"""

import json
import tomllib
from pathlib import Path

from overt.guard import profile
from overt.guard.change import Change, needed, read

PODMAN = Path("/etc/containers")
DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
_DROP_IN = Path("containers.conf.d/overt-guard.conf")
PROFILE = Path("overt-guard.json")
_BEFORE = "config.json.before-overt-guard"
_MADE = "# Made by `overt guard install podman`.\n"
_MADE_WITH_DIRECTORY = "# Made by `overt guard install podman`, and its directory, too.\n"


def into_podman(directory: Path, socket: str) -> list[Change]:
    """The changes that guard all of podman's containers that are created then; `directory` is /etc/containers.

    Raises ProfileError if the profile in use cannot be changed so, or podman would use another than ours; and OSError.
    """
    made, drop_in = directory / PROFILE, directory / _DROP_IN
    for path, named in _named(directory):
        if path.parent == drop_in.parent and path.name > drop_in.name and named != made:
            raise profile.ProfileError(
                f"{path} is read after {drop_in.name} and names another profile, {named}: rename it to come before"
            )
    base = profile.load(str(_in_use(directory)))
    by = _MADE if drop_in.parent.is_dir() and not _is_directory_ours(drop_in) else _MADE_WITH_DIRECTORY
    text = f'{by}[containers]\nseccomp_profile = "{made}"\n'
    return needed([Change(made, _text(profile.make(base, socket))), Change(drop_in, text)])


def out_of_podman(directory: Path) -> list[Change]:
    """The changes that take it back. OSError."""
    drop_in = directory / _DROP_IN
    changes = [Change(path, None) for path in (drop_in, directory / PROFILE) if path.exists()]
    if _is_directory_ours(drop_in) and list(drop_in.parent.iterdir()) == [drop_in]:
        changes.append(Change(drop_in.parent, None))
    return changes


def _is_directory_ours(drop_in: Path) -> bool:
    return drop_in.exists() and read(drop_in).startswith(_MADE_WITH_DIRECTORY)


def into_bundle(bundle: Path, socket: str) -> list[Change]:
    """The changes to an OCI bundle. Raises ProfileError, and OSError if there is no config.json."""
    path, before = bundle / "config.json", bundle / _BEFORE
    now, original = read(path), _bundle_before(bundle)
    whole = profile.guarded(original, str(path), socket)
    if json.loads(now) == whole:
        return []
    is_kept = before.exists() and original != now
    return needed([*([] if is_kept else [Change(before, original, like=path)]), Change(path, _text(whole))])


def out_of_bundle(bundle: Path) -> list[Change]:
    """The changes that take it back; none if it is not in there. Raises ProfileError, OSError."""
    before = bundle / _BEFORE
    if not before.exists():
        return []
    return needed([Change(bundle / "config.json", _bundle_before(bundle)), Change(before, None)])


def _bundle_before(bundle: Path) -> str:
    """config.json as it would be without us."""
    path, before = bundle / "config.json", bundle / _BEFORE
    text = read(path)
    if not before.exists():
        return text
    kept = read(before)
    try:
        whole, was = json.loads(text), json.loads(kept)
        if not (whole["linux"].get("seccomp") or {}).get("listenerPath"):  # somebody has made another
            return text
        del whole["linux"]["seccomp"]
        if "seccomp" in was["linux"]:
            whole["linux"]["seccomp"] = was["linux"]["seccomp"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise profile.ProfileError(f"{path}, or {before.name} beside it, is damaged: {error}") from None
    return kept if whole == was else _text(whole)


def _in_use(directory: Path) -> Path:
    """The profile that containers.conf(5) names, whose later files win; our own does not count."""
    return [DEFAULT_PROFILE, *(named for _, named in _named(directory))][-1]


def _named(directory: Path) -> list[tuple[Path, Path]]:
    """The files that name a profile, in the order in which they are read, and which; without our own."""
    found = []
    files = [Path("/usr/share/containers/containers.conf"), directory / "containers.conf"]
    files += sorted((directory / _DROP_IN.parent).glob("*.conf"))
    for path in files:
        if path.exists() and path != directory / _DROP_IN:
            try:
                named = tomllib.loads(read(path)).get("containers", {}).get("seccomp_profile")
                found += [(path, Path(named))] if named else []
            except (ValueError, AttributeError, TypeError, RecursionError) as error:
                raise profile.ProfileError(f"{path}: {error}") from None
    return found


def _text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
