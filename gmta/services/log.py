"""The log: one fact a line, an event and its fields, as text or JSON, to standard error or a file.

Text: `2026-11-25T06:00:00.123Z info queued id=... from=<...>`; a value with blanks or quotes is quoted, control characters
and whatever a reader may take for a line end are escaped, so what a client says can never forge a line. A field of None is
left out. Failure: a line that can't be written (full disk, closed pipe) is dropped; logging never raises.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from typing import Any

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_BARE = re.compile(r"[!#-\[\]-~\u00a1-\u2027\u2030-\u205f\u2061-\ud7ff]+\Z")
_ESCAPED = re.compile("[\x00-\x1f\x7f-\xa0\u2028-\u202f\u2060-\u206f\ud800-\udfff\ufeff\"\\\\]")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


class Log:
    """A log of `level` and above. format: "text" or "json".  file: path, None for standard error."""

    def __init__(self, level: str = "info", format: str = "text", file: str | None = None, *,
                 clock: Callable[[], float] = time.time) -> None:
        self.level = level
        self.format = format
        self.file = file
        self._threshold = LEVELS[level]
        self._json = format == "json"
        self._clock = clock
        self._second = -1
        self._stamp = ""
        self._fd = 2
        self._open()

    @property
    def debugging(self) -> bool:
        """True where debug lines are written, for callers whose fields cost something."""
        return self._threshold <= 10

    def debug(self, event: str, /, **fields: Any) -> None:
        """For developers."""
        if self._threshold <= 10:
            self._write("debug", event, fields)

    def info(self, event: str, /, **fields: Any) -> None:
        """What a postmaster follows a message by."""
        if self._threshold <= 20:
            self._write("info", event, fields)

    def warning(self, event: str, /, **fields: Any) -> None:
        """Something is off; gmta goes on by itself."""
        if self._threshold <= 30:
            self._write("warning", event, fields)

    def error(self, event: str, /, **fields: Any) -> None:
        """Someone should look."""
        self._write("error", event, fields)

    def reopen(self) -> None:
        """Opens the file anew, after a rotation; keeps the old one if that fails."""
        old = self._fd
        self._open()
        if old != self._fd and old != 2:
            os.close(old)

    def close(self) -> None:
        """Closes the file; later lines go to standard error."""
        if self._fd != 2:
            os.close(self._fd)
            self._fd = 2

    def _open(self) -> None:
        if self.file is None:
            return
        try:
            self._fd = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            self.error("log file can't be opened", file=self.file, error=error.strerror)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            self._stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        stamp = f"{self._stamp}.{int((now - second) * 1000):03d}Z"
        line = json_line(stamp, level, event, fields) if self._json else text_line(stamp, level, event, fields)
        try:
            os.write(self._fd, line)
        except OSError:
            pass  # nowhere to say it


def text_line(stamp: str, level: str, event: str, fields: dict[str, Any]) -> bytes:
    """The text form of a line."""
    parts = [stamp, level, event if event.isprintable() else _ESCAPED.sub(_escape, event)]
    for name, value in fields.items():
        if value is None:
            continue
        if value.__class__ is int:
            parts.append(f"{name}={value}")
            continue
        text = value if value.__class__ is str else value_text(value)
        if text.isascii() and text.isprintable() and '"' not in text and "\\" not in text:  # most are: no search is needed
            if not text or " " in text:
                text = f'"{text}"'
        elif _BARE.match(text) is None:
            text = '"' + _ESCAPED.sub(_escape, text) + '"'
        parts.append(f"{name}={text}")
    return (" ".join(parts) + "\n").encode("utf-8", "backslashreplace")


def json_line(stamp: str, level: str, event: str, fields: dict[str, Any]) -> bytes:
    """The JSON form of a line, ASCII only; a field named as one of the line's own gets an underscore behind it."""
    out: dict[str, Any] = {"at": stamp, "level": level, "event": event}
    for name, value in fields.items():
        if value is not None:
            plain = isinstance(value, str | int | float | bool | list | tuple | dict)
            out[name + "_" if name in ("at", "level", "event") else name] = value if plain else value_text(value)
    return json.dumps(out, default=value_text, separators=(",", ":")).encode("ascii") + b"\n"


def value_text(value: Any) -> str:
    """A field's value as text: floats to the millisecond, lists comma-separated, bytes with escapes."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(round(value, 3))
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, list | tuple | set | frozenset):
        return ",".join(map(value_text, value))
    return str(value)


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    return _NAMED.get(char) or (f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{ord(char):04x}")


class NullLog(Log):
    """A Log that writes nothing, for tools and tests."""

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        return
