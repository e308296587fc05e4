"""Writing files so that they are there after a power cut: for the queue's spool and for transports that write to disk.

All calls block, so they belong into native threads. Failure: OSError, whose errno is in NO_ROOM where the disk or a quota is full.
"""

from __future__ import annotations

import errno
import os

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
