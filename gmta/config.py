"""The configuration: one ini file with its includes, read, checked as a whole and handed on as values.

`load` reads the file and returns a Config or raises ConfigError with every error at once, each as
`file:line: [section] key: what was expected`. Sections of plugins and transports stay text here (Section, a dict that
knows where each key stands); whoever owns them turns them into values with `validate`, so that their errors are as
exact. `Config.snapshot` and `Config.from_snapshot` carry what one process has checked to another without reading the
files again; a snapshot holds secrets, so it belongs in a pipe, not on disk. Imports no gevent.
"""

from __future__ import annotations

import base64
import difflib
import glob
import importlib.util
import ipaddress
import json
import os
import pwd
import re
import socket
import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo

from gmta.mail.address import AddressError, check_domain, domain_key, parse_mailbox
from gmta.mail.reply import Reply

FILES = ("config.ini", "/etc/gmta/config.ini")  # where `load` looks without a path, after $GMTA_CONFIG
TRANSPORT_KEYS = ("type", "concurrency", "rate")  # what the core reads in [transport:NAME]
TARGETS = ("fail", "hold", "discard")  # route targets that are no transport
ACME = ":acme"  # in place of a listener's name, which has no colon: the sockets of [acme] address

_ENV = re.compile(r"\$(\$)?\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT]?)(?:I?B)?)", re.I)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?\s*(?:ms|[smhdw])\s*)+|\d+(?:\.\d+)?", re.I)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|[smhdw])?", re.I)
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*/\s*(\d*)\s*([smhd])\w*\s*\Z")
_UNITS_S = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PASSWORD = re.compile(r"(://[^/@:]*:)[^/@]*(?=@)")  # of a URL
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_NAME_PATTERN = re.compile(r"[A-Za-z0-9_.*-]+")
_ON_REPLY = re.compile(r"([45][0-9x]{2})(?:\s+([45]\.[0-9x]+\.[0-9x]+))?(?:\s+(.*?))?\s*->\s*pause\s+(\S+)")


EX_CONFIG = 78  # sysexits: the configuration is wrong, trying again does not help


class ConfigError(Exception):
    """The configuration can't be used; `errors` has one line for each thing that is wrong."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


# --- types for keys, for plugins too ----------------------------------------------------------------------------


def _size(value: Any) -> Any:
    """Octets from 500, 64KB, 35MB or 1GB (K is 1,024)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise ValueError("a size such as 64KB, 35MB or 1GB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def _duration(value: Any) -> Any:
    """Seconds from 30, 30s, 5m, 4h, 5d or 1h30m."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    text = str(value).strip()
    if _DURATION.fullmatch(text) is None:
        raise ValueError("a time such as 30s, 5m, 4h or 5d")
    return sum(float(number) * _UNITS_S[(unit or "").lower()] for number, unit in _DURATION_PART.findall(text))


def _path(value: str, info: ValidationInfo) -> str:
    """The path, from the folder of the configuration file where it is relative."""
    base = (info.context or {}).get("base", "")
    return os.path.join(base, os.path.expanduser(value)) if value else value


def _file(value: str, info: ValidationInfo) -> str:
    """A path that must be a readable file, unless another process has checked that already."""
    path = _path(value, info)
    if path and (info.context or {}).get("look", True) and not os.access(path, os.R_OK):
        raise ValueError("a file that exists and can be read")
    return path


def _network(value: Any) -> Any:
    """An IP network."""
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        raise ValueError("a network such as 192.0.2.0/24 or 2001:db8::/32") from error


def _domain(value: str) -> str:
    """A domain in the form that domains compare by."""
    try:
        check_domain(value)
    except AddressError as error:
        raise ValueError(f"a domain ({error})") from error
    return domain_key(value)


def _https(value: str) -> str:
    """A URL that certificates protect."""
    if re.fullmatch(r"https://[!-~]+", value) is None:
        raise ValueError("a URL that begins with https://")  # RFC 8555 section 6.1
    return value


def _base64url(value: str) -> str:
    """Octets as base64url without padding, as authorities hand their keys out (RFC 8555 section 7.3.4)."""
    value = value.rstrip("=")
    try:
        if re.fullmatch(r"[A-Za-z0-9_-]*", value) is None:
            raise ValueError(value)
        base64.urlsafe_b64decode(value + "=" * (-len(value) % 4))
    except ValueError:
        raise ValueError("a key in base64url, as the authority gave it") from None
    return value


def _mailbox(value: str) -> str:
    """An address, or nothing."""
    try:
        if value:
            parse_mailbox(value)
    except AddressError as error:
        raise ValueError(f"an address ({error})") from error
    return value


def _host_port(value: Any) -> Any:
    """(host, port) from 127.0.0.1:25, [::1]:25 or *:25 (every IPv4 address)."""
    if not isinstance(value, str):
        return value
    host, colon, port = value.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an address such as 127.0.0.1:2525 or [::1]:2525")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("an address such as 127.0.0.1:2525 or [::1]:2525")
    return ("0.0.0.0" if host == "*" else host, int(port))


def host_port_text(host: str, port: int) -> str:
    """A host and its port as the file has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def name_server(text: str) -> tuple[str, int]:
    """(address, port) of a name server from 127.0.0.1, 127.0.0.1:5353, ::1 or [::1]:5353; port 53 where none is given.

    Raises ValueError that says what is expected.
    """
    host, port = text.strip(), "53"
    if host.startswith("["):
        host, closed, rest = host[1:].partition("]")
        port = rest[1:] if rest.startswith(":") else port if closed and not rest else ""
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    try:
        ipaddress.ip_address(host)
        if not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(port)
    except ValueError:
        raise ValueError("an IP address such as 127.0.0.1, 127.0.0.1:5353 or [::1]:5353") from None
    return (host, int(port))


def _name_server(text: str) -> str:
    """A name server's address, as written."""
    name_server(text)
    return text


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Duration = Annotated[float, BeforeValidator(_duration), Field(ge=0)]
Path = Annotated[str, AfterValidator(_path)]
ExistingFile = Annotated[str, AfterValidator(_file)]
Network = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, BeforeValidator(_network)]
Domain = Annotated[str, AfterValidator(_domain)]
HostPort = Annotated[tuple[str, int], BeforeValidator(_host_port)]
NameServer = Annotated[str, AfterValidator(_name_server)]


