"""What is kept until it is done: across deaths, cut lines, full disks and large files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gmta.services import outbox as module
from gmta.services.outbox import MARGIN_S, Outbox
from gmta.testing.fakes import make_services

Make = Callable[[], Outbox]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    made: list[Any] = []

    def one() -> Outbox:
        services = make_services()
        made.append(services)
        return Outbox(str(tmp_path / "events"), services.batch, services.clock)

    yield one
    for services in made:
        services.close()


def die(outbox: Outbox) -> None:
    """What the end of a process does: its locks are gone."""
    outbox._batch.submit(lambda: None)
    for file in (outbox._file, *(file for _, _, file in outbox._former)):
        fcntl.flock(file, fcntl.LOCK_UN)


def logs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "events").iterdir())


def test_what_is_not_done_is_taken_over_once(make: Make, tmp_path: Path) -> None:
    first, second, third = make(), make(), make()
    first.keep("a", b"{1}")
    first.keep("b", b"{2}", wait=True)
    first.done("a")
    assert not second.take_over()  # it lives
    die(first)
    found = second.take_over()
    assert {key: octets for key, (_, octets) in found.entries.items()} == {"b": b"{2}"} and found.known == {"a", "b"}
    assert found.since is not None and abs(found.since + MARGIN_S - logs(tmp_path)[0].stat().st_mtime) < 0.01
    assert not third.take_over()  # the second one has it
    second.release(found)
    assert not third.take_over() and third.known() == {"a", "b"}  # for who takes over from another that died at the same time
    (old,) = logs(tmp_path)
    third.beat(list)
    assert third.known() == {"a", "b"}
    third._clock.advance(old.stat().st_mtime + module.KEPT_S + 1 - third._clock())  # type: ignore[attr-defined]
    third.beat(list)
    assert third.known() == set()


def test_who_left_in_order_missed_nothing(make: Make) -> None:
    first, second = make(), make()
    first.keep("a", b"{1}")
    first.close()
    found = second.take_over()
    assert found.since is None and list(found.entries) == ["a"]


@pytest.mark.parametrize("end", [b"+b 1.000 900 {cut", b"+b 1.000 3 {2", b"-", b"+", b"\xff\x00", b"+b 1.000 3 {22}{", b"+c 9999999999999999999.000 1 x"])
def test_a_cut_line_is_no_entry(make: Make, tmp_path: Path, end: bytes) -> None:
    first, second = make(), make()
    first.keep("a", b"{1}", wait=True)
    with logs(tmp_path)[0].open("ab") as file:
        file.write(end)
    die(first)
    found = second.take_over()
    assert list(found.entries) == ["a"] and found.since is not None


def test_a_full_disk_cuts_one_line_and_not_the_next(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make(), make()
    first.keep("a", b"{1}", wait=True)

    def full(file: int, data: bytes) -> None:
        os.write(file, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_all", full)
        with pytest.raises(OSError, match="No space"):
            first.keep("b", b"{2}", wait=True)
        assert "No space" in first.trouble
    first.keep("c", b"{3}", wait=True)
    assert not first.trouble
    die(first)
    assert list(second.take_over().entries) == ["a", "c"]


def test_a_large_file_is_begun_anew_and_the_old_one_goes_later(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 100)
    first, second, third = make(), make(), make()
    first.keep("a", b"{1}")
    first.keep("b", b"x" * 100)
    first.done("b")
    first.beat(lambda: [("a", 1.0, b"{1}")])
    first.done("a")
    first._batch.submit(lambda: None)
    assert len(logs(tmp_path)) == 2 and second.known() == {"a", "b"}
    first._clock.advance(module.KEPT_S)  # type: ignore[attr-defined]
    first.beat(list)
    first._batch.submit(lambda: None)
    assert len(logs(tmp_path)) == 1
    die(first)
    assert not third.take_over().entries


def test_a_full_disk_leaves_the_large_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written anew is still there, however long the disk is full."""
    monkeypatch.setattr(module, "LARGE", 100)
    first, second = make(), make()
    first.keep("a", b"x" * 100, wait=True)

    def full(file: int, data: bytes) -> None:
        os.write(file, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module, "write_all", full)
        for _ in range(3):
            first.beat(lambda: [("a", 1.0, b"x" * 100)])
            first._batch.submit(lambda: None)
            assert "No space" in first.trouble
            first._clock.advance(module.KEPT_S)  # type: ignore[attr-defined]
    assert len(logs(tmp_path)) == 1
    first.keep("b", b"{2}", wait=True)
    first.beat(lambda: [("a", 1.0, b"x" * 100), ("b", 1.0, b"{2}")])
    first._batch.submit(lambda: None)
    assert not first.trouble and len(logs(tmp_path)) == 2
    die(first)
    assert list(second.take_over().entries) == ["a", "b"]


def test_a_file_that_another_has_dealt_with_since_it_was_opened(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = make(), make(), make()
    first.keep("a", b"{1}", wait=True)
    die(first)
    found = second.take_over()
    flock = fcntl.flock

    def slowly(file: int, how: int) -> None:
        if found:
            second._release(found)
        flock(file, how)

    monkeypatch.setattr(module.fcntl, "flock", slowly)
    assert not third.take_over().entries and not found


def test_nobody_is_led_elsewhere(make: Make, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    (tmp_path / "other").write_bytes(b"+a 1.000 1 x\n")
    (tmp_path / "events/1-0.log").symlink_to(tmp_path / "other")
    assert not make().take_over()


def test_where_there_is_no_directory(make: Make, tmp_path: Path) -> None:
    (tmp_path / "events").write_text("a file")
    one = make()
    with pytest.raises(OSError):
        one.keep("a", b"{1}", wait=True)
    with pytest.raises(OSError):
        one.take_over()
    assert one.trouble
