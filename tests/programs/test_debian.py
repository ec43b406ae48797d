"""A system made of Debian packages, and dpkg at work on it: renames, hard links and fsync over a lower layer."""

from pathlib import Path

import pytest

from .debian import bootstrap, inside
from .ground import Ground

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]


def test_packages_are_installed_replaced_and_removed_in_a_chroot(layers: Ground, debian: Path) -> None:
    chroot = layers.overlay(debian)
    inside(chroot.path, "apt-get -q update")
    inside(chroot.path, "apt-get -q -y --no-install-recommends install hello less")
    assert inside(chroot.path, "hello").strip() == "Hello, world!"
    # Files of the lower layer: dpkg links each aside, renames the new one over it, and removes the link.
    inside(chroot.path, "apt-get -q -y --reinstall install coreutils dash base-files")
    assert inside(chroot.path, "dpkg --audit && dpkg --verify") == ""
    inside(chroot.path, "apt-get -q -y purge hello")
    assert "hello" not in inside(chroot.path, "dpkg-query -W")
    assert not (chroot.path / "usr/bin/hello").exists()
    assert not (debian / "usr/bin/hello").exists()
    layers.umount(chroot)
    layers.remount(chroot)
    assert inside(chroot.path, "dpkg --audit && dpkg --verify && less --version | head -n 1").startswith("less ")


@pytest.mark.long
def test_a_whole_system_is_installed_into_an_overlay(layers: Ground, debian: Path) -> None:
    target = layers.overlay()
    root = target.path / "root"
    bootstrap(root)
    assert inside(root, "dpkg --audit && dpkg --verify") == ""
    assert inside(root, "dpkg-query -W") == inside(debian, "dpkg-query -W")
