"""Writing files so that they are there after a power cut: for the queue's spool and for transports that write to disk.

All calls block, so they belong into native threads. Failure: OSError, whose errno is in NO_ROOM where the disk or a quota is full.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from typing import Any, cast

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all octets, however many calls that takes."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]


def write_new(path: str, data: bytes, owner: tuple[int, int] | None = None) -> None:
    """Makes a file of mode 0600 with these octets, synced; its name is not yet. owner: (uid, gid), for root to give it to.

    Nothing is left where that fails; FileExistsError where there is one of that name.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            if owner is not None and os.geteuid() == 0:
                os.fchown(descriptor, *owner)
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except BaseException:
        os.unlink(path)
        raise


def sync_directory(path: str) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _from_libc(name: str, *arguments: Any) -> Callable[..., int] | None:
    """A function of the C library that Python does not have; None where there is none."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = arguments
    return cast("Callable[..., int] | None", function)


_sync_file_range = _from_libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_syncfs = _from_libc("syncfs", ctypes.c_int)
_WRITE = 2  # SYNC_FILE_RANGE_WRITE


def start_writing_out(descriptor: int) -> None:
    """Has the kernel begin to write a file out. Done to all files of a batch before the first fsync, it lets a file system
    with a journal commit once for all of them: each of them has its blocks by then (docs/performance.md)."""
    if _sync_file_range is not None:
        _sync_file_range(descriptor, 0, 0, _WRITE)


def sync_file_system(descriptor: int) -> None:
    """Makes all of the file system durable that a file lies on, names and octets: for many files it takes less than each by itself.

    Raises OSError. Where the C library has no syncfs(2) it is sync(2), which tells no errors.
    """
    if _syncfs is None:
        os.sync()
    elif _syncfs(descriptor) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


_renameat2 = _from_libc("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
_NOREPLACE = 1
_HAS_NONE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP})  # old kernels, some file systems, some sandboxes


def rename_new(directory: int, name: str, other_directory: int, other_name: str) -> None:
    """Renames from one open directory to another, never over a file that is there: FileExistsError."""
    if _renameat2 is not None:
        if not _renameat2(directory, os.fsencode(name), other_directory, os.fsencode(other_name), _NOREPLACE):
            return
        error = ctypes.get_errno()
        if error not in _HAS_NONE:
            raise OSError(error, os.strerror(error), other_name)
    os.link(name, other_name, src_dir_fd=directory, dst_dir_fd=other_directory, follow_symlinks=False)
    os.unlink(name, dir_fd=directory)
