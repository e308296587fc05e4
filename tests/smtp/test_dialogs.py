"""Every dialogue of tests/dialogs against a server in memory, under the four chunkings: the same answers, and the same in the queue."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gmta.testing import CHUNKINGS, Dialogue, MemoryServer, compare, make_config
from gmta.testing.fakes import START_AT

FOLDER = Path(__file__).parents[1] / "dialogs"
DIALOGUES = sorted(FOLDER.rglob("*.dialog"))


@pytest.fixture(scope="module")
def server() -> Iterator[MemoryServer]:
    server = MemoryServer((), make_config(FOLDER / "server.ini"))
    yield server
    server.close()


@pytest.mark.parametrize("path", DIALOGUES, ids=lambda path: str(path.relative_to(FOLDER))[:-7])
def test_dialogue(server: MemoryServer, path: Path) -> None:
    dialogue = Dialogue.load(path)
    plays = []
    for chunking in CHUNKINGS:
        server.clock.now = START_AT
        plays.append(server.play(dialogue, chunking))
        compare(dialogue, plays[0], plays[-1], chunking)


def test_there_is_nothing_else() -> None:
    """A file with another ending would never be played."""
    assert {path.suffix for path in FOLDER.rglob("*") if path.is_file()} == {".dialog", ".ini"}
    assert len(DIALOGUES) > 100
