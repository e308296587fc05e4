"""Log lines: one fact a line whatever a client says."""

from __future__ import annotations

import json

from gmta.services.log import json_line, text_line


def test_text_is_quoted_and_escaped() -> None:
    line = text_line("T", "info", "queued", {"id": "A", "from": "a b\r\nT info forged", "size": 3, "none": None, "ok": True})
    assert line == b'T info queued id=A from="a b\\r\\nT info forged" size=3 ok=yes\n'
    assert text_line("T", "info", "x", {"u": "\u2028\ud800"}).count(b"\n") == 1


def test_json_keeps_its_own_names() -> None:
    assert json.loads(json_line("T", "info", "x", {"event": 1, "b": b"\xff"})) == {
        "at": "T", "level": "info", "event": "x", "event_": 1, "b": "\\xff"}
