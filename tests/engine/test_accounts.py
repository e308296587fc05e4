"""Who has an account here, and what is said when that can't be told."""

from __future__ import annotations

import errno
import pwd
from typing import Any

import pytest

from gmta.services import accounts
from gmta.services.accounts import find_account


def answering(monkeypatch: pytest.MonkeyPatch, status: int, calls: list[int]) -> None:
    def look_up(name: bytes, entry: Any, room: Any, size: int, found: Any) -> int:
        calls.append(size)
        return status
    monkeypatch.setattr(accounts, "_getpwnam_r", look_up)


@pytest.mark.parametrize("name", ["root", "nobody", "daemon"])
def test_the_same_as_pwd(name: str) -> None:
    found, entry = find_account(name), pwd.getpwnam(name)
    assert found is not None
    assert found == (entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir) and entry.pw_gid in found.groups()


@pytest.mark.parametrize("name", ["", "no-such-account", "\0", "root\0x", "../root", "x" * 10_000, "j\u00f6", "\udcff", "\ud800", "root:x"])
def test_no_account(name: str) -> None:
    assert find_account(name) is None


@pytest.mark.parametrize("status", [0, errno.ENOENT, errno.ESRCH])
def test_what_stands_for_nobody(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    answering(monkeypatch, status, [])
    assert find_account("joe") is None


@pytest.mark.parametrize("status", [errno.EAGAIN, errno.EIO, errno.EMFILE, errno.EINTR, errno.ERANGE])
def test_a_directory_that_fails_is_no_answer(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    calls: list[int] = []
    answering(monkeypatch, status, calls)
    with pytest.raises(OSError) as raised:
        find_account("joe")
    assert raised.value.errno == status and (len(calls) == 1 or calls[-1] <= 1024 * 1024)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, errno.EAGAIN, [])


def test_mail_waits_where_a_directory_fails(failing: None) -> None:
    from gmta.agent import become
    from gmta.mail.verdict import Status

    outcome = become("joe")
    assert outcome is not None and outcome.status is Status.DEFERRED