# --- the text ---------------------------------------------------------------------------------------------------


class Section(dict[str, str]):
    """One section's keys as text; `where` tells file and line of a key, `file` and `line` those of the section.

    secrets: contents of the files that `key_file` keys name, by path, as they were when they were first read.
    """

    def __init__(self, name: str, file: str = "", line: int = 0, values: dict[str, str] | None = None) -> None:
        super().__init__(values or {})
        self.name = name
        self.file = file
        self.line = line
        self.places: dict[str, tuple[str, int]] = {}
        self.secrets: dict[str, str] = {}

    def where(self, key: str = "") -> str:
        """`file:line: [section] key` of a key, or of the section where the key is not in it."""
        file, line = self.places.get(key, (self.file, self.line))
        place = f"{file}:{line}: " if file else ""
        return f"{place}[{self.name}]{' ' + key if key else ''}"


class _Text:
    """Reads the file and its includes into sections, collecting errors."""

    def __init__(self) -> None:
        self.sections: dict[str, Section] = {}
        self.errors: list[str] = []
        self._seen: set[str] = set()

    def read(self, path: str) -> None:
        """Reads one file; keys of a file read later take the place of those read before."""
        real = os.path.realpath(path)
        if real in self._seen:
            return
        self._seen.add(real)
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            self.errors.append(f"{path}: can't be read: {reason}")
            return
        section: Section | None = None
        key = ""
        here: dict[str, Section] = {}
        own: set[tuple[str, str]] = set()
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if not text or text[0] in ";#":
                continue
            if section is not None and key and line[0] in " \t":
                section[key] = f"{section[key]}\n{text}".lstrip("\n")
                continue
            if text[0] == "[":
                key = ""
                name = ":".join(part.strip() for part in text[1:-1].split(":", 1))
                if text[-1] != "]" or not name:
                    self.errors.append(f"{path}:{number}: expected [section], not {text!r}")
                    continue
                if name in here:
                    self.errors.append(f"{path}:{number}: [{name}] stands already in line {here[name].line}")
                section = here[name] = self.sections.setdefault(name, Section(name, path, number))
                continue
            name, equals, value = (part.strip() for part in text.partition("="))
            key = ""
            if not equals or not name:
                self.errors.append(f"{path}:{number}: expected key = value, not {text!r}")
            elif section is None:
                self.errors.append(f"{path}:{number}: {name}: expected a [section] before the first key")
            elif (section.name, name) in own:
                self.errors.append(f"{section.where(name)}: given again in line {number}")
            else:
                key = name
                own.add((section.name, name))
                section[name] = value
                section.places[name] = (path, number)
        self._include(path, here)

    def _include(self, path: str, here: dict[str, Section]) -> None:
        """Reads what this file's `include` names."""
        gmta = here.get("gmta")
        if gmta is None or gmta.places.get("include", ("",))[0] != path:
            return
        for pattern in _words(self._environment(gmta, "include", gmta["include"])):
            found = sorted(glob.glob(os.path.join(os.path.dirname(path), pattern)))
            if not found and not glob.has_magic(pattern):
                self.errors.append(f"{gmta.where('include')}: expected a file that exists, not {pattern!r}")
            for name in found:
                self.read(name)

    def _environment(self, section: Section, key: str, value: str) -> str:
        """Puts in what ${NAME} stands for; $${NAME} is the text ${NAME}."""

        def replace(match: re.Match[str]) -> str:
            if match[1]:
                return match[0][1:]
            found = os.environ.get(match[2])
            if found is None:
                self.errors.append(f"{section.where(key)}: expected the environment variable {match[2]} to be set")
            return found or ""

        return _ENV.sub(replace, value) if "${" in value else value

    def fill(self) -> None:
        """Takes what comes from the environment."""
        for section in self.sections.values():
            for key, value in section.items():
                section[key] = self._environment(section, key, value)


def _words(text: str) -> list[str]:
    """Splits at commas and blanks."""
    return text.replace(",", " ").split()


