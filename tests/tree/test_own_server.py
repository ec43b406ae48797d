"""A mount with a server of its own, as `overt mount` makes it."""

import os
import subprocess
import sys
from pathlib import Path

from overt.server import registry

from .ground import Layers


def test_neither_process_stays_in_the_directory_where_the_command_was_given(layers: Layers) -> None:
    """Its filesystem could not be unmounted until the last of them had ended."""
    options = ["-o", layers.words, str(layers.path)]
    subprocess.run([sys.executable, "-m", "overt", "mount", *options], cwd=layers.upper, check=True, timeout=30)
    try:
        server = next(entry.pid for entry in registry.entries() if entry.target == str(layers.path))
        children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
        assert children, "the watchdog"
        assert [os.readlink(f"/proc/{pid}/cwd") for pid in (server, *children)] == ["/"] * (1 + len(children))
    finally:
        subprocess.run([sys.executable, "-m", "overt", "umount", str(layers.path)], check=True, timeout=30)
