"""Accounts of this machine, with a directory that fails told from an account that is not there, which Python's pwd does not.

Mail for somebody who is in a directory that does not answer has to wait; for somebody who is nowhere it fails. A look-up may go over a
network, so it belongs into a native thread. Failure: OSError where it can't be told now.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import NamedTuple

_ABSENT = frozenset({0, errno.ENOENT, errno.ESRCH, errno.EBADF, errno.EPERM})  # getpwnam(3): what stands for "there is none"
_MOST = 1024 * 1024


class _Passwd(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("password", ctypes.c_char_p), ("uid", ctypes.c_uint), ("gid", ctypes.c_uint),
                ("gecos", ctypes.c_char_p), ("home", ctypes.c_char_p), ("shell", ctypes.c_char_p))


class Account(NamedTuple):
    """An account."""

    name: str
    uid: int
    gid: int
    home: str

    def groups(self) -> list[int]:
        """Its groups, the first one too."""
        return os.getgrouplist(self.name, self.gid)


_getpwnam_r = ctypes.CDLL(None).getpwnam_r
_getpwnam_r.argtypes = (ctypes.c_char_p, ctypes.POINTER(_Passwd), ctypes.c_char_p, ctypes.c_size_t, ctypes.POINTER(ctypes.POINTER(_Passwd)))


def find_account(name: str) -> Account | None:
    """The account of that name, None where there is none; raises OSError where that can't be told now."""
    try:
        octets = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return None
    if not octets or b"\0" in octets:
        return None
    size = 4096
    while True:
        entry, found = _Passwd(), ctypes.POINTER(_Passwd)()
        room = ctypes.create_string_buffer(size)
        status = _getpwnam_r(octets, ctypes.byref(entry), room, size, ctypes.byref(found))
        if found:
            return Account(os.fsdecode(entry.name), entry.uid, entry.gid, os.fsdecode(entry.home))
        if status == errno.ERANGE and size < _MOST:
            size *= 4
            continue
        if status in _ABSENT:
            return None
        raise OSError(status, os.strerror(status), name)
