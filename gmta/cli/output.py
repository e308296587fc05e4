"""How commands print: tables by rich on a terminal, plain lines that grep and awk can read otherwise, JSON where asked.

What senders and remote servers said is shown here, so control characters are escaped: nothing in a queue can drive a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click


def on_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout.isatty()


def clean(text: str) -> str:
    """Text for a terminal or one line of a file: whatever can't be printed is escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def time_text(at: float, timespec: str = "seconds") -> str:
    """Unix seconds as local time, ISO 8601 with the offset; one out of all range as it is."""
    try:
        return datetime.fromtimestamp(at, UTC).astimezone().isoformat(timespec=timespec)
    except (OverflowError, ValueError, OSError):
        return str(at)


def size_text(octets: int) -> str:
    """Octets in the unit that suits them."""
    size = float(octets)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def age_text(seconds: float) -> str:
    """A span of time by its two largest units."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count}{unit}")
    return "".join(parts[:2])


def value_text(value: Any) -> str:
    """A value of a history event or a setting as one word or a quoted text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        text = json.dumps(value, ensure_ascii=False)
    elif isinstance(value, list | tuple):
        text = ", ".join(map(str, value))
    elif isinstance(value, set | frozenset):
        text = ", ".join(sorted(map(str, value)))
    else:
        text = "" if value is None else str(value)
    return clean(text)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, default=str))


def print_json_list(values: Iterable[Any]) -> None:
    """A JSON list of many values, written as they come, so that its length costs no memory."""
    separator = "["
    for value in values:
        click.echo(separator + json.dumps(value), nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """A table by rich; right: columns of numbers. For a terminal only."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # Text: brackets of an address literal are no markup
    Console().print(table)
