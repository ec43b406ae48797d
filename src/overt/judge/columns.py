"""The columns of the matrix: the systems that are judged unless somebody says otherwise."""

from overt.judge.guarded import Guarded
from overt.judge.systems import Command, Kernel, Overt, Plain, System

_LAYERS = "lowerdir={lower},upperdir={upper},workdir={work}"

SYSTEMS: list[System] = [
    Plain("plain"),
    Kernel("kernel"),
    Kernel("kernel volatile", "volatile", ("volatile", None)),
    Command("fuse-overlayfs", "ordinary", ["fuse-overlayfs", "-o", _LAYERS, "{mount}"]),
    Command("fuse-overlayfs volatile", "volatile", ["fuse-overlayfs", "-o", f"{_LAYERS},volatile", "{mount}"]),
    Command(
        "mergerfs",
        "ordinary",
        ["mergerfs", "-o", "category.create=ff,minfreespace=0", "{upper}=RW:{lower}=RO", "{mount}"],
    ),
    Command("unionfs-fuse", "ordinary", ["unionfs", "-o", "cow", "{upper}=RW:{lower}=RO", "{mount}"]),
    Overt("overt"),
    Overt("overt strict", "ordinary", "fsync=strict"),
    Overt("overt nopassthrough", "ordinary", "nopassthrough"),
    Overt("overt volatile", "volatile", "volatile"),
    Guarded("overt guard"),
]
