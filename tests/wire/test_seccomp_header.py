"""Every record and constant of overt.wire.seccomp, asked of a C compiler and <linux/seccomp.h>."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from overt.wire import seccomp
from overt.wire.record import offsets_of, size_of

STRUCTS: dict[str, type[tuple[Any, ...]]] = {
    "seccomp_data": seccomp.SeccompData,
    "seccomp_notif": seccomp.SeccompNotif,
    "seccomp_notif_resp": seccomp.SeccompNotifResp,
}
CONSTANTS: dict[str, int] = {
    name: value for name, value in vars(seccomp).items() if re.match("SECCOMP|AUDIT", name) and isinstance(value, int)
}
ABIS = {"64": seccomp.AUDIT_ARCH_X86_64, "32": seccomp.AUDIT_ARCH_I386, "x32": seccomp.AUDIT_ARCH_X86_64}


def ask(directory: Path, include: list[str], lines: list[str]) -> dict[str, int]:
    """Compile and run a program of `lines`; each prints a name and a number."""
    if shutil.which("gcc") is None or not Path("/usr/include/linux/seccomp.h").exists():
        pytest.skip("not checked: gcc and <linux/seccomp.h> (Debian: gcc, linux-libc-dev) are needed")
    head = [f"#include <{name}>" for name in ("stdio.h", "stddef.h", "sys/ioctl.h", *include)]
    (directory / "ask.c").write_text("\n".join([*head, "int main(void) {", *lines, "return 0; }", ""]))
    subprocess.run(["gcc", "-Wall", "-o", "ask", "ask.c"], cwd=directory, check=True, timeout=60)
    answer = subprocess.run(["./ask"], cwd=directory, check=True, timeout=10, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in answer.splitlines())}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Sizes and offsets in bytes, and values, by name."""
    lines = []
    for struct, record in STRUCTS.items():
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        for field in record._fields:  # type: ignore[attr-defined]
            member = re.sub(r"args(\d)", r"args[\1]", field)
            lines.append(f'printf("{struct}.{field} %zu\\n", offsetof(struct {struct}, {member}));')
    for name in CONSTANTS:
        line = f'printf("{name} %llu\\n", (unsigned long long)({name}));'
        lines.append(f"#ifdef {name}\n{line}\n#endif")
    return ask(tmp_path_factory.mktemp("seccomp"), ["linux/seccomp.h", "linux/audit.h"], lines)


@pytest.mark.parametrize("struct", STRUCTS)
def test_a_record_is_laid_out_as_the_header_says(struct: str, header: dict[str, int]) -> None:
    record = STRUCTS[struct]
    assert size_of(record) == header[struct]
    assert offsets_of(record) == {
        name.removeprefix(f"{struct}."): offset for name, offset in header.items() if name.startswith(f"{struct}.")
    }


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_has_the_value_that_the_header_gives_it(name: str, header: dict[str, int]) -> None:
    assert header[name] == CONSTANTS[name]


@pytest.mark.parametrize("abi", ABIS)
def test_syncfs_has_the_number_that_each_abi_gives_it(abi: str, tmp_path: Path) -> None:
    name = f"asm/unistd_{abi}.h"
    if not any(Path("/usr/include", arch, name).exists() for arch in ("x86_64-linux-gnu", ".")):
        pytest.skip(f"no <{name}> on this architecture")
    include = ["linux/types.h"] if abi != "x32" else []
    lines = ['printf("syncfs %d\\n", (int)(__NR_syncfs));']
    if abi == "x32":
        lines.insert(0, "#undef __X32_SYSCALL_BIT\n#define __X32_SYSCALL_BIT 0x40000000")
    assert (ABIS[abi], ask(tmp_path, [*include, name], lines)["syncfs"]) in seccomp.SYNCFS
