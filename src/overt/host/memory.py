"""Memory that is the kernel's: a page of a file dirtied through a shared mapping; what is free, given back."""

import ctypes
import gc

from overt.host.libc import check, libc

_PROT_READ_WRITE = 3
_MAP_SHARED = 1
_MS_SYNC = 4

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_FAILED = ctypes.c_void_p(-1).value


def write_through_mapping(fd: int, size: int) -> None:
    """Map `size` bytes of `fd` shared, dirty the first page, and msync(2) it; raise what the write-back met.

    `size` is a page at least. EFAULT if the page cannot be had: a connection was aborted, a file has become shorter.

    Not Python's mmap: that holds the GIL during the page fault, which on one's own FUSE mount is a deadlock. And not by
    a store of our own, to which the kernel answers with SIGBUS then: by one of the kernel's, which has uname(2) tell
    its answer there.
    """
    address = libc.mmap(None, size, _PROT_READ_WRITE, _MAP_SHARED, fd, 0)
    if address == _FAILED:
        check(-1)
    try:
        check(libc.uname(ctypes.c_void_p(address)))
        check(libc.msync(ctypes.c_void_p(address), ctypes.c_size_t(size), _MS_SYNC))
    finally:
        check(libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size)))


def give_back() -> None:
    """Have the process let go of memory that it does not use.

    CPython keeps some thousands of freed objects for later use; each holds on to the megabyte that it is in, until a
    full collection. The C library does likewise (malloc_trim(3)).
    """
    gc.collect()
    trim = getattr(libc, "malloc_trim", None)  # there is none in musl
    if trim is not None:
        trim(0)


def one_arena() -> None:
    """Have all threads share malloc's arena (mallopt(3), M_ARENA_MAX): they take turns anyway, for the GIL."""
    mallopt = getattr(libc, "mallopt", None)  # there is none in musl
    if mallopt is not None:
        mallopt(-8, 1)
