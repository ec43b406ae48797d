"""index=on: a lower file with several names is one file before and after its copy-up, here and in the kernel."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from overt.overlay.options import OptionError
from overt.server.client import ServerError

from .ground import Layers, marks

NLINK, ORIGIN = "trusted.overlay.nlink", "trusted.overlay.origin"


@pytest.fixture(params=["", "nopassthrough"], ids=["passthrough", "nopassthrough"])
def indexed(request: pytest.FixtureRequest, new_layers: Callable[..., Layers]) -> Layers:
    layers = new_layers(options=str(request.param), features="index=on")
    (layers.lower / "dir").mkdir()
    (layers.lower / "one").write_text("text")
    for name in ("two", "dir/three"):
        os.link(layers.lower / "one", layers.lower / name)
    return layers


NAMES = ("one", "two", "dir/three")


def links(root: Path, names: tuple[str, ...] = NAMES) -> set[tuple[int, int, int, str]]:
    """What is seen of the names of one file: one thing, if it is one."""
    return {
        (st.st_ino, st.st_nlink, st.st_mode, (root / name).read_text())
        for name in names
        for st in [os.lstat(root / name)]
    }


def entries(layers: Layers) -> list[Path]:
    """What is in the index, but for the whiteout that the kernel keeps there to link others to it."""
    return sorted(path for path in (layers.work / "index").iterdir() if not path.name.startswith("#"))


def test_all_names_show_the_copy(indexed: Layers) -> None:
    root = indexed.mount()
    assert len(links(root)) == 1
    number = os.stat(root / "one").st_ino
    with open(root / "two", "a") as file:
        file.write(" and more")
    os.chmod(root / "one", 0o640)
    assert links(root) == {(number, 3, 0o100640, "text and more")}
    indexed.umount()
    with indexed.kernel() as path:
        assert links(path) == {(number, 3, 0o100640, "text and more")}
    assert links(indexed.mount()) == {(number, 3, 0o100640, "text and more")}
    indexed.umount()
    (entry,) = entries(indexed)
    assert bytes.fromhex(entry.name) == os.getxattr(entry, ORIGIN)
    assert (indexed.lower / "one").read_text() == "text"


def test_the_kernels_copy_shows_here(indexed: Layers) -> None:
    with indexed.kernel() as path:
        number = os.stat(path / "one").st_ino
        (path / "dir/three").write_text("by the kernel")
        os.chmod(path / "two", 0o600)
    assert links(indexed.mount()) == {(number, 3, 0o100600, "by the kernel")}
    (indexed.path / "one").write_text("by both")
    assert links(indexed.path) == {(number, 3, 0o100600, "by both")}
    with indexed.kernel() as path:
        assert links(path) == {(number, 3, 0o100600, "by both")}


@pytest.mark.parametrize("touched", [(), ("one",), ("dir/three", "one")], ids=["none", "one", "two"])
def test_what_is_written_down_is_what_the_kernel_writes(indexed: Layers, touched: tuple[str, ...]) -> None:
    found = []
    for by in ("overt", "kernel"):
        if by == "overt":
            root = indexed.mount()
            operate(root, touched)
            indexed.umount()
        else:
            with indexed.kernel() as path:
                operate(path, touched)
        found.append(
            (
                [(entry.name, entry.stat().st_nlink, os.getxattr(entry, NLINK)) for entry in entries(indexed)],
                marks(indexed.upper) - {"trusted.overlay.uuid"},
                os.getxattr(indexed.upper, ORIGIN),
                marks(indexed.work / "index"),
                sorted(os.listdir(indexed.upper)),
            )
        )
        for directory in (indexed.upper, indexed.work):
            subprocess.run(["rm", "-rf", directory], check=True)
            directory.mkdir()
    assert found[0] == found[1]


def operate(root: Path, touched: tuple[str, ...]) -> None:
    for name in touched:
        os.rename(root / name, root / f"{name}.new")
    os.unlink(root / "two")
    (root / "dir").chmod(0o700)


def test_names_go_one_by_one_and_the_entry_with_the_last(indexed: Layers) -> None:
    root = indexed.mount()
    kept = os.open(root / "one", os.O_RDONLY)
    try:
        for left, name in ((2, "two"), (1, "one"), (0, "dir/three")):
            os.unlink(root / name)
            assert not os.path.lexists(root / name)
            assert os.fstat(kept).st_nlink == left
            assert len(entries(indexed)) == (left > 0)
        assert os.read(kept, 10) == b"text"
    finally:
        os.close(kept)
    indexed.umount()
    with indexed.kernel() as path:
        assert sorted(os.listdir(path)) == ["dir"]
        assert os.listdir(path / "dir") == []


def test_a_name_that_only_the_lower_layer_has_keeps_the_entry(indexed: Layers) -> None:
    """The copy has no name in the upper any more, and is there under the names that are left below."""
    root = indexed.mount()
    (root / "one").write_text("changed")
    os.unlink(root / "one")
    indexed.umount()
    assert not list(indexed.upper.glob("t*"))
    with indexed.kernel() as path:
        assert {seen[1:] for seen in links(path, ("two", "dir/three"))} == {(2, 0o100644, "changed")}
    root = indexed.mount()
    assert {seen[1:] for seen in links(root, ("two", "dir/three"))} == {(2, 0o100644, "changed")}


def test_links_made_and_moved_are_the_same_file(indexed: Layers) -> None:
    root = indexed.mount()
    os.link(root / "two", root / "four")
    os.rename(root / "dir/three", root / "five")
    os.rename(root / "one", root / "two")  # of one file: nothing is done
    (root / "other").touch()
    os.rename(root / "other", root / "one")
    names = ("two", "four", "five")
    (shown,) = links(root, names)
    assert shown[1] == 3
    with indexed.kernel() as path:
        assert links(path, names) == {shown}
        os.link(path / "four", path / "six")
        os.unlink(path / "two")
    names = ("four", "five", "six")
    assert links(indexed.mount(), names) == {shown}


def test_special_files_and_symlinks_too(indexed: Layers) -> None:
    os.symlink("target", indexed.lower / "link")
    os.mkfifo(indexed.lower / "fifo")
    for name in ("link", "fifo"):
        os.link(indexed.lower / name, indexed.lower / f"{name}2", follow_symlinks=False)
    root = indexed.mount()
    for name in ("link", "fifo"):
        os.lchown(root / name, 5, 6)
        assert os.lstat(root / f"{name}2").st_uid == 5
    with indexed.kernel() as path:
        for name in ("link", "fifo"):
            assert os.lstat(path / f"{name}2").st_gid == 6
            os.unlink(path / name)
    root = indexed.mount()
    assert [os.lstat(root / name).st_nlink for name in ("link2", "fifo2")] == [1, 1]


def test_a_copy_without_its_data_is_one_file_too(indexed: Layers) -> None:
    indexed.features = "index=on,metacopy=on"
    root = indexed.mount()
    os.chmod(root / "one", 0o600)
    assert links(root) == {(os.stat(root / "one").st_ino, 3, 0o100600, "text")}
    os.rename(root / "two", root / "dir/moved")
    names = ("one", "dir/moved", "dir/three")
    (shown,) = links(root, names)
    with indexed.kernel() as path:
        assert links(path, names) == {shown}
    root = indexed.mount()
    assert links(root, names) == {shown}
    with open(root / "dir/moved", "a") as file:
        file.write("!")
    assert {seen[3] for seen in links(root, names)} == {"text!"}
    with indexed.kernel() as path:
        assert {seen[3] for seen in links(path, names)} == {"text!"}


def test_the_same_file_in_two_lower_layers_is_one(new_layers: Callable[..., Layers]) -> None:
    layers = new_layers(2, features="index=on")
    (layers.lowers[0] / "one").write_text("text")
    os.link(layers.lowers[0] / "one", layers.lowers[1] / "two")
    root = layers.mount()
    assert len(links(root, ("one", "two"))) == 1
    (root / "two").write_text("changed")
    assert len(links(root, ("one", "two"))) == 1
    os.unlink(root / "two")
    assert (root / "one").read_text() == "changed"
    with layers.kernel() as path:
        assert (path / "one").read_text() == "changed"
        assert not (path / "two").exists()


def test_an_open_file_follows_its_copy(indexed: Layers) -> None:
    """With passthrough the one who reads stays on the lower file, as docs/limits.md says."""
    root = indexed.mount()
    with open(root / "one") as reader:
        with open(root / "two", "w") as writer:
            writer.write("new")
        assert reader.read() == ("text" if indexed.options == "" else "new")
        assert os.fstat(reader.fileno()).st_ino == os.stat(root / "two").st_ino
    assert {seen[3] for seen in links(root)} == {"new"}


def test_without_an_index_they_part(indexed: Layers) -> None:
    indexed.features = "index=off,nfs_export=off"
    root = indexed.mount()
    (root / "one").write_text("changed")
    assert (root / "two").read_text() == "text"
    assert os.stat(root / "one").st_ino != os.stat(root / "two").st_ino
    indexed.umount()
    assert os.listdir(indexed.work) == ["work"]


def test_a_copy_of_the_index_is_a_file_of_its_own_without_it(indexed: Layers) -> None:
    (indexed.mount() / "one").write_text("changed")
    indexed.features = "index=off"
    indexed.umount()
    with indexed.kernel() as path:
        expected = os.stat(path / "one").st_ino
    root = indexed.mount()
    assert os.stat(root / "one").st_ino == expected
    assert (root / "two").read_text() == "text"


# The index at the mount


def test_entries_that_nobody_needs_go_at_the_mount(indexed: Layers) -> None:
    index = indexed.work / "index"
    (indexed.mount() / "one").write_text("changed")
    indexed.umount()
    (entry,) = entries(indexed)
    os.unlink(indexed.upper / "one")
    for name in ("#1", "#2"):
        (index / name).mkdir()
    (index / "#1" / "in it").touch()
    root = indexed.mount()
    assert entries(indexed) == [entry], "names of the lower layer need it"
    assert (root / "two").read_text() == "changed"
    indexed.umount()
    os.setxattr(entry, NLINK, b"U-1")
    indexed.mount()
    assert entries(indexed) == []
    assert (root / "two").read_text() == "text"


def test_an_entry_of_another_file_goes(indexed: Layers) -> None:
    (indexed.mount() / "one").write_text("changed")
    indexed.umount()
    (entry,) = entries(indexed)
    os.setxattr(entry, ORIGIN, os.getxattr(indexed.upper, ORIGIN))
    indexed.mount()
    assert entries(indexed) == []


@pytest.mark.parametrize("name", ["name", "00", "zz" * 30])
def test_what_is_no_entry_refuses_the_mount(indexed: Layers, name: str) -> None:
    indexed.mount()
    indexed.umount()
    (indexed.work / "index" / name).touch()
    with pytest.raises(ServerError, match="is no entry"):
        indexed.mount()
    with pytest.raises(subprocess.CalledProcessError), indexed.kernel():
        pass


def test_another_lower_layer_is_refused(indexed: Layers) -> None:
    indexed.mount()
    indexed.umount()
    other = indexed.place / "other"
    other.mkdir()
    indexed.lowers = [other]
    with pytest.raises(ServerError, match="another lowerdir"):
        indexed.mount()
    with pytest.raises(subprocess.CalledProcessError), indexed.kernel():
        pass
    indexed.features = "index=off"
    indexed.mount()


def test_another_upper_is_refused(indexed: Layers) -> None:
    indexed.mount()
    indexed.umount()
    os.rename(indexed.upper, indexed.place / "before")
    indexed.upper.mkdir()
    with pytest.raises(ServerError, match="another upperdir"):
        indexed.mount()


@pytest.mark.parametrize("value", [b"", b"U", b"U+", b"X+1", b"U+1x", b"L-9", b"U+99999999999", b"\xff" * 40])
def test_a_count_that_is_none_is_not_believed(indexed: Layers, value: bytes) -> None:
    (indexed.mount() / "one").write_text("changed")
    indexed.umount()
    (entry,) = entries(indexed)
    os.setxattr(entry, NLINK, value)
    with indexed.kernel() as path:
        expected = links(path)
    assert links(indexed.mount()) == expected


def test_a_link_that_a_crash_left_half_counted_is_counted(indexed: Layers) -> None:
    (indexed.mount() / "one").write_text("changed")
    indexed.umount()
    (entry,) = entries(indexed)
    assert os.getxattr(entry, NLINK) == b"U+1"
    os.setxattr(entry, NLINK, b"L+0")
    os.link(entry, indexed.upper / "two")
    with indexed.kernel() as path:
        expected = links(path)
    assert links(indexed.mount()) == expected
    assert {seen[1] for seen in expected} == {3}


def test_an_entry_that_does_not_say_of_which_file_it_is_stays(indexed: Layers) -> None:
    """It may be all that there is of a file, whose name in the upper is removed, say. The kernel refuses as well."""
    root = indexed.mount()
    (root / "one").write_text("new")
    (root / "one").unlink()
    indexed.umount()
    (entry,) = entries(indexed)
    origin = os.getxattr(entry, ORIGIN)
    os.removexattr(entry, ORIGIN)
    with pytest.raises(subprocess.CalledProcessError), indexed.kernel():
        pass
    with pytest.raises(ServerError, match="does not say of which file it is"):
        indexed.mount()
    os.setxattr(entry, ORIGIN, origin)
    assert (indexed.mount() / "two").read_text() == "new"


def test_a_held_file_gets_a_name_again_though_none_is_known(new_layers: Callable[..., Layers]) -> None:
    """Where its data is is said as the kernel says it, and not by its entry."""
    layers = new_layers(options="", features="index=on,metacopy=on,redirect_dir=on")
    (layers.lower / "dir").mkdir()
    (layers.lower / "dir/one").write_text("text")
    os.link(layers.lower / "dir/one", layers.lower / "dir/two")
    root = layers.mount()
    held, directory = os.open(root / "dir/one", os.O_RDONLY), os.open(root / "dir", os.O_RDONLY)
    try:
        os.fchmod(held, 0o600)
        os.unlink(root / "dir/one")
        os.link(f"/proc/self/fd/{held}", "three", dst_dir_fd=directory, follow_symlinks=True)  # linkat(2), that is
    finally:
        os.close(held)
        os.close(directory)
    layers.umount()
    assert os.getxattr(layers.upper / "dir/three", "trusted.overlay.redirect") == b"/dir/one"
    assert links(layers.mount(), ("dir/two", "dir/three")).pop()[2:] == (0o100600, "text")
    layers.umount()
    with layers.kernel() as path:
        assert links(path, ("dir/two", "dir/three")).pop()[2:] == (0o100600, "text")


def test_with_user_xattrs_there_is_none_and_that_is_said(indexed: Layers) -> None:
    lines = indexed.client.mount(str(indexed.path), f"{indexed.words},index=on,userxattr")
    assert any(line.startswith("index=off: it needs trusted xattrs") for line in lines)
    (indexed.path / "one").write_text("changed")
    assert (indexed.path / "two").read_text() == "text"
    indexed.umount()


def test_over_a_layer_without_handles_there_is_none_and_that_is_said(indexed: Layers) -> None:
    """A FUSE mount of another server: its handles do not lead back (and the kernel says so too)."""
    with open("/proc/filesystems") as file:
        if "ramfs" not in file.read():
            pytest.skip("no filesystem without handles here")
    lower = indexed.place / "ramfs"
    lower.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", lower], check=True, timeout=30)
    try:
        indexed.lowers = [lower]
        lines = indexed.client.mount(str(indexed.path), f"{indexed.words},index=on")
        assert any(line.startswith("index=off: ") for line in lines), lines
        indexed.umount()
    finally:
        subprocess.run(["umount", lower], check=True, timeout=30)


def test_nfs_export_is_refused(indexed: Layers) -> None:
    indexed.features = "index=on,nfs_export=on"
    with pytest.raises(OptionError, match="nfs_export=on"):
        indexed.mount()
