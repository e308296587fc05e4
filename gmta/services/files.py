"""Writing files so that they are there after a power cut: for the queue's spool and for transports that write to disk.

All calls block, so they belong into native threads. Failure: OSError, whose errno is in NO_ROOM where the disk or a quota is full.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all octets, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find_sync_file_range() -> Callable[[int, int, int, int], int]:
    """sync_file_range(2) of the C library, which Python does not have; where there is none, something that does nothing."""
    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is None:
        return lambda descriptor, offset, octets, flags: 0
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function: Callable[[int, int, int, int], int] = found
    return function


_sync_file_range = _find_sync_file_range()
_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def start_writing_out(descriptor: int) -> None:
    """Has the kernel begin to write a file out. Done to all files of a batch before the first fsync, it lets a file system
    with a journal commit once for all of them: each of them has its blocks by then (docs/performance.md)."""
    _sync_file_range(descriptor, 0, 0, _WRITE)
