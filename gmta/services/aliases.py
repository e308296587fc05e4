"""Alias files in the classic syntax, and the form that names in them compare by.

Reads no file but those that `:include:` names. What an alias stands for in the end is its reader's business. Text that can't be read
raises ValueError with the place; a file of an `:include:` that can't be read raises OSError.
"""

from __future__ import annotations

import re
from pathlib import Path

from gmta.mail.address import Address

MAX_INCLUDE_DEPTH = 5

_TOKEN = re.compile(r'\s*((?:"(?:[^"\\]|\\.)*"|[^",\s])+)\s*(?:,|\Z)')


def name_key(name: str) -> str:
    """The form to compare a listed name by: `local@host` or `local`, lower case; raises ValueError."""
    name = name.strip()
    if "@" in name:
        return Address.parse(name).key
    return _local(name).lower()


def parse_aliases(text: str, source: str, directory: Path | None = None) -> dict[str, list[str]]:
    """Alias name -> targets, of a file in classic aliases syntax; raises ValueError with the line.

    A line that starts with a blank continues the one before; `#` starts a comment line; a name or target may be
    quoted; a name that stands twice has the targets of both. `:include:FILE` is a list of targets in a file of
    `directory`; without one it is refused.
    """
    logical: list[tuple[int, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if line[0] in " \t":
            if not logical:
                raise ValueError(f"{source}:{number}: a continuation of nothing")
            logical[-1][1].append(line.strip())
        else:
            logical.append((number, [line.strip()]))
    aliases: dict[str, list[str]] = {}
    for number, lines in logical:
        where = f"{source}:{number}"
        match = re.match(r'\s*("(?:[^"\\]|\\.)*"(?:@[^\s:]+)?|[^\s:"]+)\s*:(.*)\Z', " ".join(lines))
        if match is None:
            raise ValueError(f"{where}: expected `name: target, target`")
        try:
            name = match[1]
            key = name_key(_unquote(name) if name.startswith('"') and name.endswith('"') else name)
        except ValueError as error:
            raise ValueError(f"{where}: {match[1]!r} is not an alias name: {error}") from error
        targets = _targets(match[2], where, directory, 0)
        if not targets:
            raise ValueError(f"{where}: {match[1]!r} has no target")
        aliases.setdefault(key, []).extend(targets)
    return aliases


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def _targets(text: str, where: str, directory: Path | None, depth: int) -> list[str]:
    found: list[str] = []
    text = text.strip()
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"{where}: can't read the targets at {text[position:].strip()[:40]!r}")
        position = match.end()
        target = match[1]
        whole = _unquote(target) if target.startswith('"') and target.endswith('"') and len(target) > 1 else target
        if whole.startswith((":include:", "|", "/")):
            if not whole.startswith(":include:"):
                raise ValueError(f"{where}: {whole[:40]!r}: commands and files are no alias targets here;"
                                 " give the address a route to a transport instead")
            if directory is None:
                raise ValueError(f"{where}: :include: is read only where the configuration allows it (allow_include)")
            if depth >= MAX_INCLUDE_DEPTH:
                raise ValueError(f"{where}: :include: nests too deep")
            file = directory / whole[len(":include:"):].strip()
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    found += _targets(line, f"{file.name}:{number}", directory, depth + 1)
            continue
        try:
            found.append(str(Address.parse(whole)) if "@" in whole else _local(whole))
        except ValueError as error:
            raise ValueError(f"{where}: {target[:40]!r} is not an address: {error}") from error
    return found


def _local(name: str) -> str:
    """The name, where it can be a local part; raises AddressError, a ValueError."""
    Address.make(name, "localhost.test")
    return name