# --- from text to values ----------------------------------------------------------------------------------------


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` where a known name is near, else empty."""
    found = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f" (did you mean {found[0]}?)" if found else ""


Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], section: Section, *, base: str = "", look: bool = True, ignore: Iterable[str] = ()) -> Model:
    """A `model` from a section's text; raises ConfigError with all that is wrong in it.

    A key whose type is a list or set is split at commas and blanks. `key_file = path` gives the key from a file
    (without its last line end) unless the model has a key of that name itself. ignore: keys that others read.
    look=False: files named by keys are not looked for again.
    """
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    skip = set(ignore) - set(fields)
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    errors: list[str] = []
    for given, text in section.items():
        if given in skip:
            continue
        key = given
        if given not in fields and given.endswith("_file") and given[:-5] in fields:
            key = given[:-5]
            try:
                text = _secret(section, os.path.join(base, text))
            except (OSError, UnicodeDecodeError) as error:
                errors.append(f"{section.where(given)}: expected a file that can be read, not {text!r} ({error})")
                spelled[key] = given
                continue
        if key in spelled:
            errors.append(f"{section.where(given)}: expected only one of {spelled[key]} and {given}")
            continue
        spelled[key] = given
        values[key] = _words(text) if key in fields and _is_list(fields[key].annotation) else text
    try:
        made = model.model_validate(values, context={"base": base, "look": look})
    except ValidationError as failure:
        for detail in failure.errors():
            key = str(detail["loc"][0]) if detail["loc"] else ""
            errors.append(_explain(section, spelled.get(key, key), detail, list(fields)))
        raise ConfigError(list(dict.fromkeys(errors))) from None
    if errors:
        raise ConfigError(errors)
    return made


def _secret(section: Section, path: str) -> str:
    """The content of a file that a `key_file` names, read once."""
    text = section.secrets.get(path)
    if text is None:
        with open(path, encoding="utf-8") as file:
            text = section.secrets[path] = file.read().removesuffix("\n").removesuffix("\r")
    return text


def _is_list(annotation: Any) -> bool:
    """True for list[…], set[…], frozenset[…], tuple[X, …] and these or None."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return any(_is_list(part) for part in get_args(annotation))
    if origin is Annotated:
        return _is_list(get_args(annotation)[0])
    if annotation in (list, set, frozenset):
        return True
    return origin in (list, set, frozenset) or (origin is tuple and Ellipsis in get_args(annotation))


def _explain(section: Section, key: str, error: Any, known: list[str]) -> str:
    """One pydantic error as a line for the postmaster."""
    kind = error["type"]
    where = section.where(key)
    if kind == "extra_forbidden":
        return f"{where}: unknown key{nearest(key, known)}"
    if kind == "missing":
        return f"{section.where()} {key}: expected to be given"
    shown = "what is in it" if key.endswith("_file") and key != error["loc"][0] else _PASSWORD.sub(r"\1…", repr(error["input"]))
    if kind in ("value_error", "assertion_error"):
        expected = str(error["ctx"]["error"])
    elif kind.startswith("int"):
        expected = "a whole number"
    elif kind.startswith("float"):
        expected = "a number"
    elif kind.startswith("bool"):
        expected = "yes or no"
    elif kind == "literal_error":
        expected = f"one of {error['ctx']['expected']}"
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{where}: expected {expected}, not {shown}{nearest(str(error['input']), choices)}"
    else:
        expected = error["msg"].removeprefix("Input should be ")
    return f"{where}: expected {expected}, not {shown}"


# --- the core's sections ----------------------------------------------------------------------------------------


class CoreSection(BaseModel):
    """What all core sections have in common: unknown keys are errors, defaults are checked like values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, str_strip_whitespace=True)


def _cores(value: Any) -> Any:
    """The number of processors for `auto`."""
    return len(os.sched_getaffinity(0)) if value == "auto" else value


def _zero(value: Any) -> Any:
    """0 for `auto`: the worker finds the number itself."""
    return 0 if value == "auto" else value


def rate_gap(rate: str | None) -> float:
    """Seconds between deliveries for a rate such as 10/s, 600/m, 20/min or 20/5m; 0 for none. Raises ValueError."""
    if not rate:
        return 0.0
    match = _RATE.match(rate)
    if match is None or not float(match[1]) or match[2] == "0":
        raise ValueError("a rate such as 10/s, 600/m or 1000/h")
    return int(match[2] or 1) * _UNITS_S[match[3]] / float(match[1])


def _rate(value: str | None) -> str | None:
    rate_gap(value)
    return value


def _user(value: str | None, info: ValidationInfo) -> str | None:
    """An account of this machine."""
    if value and (info.context or {}).get("look", True):
        try:
            pwd.getpwnam(value)
        except KeyError as error:
            raise ValueError("an account of this machine") from error
    return value or None


class Gmta(CoreSection):
    """[gmta]"""

    hostname: Domain = Field("", description="name in banner, EHLO and Received; default: this machine's")
    data_dir: Path = Field("var", description="queue, spool and state")
    workers: Annotated[int, BeforeValidator(_cores), Field(ge=1, le=1024)] = Field("auto", description="processes")  # type: ignore[assignment]
    user: Annotated[str | None, AfterValidator(_user)] = Field(None, description="account that workers run as")
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_file: Path = Field("", description="default: standard error")
    include: list[str] = Field([], description="files read as well, such as conf.d/*.ini")


def _banner_delay(value: Any) -> Any:
    """0 for off, else seconds."""
    seconds = 0.0 if value in ("off", "no", "0") else _duration(value)
    if seconds and not 1 <= seconds <= 6:
        raise ValueError("off, or a time from 1s to 6s")
    return seconds


class Listener(CoreSection):
    """[listener:NAME]"""

    addresses: list[HostPort] = Field(alias="address", min_length=1)
    role: Literal["mx", "submission"] = "mx"
    tls: Literal["starttls", "required", "implicit", "off"] = Field("starttls", description="required: STARTTLS before MAIL")
    auth_required: bool | None = Field(None, description="default: yes for submission")
    bare_newline: Literal["reject", "normalize"] = Field("reject", description="what a bare LF does: it ends the session, or a line")
    proxy_protocol: bool = Field(False, description="every connection begins with a PROXY header (v1 or v2)")
    proxy_from: list[Network] = Field(["127.0.0.0/8", "::1/128"], description="whose PROXY headers are believed; others are turned away")  # type: ignore[list-item]
    xclient_from: list[Network] = Field([], description="networks that may say XCLIENT and XFORWARD")
    banner_delay: Annotated[float, BeforeValidator(_banner_delay)] = Field("off", description="off, or 1s to 6s: who talks before the banner is turned away")  # type: ignore[assignment]
    client_ca: ExistingFile = Field("", description="PEM: clients are asked for a certificate of these authorities")
    client_names: list[str] = Field([], description="names of such certificates whose clients may relay; *: any")
    reverse_lookup: bool = Field(False, description="find the client's name before the banner")
    allow_plain_on_loopback: bool = Field(False, description="take passwords without TLS from this machine")
    vrfy: Literal["no", "trusted", "yes"] = Field("no", description="who is told whether an address is taken")
    expn: Literal["no", "trusted", "yes"] = Field("no", description="who is told what an alias stands for")


class Tls(CoreSection):
    """[tls] and [tls:NAME]; without a certificate nothing offers TLS."""

    certificate: ExistingFile = Field("", description="PEM, with its chain")
    key: ExistingFile = Field("", description="PEM; default: in the certificate's file")
    minimum_version: Literal["1.2", "1.3"] = "1.2"


class Acme(CoreSection):
    """[acme]: certificates obtained and renewed by ACME (RFC 8555) for [tls] and each [tls:NAME] that name none."""

    terms_agreed: bool = Field(False, description="yes: you agree to the authority's terms of service, and certificates are asked for")
    directory: Annotated[str, AfterValidator(_https)] = Field("https://acme-v02.api.letsencrypt.org/directory", description="the authority's URL")
    contact: Annotated[str, AfterValidator(_mailbox)] = Field("", description="address that the authority may write to")
    names: list[Domain] = Field([], description="in the certificate of [tls]; default: [gmta] hostname")
    challenge: Literal["http-01", "tls-alpn-01"] = Field("http-01", description="how the authority sees that the names are ours")
    addresses: list[HostPort] = Field([], alias="address", description="where it looks; default: *:80 for http-01, *:443 for tls-alpn-01")
    keep_key: bool = Field(False, description="renewals keep the certificate's key, for TLSA records of it")
    eab_key_id: str = Field("", description="external account binding: the key's name")
    eab_secret: Annotated[str, AfterValidator(_base64url)] = Field("", description="external account binding: the key")
    ca_file: ExistingFile = Field("", description="PEM: authorities of the directory's own certificate; default: well-known ones")


class Domains(CoreSection):
    """[domains]"""

    local: frozenset[Domain] = Field(frozenset(), description="delivered here")
    relay_to: frozenset[Domain] = Field(frozenset(), description="accepted from anybody and passed on (backup MX)")
    relay_from: list[Network] = Field([], description="networks whose clients may send anywhere")
    etrn_from: list[Network] = Field([], description="networks whose clients may ask for the mail of relay_to (ETRN)")


class Limits(CoreSection):
    """[limits]: DESIGN's table; octets and seconds."""

    message_size: Size = Field("35MB", ge=1024)  # type: ignore[assignment]
    header_size: Size = "1MB"  # type: ignore[assignment]
    header_fields: int = Field(2000, ge=1)
    text_line: Size = "64KB"  # type: ignore[assignment]
    command_line: Size = Field(2048, ge=512)  # RFC 5321 section 4.5.3.1.4
    recipients: int = Field(1000, ge=100)  # RFC 5321 section 4.5.3.1.8
    recipients_refused: int = Field(2000, ge=0, description="refused ones before the connection is closed")
    hops: int = Field(50, ge=1)
    connections: Annotated[int, BeforeValidator(_zero), Field(ge=0)] = Field("auto", description="a worker")  # type: ignore[assignment]
    connections_per_ip: int = Field(50, ge=0)
    connections_per_subnet: int = Field(200, ge=0, description="a /24 or /48")
    command_timeout: Duration = "300s"  # type: ignore[assignment]
    command_timeout_pressure: Duration = "30s"  # type: ignore[assignment]
    data_timeout: Duration = "600s"  # type: ignore[assignment]
    data_rate: Size = Field(500, description="octets a second, after data_rate_after")
    data_rate_after: Duration = "60s"  # type: ignore[assignment]
    tls_timeout: Duration = "30s"  # type: ignore[assignment]
    errors_per_session: int = Field(20, ge=1)
    error_delay: Duration = "1s"  # type: ignore[assignment]
    error_delay_from: int = Field(10, ge=0)
    auth_failures: int = Field(3, ge=1)
    mime_depth: int = Field(100, ge=1)
    mime_parts: int = Field(1000, ge=1)
    dkim_signatures: int = Field(10, ge=0)


class ReplyRule:
    """One line of [lane:NAME] on_reply: what a reply must begin with ("421 4.7.0 text", x for any digit), and the pause in seconds."""

    __slots__ = ("_codes", "_text", "pause_s")

    def __init__(self, codes: str, text: str, pause_s: float) -> None:
        self._codes = re.compile(codes)
        self._text = text
        self.pause_s = pause_s

    def matches(self, reply: Reply) -> bool:
        """Whether it speaks of that reply."""
        return self._codes.match(f"{reply.code} {reply.enhanced or ''} ") is not None and self._text in reply.text.lower()


def reply_rules(text: str) -> tuple[ReplyRule, ...]:
    """The rules of `on_reply`, one a line: CODE [ENHANCED] [TEXT] -> pause TIME. Raises ValueError."""
    rules = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        match = _ON_REPLY.fullmatch(line)
        if match is None:
            raise ValueError("lines such as 421 4.7.0 -> pause 10m")
        code, enhanced, words, pause = match.groups(default="")
        codes = code.replace("x", r"\d") + " " + (re.escape(enhanced).replace("x", r"\d+") + " " if enhanced else "")
        rules.append(ReplyRule(codes, words.lower(), _duration(pause)))
    return tuple(rules)


def _on_reply(text: str) -> str:
    reply_rules(text)
    return text


def _name_pattern(text: str) -> str:
    """A host or domain name in which * stands for anything."""
    if _NAME_PATTERN.fullmatch(text) is None:
        raise ValueError("names such as example.org or *.example.org")
    return text


class LaneSection(CoreSection):
    """[lane:NAME]: what all mail to some domains, or to the mail hosts of an operator, has to share."""

    match: list[Annotated[str, AfterValidator(_name_pattern)]] = Field([], description="recipients' domains")
    match_mx: list[Annotated[str, AfterValidator(_name_pattern)]] = Field([], description="MX hosts of recipients' domains")
    rate: Annotated[str | None, AfterValidator(_rate)] = Field(None, description="deliveries, such as 20/min")
    connections: int = Field(0, ge=0, description="deliveries at a time; 0: no bound of its own")
    on_reply: Annotated[str, AfterValidator(_on_reply)] = Field("", description="CODE [ENHANCED] [TEXT] -> pause TIME, one a line")


class QueueDomain(CoreSection):
    """[queue:DOMAIN]: keys of [queue] that differ for recipients there."""

    retry: list[Duration] | None = Field(None, min_length=1)
    lifetime: Duration | None = None
    warn_after: Duration | None = None


def _store(value: str) -> str:
    """The kind of queue."""
    if value != "sqlite" and not value.startswith(("postgresql://", "postgres://")):
        raise ValueError("sqlite or postgresql://…")
    if value != "sqlite" and importlib.util.find_spec("psycopg") is None:
        raise ValueError("sqlite, or the package psycopg beside gmta (pip install 'gmta[postgresql]')")
    return value


class Queue(CoreSection):
    """[queue]"""

    store: Annotated[str, AfterValidator(_store)] = Field("sqlite", description="sqlite, or postgresql://USER:PASSWORD@HOST:PORT/DATABASE for several machines")
    node: str = Field("", max_length=63, description="this machine's name among those of one PostgreSQL; default: the host's")
    lease: Duration = Field("60s", ge=2, description="after so long without a sign of life a node's mail is another's")  # type: ignore[assignment]
    retry: list[Duration] = Field(["5m", "15m", "30m", "1h", "2h", "4h"], min_length=1)  # type: ignore[list-item]
    lifetime: Duration = "5d"  # type: ignore[assignment]
    bounce_lifetime: Duration = "1d"  # type: ignore[assignment]
    warn_after: Duration = Field("4h", description="0: no delay notices")  # type: ignore[assignment]
    history: Duration = Field("7d", description="how long settled messages can be traced")  # type: ignore[assignment]
    window: int = Field(1000, ge=1, description="messages that wait in memory, a worker")
    deliveries: int = Field(1000, ge=1, description="deliveries at a time, a worker")
    return_message: Literal["trusted", "always", "never"] = Field("trusted", description="whose message goes back whole in a report of failure")
    double_bounce: Annotated[str, AfterValidator(_mailbox)] = Field("", description="who is told when a report can't be delivered")


class Plugins(CoreSection):
    """[plugins]"""

    path: list[Path] = Field([], description="folders with plugins of your own")
    enable: list[str] = Field([], description="in the order they are asked")


class Dns(CoreSection):
    """[dns]"""

    servers: list[NameServer] = Field([], description="ADDRESS or ADDRESS:PORT; default: the system's")
    timeout: Duration = Field("5s", gt=0, description="for one whole look-up")  # type: ignore[assignment]
    cache_size: int = Field(10000, ge=0, description="answers a worker")
    validating: bool | None = Field(None, description="believe the servers' AD bit; default: only of servers on loopback")
    probe_signed: str = Field(".", description="a signed name that a validating server vouches for; empty: not tried")
    probe_bogus: str = Field("dnssec-failed.org", description="a name with wrong signatures that it gives no answer for; empty: not tried")


class TlsReports(CoreSection):
    """[tlsrpt]: daily reports about TLS with others (RFC 8460)"""

    send: bool = Field(False, description="send reports to domains that ask for them")
    sender: Annotated[str, AfterValidator(_mailbox)] = Field("", description="From of the reports; default: postmaster at [gmta] hostname")
    organization: str = Field("", description="who reports; default: [gmta] hostname")
    allow_private: bool = Field(False, description="post reports to https addresses that are not the internet's")


class MetricsSection(CoreSection):
    """[metrics]"""

    address: HostPort | None = Field(None, description="where metrics can be fetched; default: off")


class TlsDemand(NamedTuple):
    """A line of [tls_policy]. names: what the certificate may be for instead of host and domain; default: the line of `*`."""

    level: Literal["none", "may", "encrypt", "verify"]
    names: tuple[str, ...] = ()
    default: bool = False


class TransportSection(BaseModel):
    """What the core reads in [transport:NAME]; the other keys are the transport's."""

    model_config = ConfigDict(extra="ignore")

    type: str = Field(min_length=1)
    concurrency: int | None = Field(None, ge=1, description="deliveries at a time to one next hop")
    rate: Annotated[str | None, AfterValidator(_rate)] = Field(None, description="such as 10/s, 600/m or 1000/h")


_CORE: dict[str, type[CoreSection]] = {
    "gmta": Gmta, "tls": Tls, "acme": Acme, "domains": Domains, "limits": Limits, "queue": Queue, "plugins": Plugins, "dns": Dns,
    "tlsrpt": TlsReports, "metrics": MetricsSection,
}
_TABLES = ("route", "tls_policy", "senders")  # sections whose keys are domains and the like
TLS_LEVELS = ("none", "may", "encrypt", "verify")
_NAMED = ("listener", "plugin", "transport", "tls", "lane", "queue")


class Config:
    """The whole configuration, checked.

    file, base: the file and its folder.  gmta, tls, acme, domains, limits, queue, plugins, dns, tlsrpt, metrics: the sections.
    listeners: name -> Listener.  tls_names: server name -> Tls.  obtained: certificate file -> names that [acme] gets it for.  lanes: name -> LaneSection, in the order of the file.
    queue_domains: domain or .domain -> QueueDomain.  plugin, transports: name -> Section (text).
    route: address, domain, .subdomain, local or *, or from: and a sender's address or domain -> transport, fail, hold or discard.
    tls_policy: domain, .subdomain or * -> what TLS with it must be.
    """

    __slots__ = ("acme", "base", "dns", "domains", "file", "gmta", "lanes", "limits", "listeners", "look", "metrics", "obtained", "plugin",
                 "plugins", "queue", "queue_domains", "route", "sections", "tls", "tls_names", "tls_policy", "tlsrpt", "transports")

    gmta: Gmta
    tls: Tls
    acme: Acme
    domains: Domains
    limits: Limits
    queue: Queue
    plugins: Plugins
    dns: Dns
    tlsrpt: TlsReports
    metrics: MetricsSection

    def __init__(self, sections: dict[str, Section], file: str = "", *, look: bool = True) -> None:
        self.file = file
        self.base = os.path.dirname(os.path.abspath(file)) if file else os.getcwd()
        self.look = look
        self.sections = sections
        self.listeners: dict[str, Listener] = {}
        self.tls_names: dict[str, Tls] = {}
        self.obtained: dict[str, tuple[str, ...]] = {}
        self.lanes: dict[str, LaneSection] = {}
        self.queue_domains: dict[str, QueueDomain] = {}
        self.plugin: dict[str, Section] = {}
        self.transports: dict[str, Section] = {}
        self.route: dict[str, str] = {}
        self.tls_policy: dict[str, TlsDemand] = {}
        errors: list[str] = []
        self._defaults()
        for name, model in _CORE.items():
            section = sections.get(name) or Section(name, file)
            try:
                setattr(self, name, self.validate(model, section))
            except ConfigError as error:
                errors += error.errors
        for name, section in sections.items():
            if name not in _CORE and name not in _TABLES:
                errors += self._named(section)
        if all(hasattr(self, name) for name in ("gmta", "tls", "acme")):
            errors += self._certificates(sections)
        errors += self._routes(sections.get("route"))
        errors += self._listeners(sections)
        self.tls_policy, wrong = _tls_policy(sections.get("tls_policy"))
        errors += wrong
        if errors:
            raise ConfigError(errors)

    def validate(self, model: type[Model], section: Section, *, ignore: Iterable[str] = ()) -> Model:
        """A section's text as `model`, with paths from this configuration's folder; raises ConfigError."""
        return validate(model, section, base=self.base, look=self.look, ignore=ignore)

    def _defaults(self) -> None:
        """What stands for sections that are not there."""
        sections = self.sections
        gmta = sections.setdefault("gmta", Section("gmta", self.file))
        if not gmta.get("hostname"):
            gmta["hostname"] = socket.getfqdn()
        gmta.setdefault("workers", "auto")
        if gmta["workers"] == "auto":  # a snapshot says the same in every process
            gmta["workers"] = str(_cores("auto"))
        if not any(name.startswith("listener:") for name in sections):
            sections["listener:mx"] = Section("listener:mx", self.file, values={"address": "127.0.0.1:2525"})
        if not any(name.startswith("transport:") for name in sections):
            sections["transport:mailbox"] = Section("transport:mailbox", self.file, values={
                "type": "maildir", "path": os.path.join(gmta.get("data_dir") or "var", "mail/{domain}/{local}")})
            sections["transport:outbound"] = Section("transport:outbound", self.file, values={"type": "relay"})

    def _named(self, section: Section) -> list[str]:
        """Files a section of the form [kind:NAME]; returns errors."""
        kind, colon, name = section.name.partition(":")
        if kind not in _NAMED or not colon:
            known = [*_CORE, *_TABLES, *(f"{word}:{name or 'NAME'}" for word in _NAMED)]
            return [f"{section.where()}: unknown section{nearest(section.name, known)}"]
        if _NAME.fullmatch(name) is None:
            return [f"{section.where()}: expected a name of letters, digits, dots, - and _ behind the colon"]
        try:
            if kind == "listener":
                listener = self.validate(Listener, section)
                if listener.auth_required is None:
                    listener = listener.model_copy(update={"auth_required": listener.role == "submission"})
                self.listeners[name] = listener
            elif kind == "tls":
                self.tls_names[domain_key(name)] = tls = self.validate(Tls, section)
                if "minimum_version" in section and hasattr(self, "tls") and tls.minimum_version != self.tls.minimum_version:
                    return [f"{section.where('minimum_version')}: expected that of [tls], {self.tls.minimum_version}: it is agreed on before a name is"]
            elif kind == "plugin":
                self.plugin[name] = section
            elif kind == "lane":
                self.lanes[name] = self.validate(LaneSection, section)
                if not self.lanes[name].match and not self.lanes[name].match_mx:
                    return [f"{section.where()}: expected match or match_mx, to say what it is about"]
            elif kind == "queue":
                check_domain(name.removeprefix("."))
                self.queue_domains["." * name.startswith(".") + domain_key(name.removeprefix("."))] = self.validate(QueueDomain, section)
            else:
                if name in TARGETS:
                    return [f"{section.where()}: expected another name, {name} is a route target of its own"]
                self.validate(TransportSection, section)
                self.transports[name] = section
        except ConfigError as error:
            return error.errors
        except AddressError as error:
            return [f"{section.where()}: expected a domain behind the colon ({error})"]
        return []

    def _certificates(self, sections: dict[str, Section]) -> list[str]:
        """Has [acme] obtain the certificates that [tls] and [tls:NAME] do not name; returns errors."""
        acme = self.acme
        section = sections.get("acme") or Section("acme", self.file)
        bare = [(where, domain_key(name.removeprefix("tls:"))) for name, where in sections.items()
                if name.startswith("tls:") and not where.get("certificate") and domain_key(name.removeprefix("tls:")) in self.tls_names]
        if not acme.terms_agreed:
            errors = [f"{where.where()}: expected a certificate, or [acme] to obtain one" for where, _ in bare]
            if section and "terms_agreed" not in section:
                errors.append(f"{section.where()}: expected terms_agreed = yes, once you have read the terms of {acme.directory}")
            return errors
        errors = []
        wanted = [where for where, _ in bare]
        own = tuple(dict.fromkeys(acme.names or [self.gmta.hostname]))
        if not self.tls.certificate:
            wanted.append(sections.get("tls") or Section("tls"))
            self.tls = self._obtained(self.tls, own)
        for _, name in bare:
            self.tls_names[name] = self._obtained(self.tls_names[name], own if name in own and own in self.obtained.values() else (name,))
        errors += [f"{where.where('key')}: expected a certificate with it, since [acme] brings a key of its own" for where in wanted if where.get("key")]
        if not wanted:
            errors.append(f"{section.where('terms_agreed')}: expected [tls] or a [tls:NAME] without a certificate, since nothing is to be obtained")
        for name in own:
            if name.startswith("[") or not name.isascii():  # a host name of [gmta] may be so
                errors.append(f"{section.where('names' if acme.names else '')}: expected host names, not {name!r}")
        if bool(acme.eab_key_id) != bool(acme.eab_secret):
            errors.append(f"{section.where('eab_key_id' if acme.eab_key_id else 'eab_secret')}: expected both eab_key_id and eab_secret, or none")
        if self.look and importlib.util.find_spec("acme") is None:
            errors.append(f"{section.where('terms_agreed')}: expected the Python package acme to be installed: pip install 'gmta[acme]'")
        if not acme.addresses:
            self.acme = acme.model_copy(update={"addresses": [("0.0.0.0", 80 if acme.challenge == "http-01" else 443)]})
        return errors

    def _obtained(self, tls: Tls, names: tuple[str, ...]) -> Tls:
        """The section with the file that [acme] keeps for these names, key and certificate together."""
        file = os.path.join(self.gmta.data_dir, "acme", f"{names[0]}.pem")
        self.obtained[file] = names
        return tls.model_copy(update={"certificate": file})

    def _listeners(self, sections: dict[str, Section]) -> list[str]:
        """What can't be served: TLS that must be, without a certificate."""
        if not isinstance(getattr(self, "tls", None), Tls) or self.tls.certificate:
            return []
        return [f"{sections[f'listener:{name}'].where('tls')}: expected a certificate in [tls], since nobody could talk to this listener without one"
                for name, listener in self.listeners.items() if listener.tls in ("implicit", "required")]

    def _routes(self, section: Section | None) -> list[str]:
        """Checks [route], or makes one: local = the first maildir transport, * = the first relay."""
        if section is None:
            for key, kinds in (("local", ("maildir", "lmtp")), ("*", ("relay",))):
                for kind in kinds:
                    for name, transport in self.transports.items():
                        if transport.get("type") == kind:
                            self.route.setdefault(key, name)
            return []
        errors: list[str] = []
        known = [*(name[10:] for name in self.sections if name.startswith("transport:")), *TARGETS]
        for key, target in section.items():
            if target not in known:
                errors.append(f"{section.where(key)}: expected a transport, fail, hold or discard, "
                              f"not {target!r}{nearest(target, known)}")
            sender = key.startswith("from:")
            name = key.removeprefix("from:").strip()
            try:
                if "@" in name:
                    parse_mailbox(name)
                elif name not in (("<>",) if sender else ("local", "*")):
                    check_domain(name.removeprefix("."))
            except AddressError as error:
                expected = "from:address, from:domain, from:.domain or from:<>" if sender else "an address, a domain, .domain, local or *"
                errors.append(f"{section.where(key)}: expected {expected} ({error})")
            self.route[key] = target
        return errors

    def snapshot(self) -> str:
        """The configuration as JSON text, with what came from the environment and from secret files."""
        return json.dumps({
            "file": self.file, "base": self.base,
            "sections": [{"name": section.name, "file": section.file, "line": section.line, "values": dict(section),
                          "places": section.places, "secrets": section.secrets} for section in self.sections.values()],
        })

    @classmethod
    def from_snapshot(cls, text: str) -> Config:
        """The Config that `snapshot` was taken of; reads no configuration file."""
        data = json.loads(text)
        sections: dict[str, Section] = {}
        for item in data["sections"]:
            section = sections[item["name"]] = Section(item["name"], item["file"], item["line"], item["values"])
            section.places = {key: (place[0], place[1]) for key, place in item["places"].items()}
            section.secrets = item["secrets"]
        return cls(sections, data["file"], look=False)


def _tls_policy(section: Section | None) -> tuple[dict[str, TlsDemand], list[str]]:
    """What [tls_policy] demands of whom, and errors."""
    found: dict[str, TlsDemand] = {}
    errors: list[str] = []
    section = section or Section("tls_policy")
    for key, value in section.items():
        words = _words(value)
        level, names = (words[0], words[1:]) if words else ("", [])
        if level not in TLS_LEVELS:
            errors.append(f"{section.where(key)}: expected one of {', '.join(TLS_LEVELS)}, not {level!r}{nearest(level, TLS_LEVELS)}")
            continue
        try:
            if names and level != "verify":
                raise AddressError("names of the certificate are for verify only")
            for name in (*([key] if key != "*" else []), *names):
                check_domain(name.removeprefix("."))
        except AddressError as error:
            errors.append(f"{section.where(key)}: expected a domain, .domain or *, and for verify names of the certificate ({error})")
            continue
        below = "." if key.startswith(".") else ""
        found[key if key == "*" else below + domain_key(key.removeprefix("."))] = TlsDemand(
            level, tuple(name.lower() for name in names), key == "*")  # type: ignore[arg-type]
    return found, errors


def find() -> str:
    """The configuration file where none is named: $GMTA_CONFIG, ./config.ini, /etc/gmta/config.ini; raises ConfigError."""
    named = os.environ.get("GMTA_CONFIG")
    if named:
        return named
    for path in FILES:
        if os.path.exists(path):
            return path
    raise ConfigError([f"no configuration: none of -c FILE, $GMTA_CONFIG, {', '.join(FILES)}"])


def load(path: str | None = None) -> Config:
    """Reads and checks the configuration; raises ConfigError with everything that is wrong."""
    path = os.path.abspath(path or find())
    text = _Text()
    text.read(path)
    text.fill()
    try:
        config = Config(text.sections, path)
    except ConfigError as error:
        raise ConfigError(list(dict.fromkeys(text.errors + error.errors))) from None
    if text.errors:
        raise ConfigError(text.errors)
    return config
