"""Alias files in the classic syntax, and the form that names in them compare by.

Reads no file but those that `:include:` names. What an alias stands for in the end is its reader's business. A command (`|program`) or a file
(`/path`) as a target has an address of its own, `special_local`, by which a transport that reads the same file finds it again. Text that can't be read
raises ValueError with the place; a file of an `:include:` that can't be read raises OSError.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from gmta.mail.address import Address
from gmta.services.watched import Watched

MAX_INCLUDE_DEPTH = 5
MAX_INCLUDED = 10_000  # lists of a file, each as often as it is read
MAX_LIST = 4 * 1024 * 1024  # octets
COMMAND, FILE = "|", "/"  # what targets that are no addresses begin with

_TOKEN = re.compile(r'\s*((?:"(?:[^"\\]|\\.)*"|[^",\s])+)\s*(?:,|\Z)')


def name_key(name: str) -> str:
    """The form to compare a listed name by: `local@host` or `local`, lower case; raises ValueError."""
    name = name.strip()
    if "@" in name:
        return Address.parse(name).key
    return _local(name).lower()


def special_local(target: str) -> str:
    """The local part that a command or file has as a recipient: which kind it is, and a digest, since it may be long and is nobody's business."""
    return target[0] + hashlib.sha256(target.encode("utf-8", "surrogateescape")).hexdigest()[:24]


class Specials:
    """The commands or the files of an alias file, by `special_local`; read again within a second of a change.

    kind: COMMAND or FILE.  Raises OSError, ValueError where the file can't be read at first; later `trouble` says so, and what was stays.
    """

    def __init__(self, path: str, kind: str, clock: Callable[[], float]) -> None:
        self._path = Path(path)
        self._kind = kind
        self._found: dict[str, str] = {}
        self.trouble = ""
        self._file = Watched([path], self._read, clock)

    def get(self, local: str) -> str | None:
        """The target, with what it begins with; None where no alias has it."""
        try:
            self._file.refresh()
        except (OSError, ValueError) as error:
            self.trouble = str(error)
        return self._found.get(local)

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.values())

    def _read(self) -> None:
        aliases = parse_aliases(self._path.read_text(encoding="utf-8"), self._path.name, self._path.parent, special=COMMAND + FILE, lists=False)
        self._found = {special_local(target): target for targets in aliases.values() for target in targets if target.startswith(self._kind)}
        self.trouble = ""


def parse_aliases(text: str, source: str, directory: Path | None = None, *, special: str = "",
                  included: list[str] | None = None, lists: bool = True) -> dict[str, list[str]]:
    """Alias name -> targets, of a file in classic aliases syntax; raises ValueError with the line.

    A line that starts with a blank continues the one before; `#` starts a comment line; a name or target may be
    quoted; a name that stands twice has the targets of both. `:include:FILE` is a list of addresses in a file of
    `directory`; without one it is refused. special: which of COMMAND and FILE may be targets, there as they are written.
    included: gets the paths of the files that were read.  lists: whether they are read; else they are taken for empty.
    """
    included = [] if included is None else included
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
        targets = _targets(match[2], where, directory, 0, special, included if lists else None)
        if not targets and lists:
            raise ValueError(f"{where}: {match[1]!r} has no target")
        aliases.setdefault(key, []).extend(targets)
    return aliases


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def _targets(text: str, where: str, directory: Path | None, depth: int, special: str, included: list[str] | None) -> list[str]:
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
                if depth or whole[0] not in special or len(whole) == 1 or re.search(r"[\x00-\x1f\x7f]", whole):  # who writes a list is not who may run things
                    raise ValueError(f"{where}: {whole[:40]!r}: commands and files are alias targets only where the configuration allows them"
                                     " (command_transport, file_transport), and in no :include:")
                found.append(whole)
                continue
            if directory is None:
                raise ValueError(f"{where}: :include: is read only where the configuration allows it (allow_include)")
            if depth >= MAX_INCLUDE_DEPTH:
                raise ValueError(f"{where}: :include: nests too deep")
            if included is None:
                continue
            file = directory / whole[len(":include:"):].strip()
            included.append(str(file))
            if len(included) > MAX_INCLUDED:
                raise ValueError(f"{where}: includes too many lists")
            for number, line in enumerate(_read_list(file).splitlines(), 1):
                if line.strip() and not line.lstrip().startswith("#"):
                    found += _targets(line, f"{file.name}:{number}", directory, depth + 1, special, included)
            continue
        try:
            found.append(str(Address.parse(whole)) if "@" in whole else _local(whole))
        except ValueError as error:
            raise ValueError(f"{where}: {target[:40]!r} is not an address: {error}") from error
    return found


def _read_list(path: Path) -> str:
    """The text of an included list, where its owner may have put anything, such as a FIFO; raises OSError, ValueError."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        data = file.read(MAX_LIST + 1) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    if data is None or len(data) > MAX_LIST:
        raise ValueError(f"{path.name}: {'no plain file' if data is None else 'too large'}")
    return data.decode("utf-8")


def _local(name: str) -> str:
    """The name, where it can be a local part; raises AddressError, a ValueError."""
    Address.make(name, "localhost.test")
    return name
