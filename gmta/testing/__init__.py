"""Kit for tests of plugins and of gmta itself: fake sessions, services and stores, dialogues and a server in memory to play them.

A plugin of ten lines is tested in ten: `run(plugin, dialogue)`. docs/testing.md shows how.
"""

from gmta.testing.dialogue import Dialogue, DialogueError, DialogueFailed, keywords_at, play_at
from gmta.testing.fakes import (
    FakeClock,
    MemoryLog,
    MemoryStore,
    load_module,
    load_plugin,
    make_config,
    make_envelope,
    make_file_message,
    make_message,
    make_services,
    make_session,
    make_transaction,
)
from gmta.testing.server import CHUNKINGS, MemoryServer, Played, compare, run

__all__ = ["CHUNKINGS", "Dialogue", "DialogueError", "DialogueFailed", "FakeClock", "MemoryLog", "MemoryServer", "MemoryStore", "Played",
           "compare", "keywords_at", "load_module", "load_plugin", "make_config", "make_envelope", "make_file_message", "make_message",
           "make_services", "make_session", "make_transaction", "play_at", "run"]
