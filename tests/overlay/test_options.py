"""Mount options: what is understood, and what is said of what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overt.overlay.options import OptionError, Options, parse, split

LAYERS = "lowerdir=/l,upperdir=/u,workdir=/w"


def test_layers_are_listed_uppermost_first() -> None:
    assert parse("lowerdir=/a:/b:/c,upperdir=/u,workdir=/w") == Options(("/a", "/b", "/c"), "/u", "/w")
    assert parse("lowerdir=/a") == Options(("/a",), None, None, read_only=True)


def test_a_backslash_in_a_single_directory_is_taken_out_once_as_the_kernel_does() -> None:
    options = parse(r"lowerdir=/l\:1:/l\\2,upperdir=/u\:\,\\\\\x,workdir=/w:w\\")
    assert (options.lower, options.upper, options.work) == (("/l:1", r"/l\2"), r"/u:,\\x", "/w:w\\")


@pytest.mark.parametrize(
    "text, option",
    [
        ("volatile", {"fsync": "volatile"}), ("fsync=volatile", {"fsync": "volatile"}),
        ("volatile,fsync=volatile", {"fsync": "volatile"}), ("fsync=strict", {"fsync": "strict"}),
        ("fsync=0", {"fsync": "volatile"}), ("volatile,fsync=0", {"fsync": "volatile"}), ("fsync=1", {}),
        ("ro,rw", {}), ("rw,ro", {"read_only": True}), ("nodev,dev,nosuid,suid,noexec,exec", {}),
        ("dev,nodev", {"no_dev": True}),
        ("symfollow,nosymfollow", {"no_symfollow": True}), ("nosymfollow,symfollow", {}),
        ("dirsync,iversion,noiversion,mand,nomand", {}),
        ("fsync=auto", {}), ("ro", {"read_only": True}), ("nopassthrough", {"passthrough": False}),
        ("userxattr", {"user_xattr": True, "redirect_dir": "nofollow"}),
        ("fsync=strict,fsync=strict", {"fsync": "strict"}),
        ("nosuid,nodev,noexec", {"no_suid": True, "no_dev": True, "no_exec": True}),
        ("unseen=refuse", {"unseen": "refuse"}), ("rw,relatime,defaults,_netdev", {}), ("", {}), (",,", {}),
        ("index=off,metacopy=off,nfs_export=off,xino=off", {}), ("index=on", {"indexed": True}),
        ("xino=on", {}), ("whiteouts=oci", {"whiteout_files": True}), ("whiteouts=overlay", {}),
        ("xino=auto", {}),
        ("metacopy=on", {"metacopy": True, "redirect_dir": "on"}),
        ("metacopy=on,redirect_dir=on", {"metacopy": True, "redirect_dir": "on"}),
        ("redirect_dir=on", {"redirect_dir": "on"}), ("redirect_dir=off", {"redirect_dir": "off"}),
        ("noatime,nodiratime", {"atime": "noatime", "dir_atime": False}), ("strictatime", {"atime": "strictatime"}),
        ("noatime,relatime,nodiratime,diratime,lazytime,silent", {}),
    ],
)  # fmt: skip
def test_understood(text: str, option: dict[str, object]) -> None:
    assert parse(f"{LAYERS},{text}") == parse(LAYERS)._replace(**option)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "lowerdir= is missing"), ("lowerdir=", "lowerdir= needs a value"),
        ("lowerdir=/a:::/b", "empty layer"), ("lowerdir=/a::", "empty layer"),
        ("lowerdir=::/a", "empty layer"), ("lowerdir=/a::/b:/c", "a layer after a data-only one"),
        ("lowerdir=:/a", "empty layer"), ("lowerdir=/a,lowerdir+=/b", "contradict"), ("datadir+=/d", "is missing"),
        ("lowerdir+=/a,datadir+=", "datadir+= needs a value"),
        (f"{LAYERS},whiteouts=both", "overlay, oci"), (f"{LAYERS},xino=maybe", "auto, on, off"),
        (f"{LAYERS},metacopy=perhaps", "on, off"), (f"{LAYERS},metacopy=on,redirect_dir=follow", "contradict"),
        (f"{LAYERS},metacopy=on,userxattr", "metacopy=on needs trusted xattrs"),
        ("lowerdir=/a,upperdir=/u", "needs workdir="), ("lowerdir=/a,workdir=/w", "without upperdir="),
        (f"{LAYERS},colour=blue", "unknown option 'colour=blue'"), (f"{LAYERS},shiny", "unknown option 'shiny'"),
        (f"{LAYERS},fsync=sometimes", "auto, strict, volatile"), (f"{LAYERS},unseen=x", "record, refuse"),
        (f"{LAYERS},volatile,fsync=auto", "contradict"), (f"{LAYERS},upperdir=/v", "upperdir= is given twice"),
        ("lowerdir=/a,volatile", "there is no upperdir="), (f"{LAYERS},index=yes", "index=yes: not one of"),
        (f"{LAYERS},sync", "sync: nothing would be written back at each write"),
        (f"{LAYERS},nfs_export=on", "nfs_export=on: file handles"),
        (f"{LAYERS},redirect_dir=maybe", "on, follow, nofollow, off"),
        (f"{LAYERS},redirect_dir=on,userxattr", "redirect_dir=on needs trusted xattrs"),
        (f"{LAYERS},redirect_dir=follow,userxattr", "contradict"),
        (f"{LAYERS},metacopy=", "metacopy= needs a value: on or off"),
        (f"{LAYERS},noxattrs=", "noxattrs= needs a value: 0 or 1"), (f"{LAYERS},fsync=0,fsync=1", "given twice"),
        (f"{LAYERS},ro=1", "unknown option 'ro=1'"), (f"{LAYERS},noatime=off", "unknown option"),
    ],
)  # fmt: skip
def test_refused_in_words_that_name_it(text: str, said: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse(text)
    assert said in str(raised.value)


def test_sloppily_unknown_options_are_passed_over() -> None:
    assert parse(f"{LAYERS},colour=blue,shiny", sloppy=True) == parse(LAYERS)


def test_backslashes_carry_colons_and_commas() -> None:
    options = parse(r"lowerdir=/a\:b:/c\,d:/e\\f,upperdir=/u,workdir=/w")
    assert options.lower == ("/a:b", "/c,d", "/e\\f")


@pytest.mark.parametrize(
    "text",
    [
        "lowerdir=/a:/b::/d::/e", "lowerdir+=/a,lowerdir+=/b,datadir+=/d,datadir+=/e",
        "lowerdir=/a:/b,datadir+=/d,datadir+=/e", "lowerdir=/a:/b::/d,datadir+=/e",
    ],
)  # fmt: skip
def test_data_only_layers_are_named_apart(text: str) -> None:
    options = parse(text)
    assert (options.lower, options.data) == (("/a", "/b"), ("/d", "/e"))


@given(st.lists(st.text("ab:,\\", min_size=1), min_size=1))
def test_what_is_escaped_comes_back(parts: list[str]) -> None:
    escaped = ":".join(part.replace("\\", "\\\\").replace(":", "\\:") for part in parts)
    assert split(escaped, ":") == parts


@given(st.lists(st.text("ab:,\\", min_size=1), min_size=1))
def test_layers_of_any_name_come_back(layers: list[str]) -> None:
    escaped = [layer.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for layer in layers]
    assert parse("lowerdir=" + ":".join(escaped)).lower == tuple(layers)


@given(st.text())
def test_any_text_is_understood_or_refused(text: str) -> None:
    try:
        parse(text)
    except OptionError as error:
        assert str(error)


def test_paths_are_made_absolute() -> None:
    options = parse("lowerdir=a:/b,upperdir=c,workdir=d").absolute()
    assert all(path and path.startswith("/") for path in (*options.lower, options.upper, options.work))
    assert options.lower[1] == "/b"
