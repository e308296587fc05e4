"""gmta/services/watched.py: files are read again when they change, and not more often."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gmta.services.watched import Watched
from gmta.testing import FakeClock


def test_files_are_read_when_they_change(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("2")
    clock, seen = FakeClock(), []
    files = Watched([str(one), str(two)], lambda: seen.append(one.read_text() + two.read_text()), clock)
    files.refresh()
    assert seen == ["12"]
    two.write_text("two")
    files.refresh()
    assert seen == ["12"]  # looked at less than a second ago
    clock.advance(1)
    files.refresh()
    clock.advance(1)
    files.refresh()
    assert seen == ["12", "1two"]


def test_what_fails_is_not_done_again_until_the_next_change(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("1")
    clock, seen = FakeClock(), []

    def load() -> None:
        seen.append(int(file.read_text()))

    files = Watched([str(file)], load, clock)
    file.write_text("one")
    clock.advance(1)
    with pytest.raises(ValueError):
        files.refresh()
    clock.advance(1)
    files.refresh()
    os.unlink(file)
    clock.advance(1)
    with pytest.raises(OSError):
        files.refresh()
    file.write_text("22")
    clock.advance(1)
    files.refresh()
    assert seen == [1, 22]
