"""gmta dkim: keys for signing made, and held against what DNS publishes.

Keys lie where `[plugin:dkim_sign] keys` says, else in the place that is its default. `keygen` writes a new file whole or not at
all and never over another; run by root it gives the file to `[gmta] user`. `check` ends with status 1 where a key is not published
as it should be, or there is none.
"""

from __future__ import annotations

import os
import pwd
import sys
import time
from typing import TYPE_CHECKING

import click
from pydantic import BaseModel, ConfigDict

from gmta.cli.options import config_option, json_option
from gmta.cli.output import clean, print_json
from gmta.config import Config, ConfigError, Path, Section, load
from gmta.mail.address import domain_key
from gmta.verify.signing import DEFAULT_KEYS, KeyFiles, KeyTrouble, SigningKey, is_name

if TYPE_CHECKING:
    from gmta.services.dns import Resolver

SECTION = "dkim_sign"  # of [plugin:…]: whoever signs, its key `keys` says where
STRING = 255  # octets of one string of a TXT record (RFC 1035 section 3.3)


class _Keys(BaseModel):
    """What is read of the section."""

    model_config = ConfigDict(validate_default=True)

    keys: Path = DEFAULT_KEYS


@click.group()
def dkim() -> None:
    """Keys for DKIM: make them, compare them with DNS."""


@dkim.command()
@click.argument("domain")
@click.option("--selector", default="", metavar="NAME", help="default: rsa or ed, with year and month")
@click.option("--ed25519", is_flag=True, help="an Ed25519 key, to sign beside an RSA one (RFC 8463)")
@click.option("--bits", type=click.Choice(["1024", "2048", "3072", "4096"]), default="2048", show_default=True, help="of an RSA key")
@config_option
@json_option
def keygen(domain: str, selector: str, ed25519: bool, bits: str, path: str | None, as_json: bool) -> None:
    """Make a key for DOMAIN, and print the record to publish."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    config = load(path)
    domain = _domain(domain)
    selector = selector.lower() or ("ed" if ed25519 else "rsa") + time.strftime("%Y%m")
    if not is_name(selector):
        raise click.UsageError(f"{clean(selector)} is no selector")
    file = _files(config).path(domain, selector)
    private = Ed25519PrivateKey.generate() if ed25519 else generate_private_key(65537, int(bits))
    try:
        _write_new(file, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), config.gmta.user)
    except FileExistsError:
        click.echo(f"{file} is there already; name another --selector", err=True)
        sys.exit(1)
    except OSError as error:
        click.echo(f"{error.filename or file}: {error.strerror}", err=True)
        sys.exit(1)
    key = SigningKey(domain, selector, private)
    if as_json:
        print_json({"file": file, "name": key.record_name, "record": key.record()})
        return
    click.echo(f"; private key: {file}")
    click.echo(zone_lines(key))


@dkim.command()
@click.argument("domain")
@config_option
@json_option
def check(domain: str, path: str | None, as_json: bool) -> None:
    """Compare what DNS publishes with the keys of DOMAIN."""
    from gmta.services.dns import Resolver

    config = load(path)
    domain = _domain(domain)
    try:
        keys = _files(config).keys(domain)
    except KeyTrouble as trouble:
        click.echo(str(trouble), err=True)
        sys.exit(1)
    resolver = Resolver.configured(config)
    found = [(key, compare(key, resolver)) for key in keys]
    if as_json:
        print_json([{"name": key.record_name, "algorithm": key.algorithm, "published": not wrong, "reason": wrong, "record": key.record()}
                    for key, wrong in found])
    else:
        for key, wrong in found:
            click.echo(f"{key.record_name} ({key.algorithm}): {clean(wrong) or 'published'}")
            if wrong:
                click.echo(zone_lines(key))
        if not found:
            click.echo(f"no keys for {domain} at {_files(config).pattern}", err=True)
    sys.exit(0 if found and not any(wrong for _, wrong in found) else 1)


def compare(key: SigningKey, resolver: Resolver) -> str:
    """What is wrong with the record that DNS has for a key, or ""."""
    from gmta.verify.dkim import Fault, Key, Signature, key_records

    signature = Signature()
    signature.algorithm, signature.domain, signature.identity_domain = key.algorithm, key.domain, key.domain
    wrong = ""
    try:
        records = key_records(resolver, key.record_name)
    except Fault as fault:
        return "no record" if fault.result == "permerror" else fault.reason
    for record in records:
        try:
            published = Key(record)
            published.check(signature)
            if published.verifies(key.sign(b"\0" * 32), b"\0" * 32):
                return "" if len(records) == 1 else f"{len(records)} records at one name: verifiers may take any (RFC 6376 section 3.6.2.2)"
            wrong = wrong or "the record is of another key"
        except Fault as fault:
            wrong = wrong or fault.reason
    return wrong or "no record"


def zone_lines(key: SigningKey) -> str:
    """The TXT record in the form of a zone file (RFC 1035 section 5), in strings of at most 255 octets."""
    text = key.record()
    strings = [text[start:start + STRING] for start in range(0, len(text), STRING)]
    return f"{key.record_name}. IN TXT ( " + "\n    ".join(f'"{string}"' for string in strings) + " )"


def _domain(text: str) -> str:
    domain = domain_key(text)
    if not is_name(domain) or "." not in domain:
        raise click.UsageError(f"{clean(text)} is no domain")
    return domain


def _files(config: Config) -> KeyFiles:
    """The key files of a configuration; raises ConfigError for a pattern that can't be one."""
    from gmta.services.log import NullLog

    section = config.plugin.get(SECTION) or Section(f"plugin:{SECTION}", config.file)
    pattern = config.validate(_Keys, section, ignore=section.keys() - {"keys"}).keys
    try:
        return KeyFiles(pattern, NullLog(), time.monotonic)
    except ValueError as error:
        raise ConfigError([f"{section.where('keys')}: {error}"]) from None


def _write_new(file: str, octets: bytes, user: str | None) -> None:
    """Makes a file of mode 0600 that is there whole or not at all; raises FileExistsError and other OSErrors."""
    from gmta.services.files import sync_directory, write_new

    owner = pwd.getpwnam(user) if user and os.geteuid() == 0 else None
    folder, _, name = file.rpartition("/")
    made = []
    while folder and not os.path.isdir(folder):
        made.append(folder)
        folder = folder.rpartition("/")[0]
    for one in reversed(made):
        os.mkdir(one, 0o700)
        if owner is not None:
            os.chown(one, owner.pw_uid, owner.pw_gid)
    folder = file.rpartition("/")[0]
    partial = f"{folder}/.{name}.{os.getpid()}"  # no selector begins with a dot
    write_new(partial, octets, (owner.pw_uid, owner.pw_gid) if owner is not None else None)
    try:
        os.link(partial, file)  # unlike rename, never over another
    finally:
        os.unlink(partial)
    sync_directory(folder)
