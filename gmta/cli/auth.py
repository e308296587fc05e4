"""gmta auth, dmarc: the verdict on a message as if it had come from somewhere, and each step that led to it.

They evaluate with gmta.verify under the bounds that a server keeps, ask the name servers of the configuration, and apply no
policy: what the plugins would do with a result is theirs. Exit status 0 whatever the verdict; a file that can't be read is 2.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from gmta.cli.options import config_option, json_option
from gmta.cli.output import clean, print_json
from gmta.config import Config, load

if TYPE_CHECKING:
    from gmta.mail.message import Message
    from gmta.verify import Lookups
    from gmta.verify.dmarc import DmarcResult
    from gmta.verify.spf import SpfResult

_FROM = re.compile(rb"\s*from[ \t]*:", re.I)


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--ip", required=True, metavar="IP", help="address of the client")
@click.option("--helo", default="", metavar="NAME", help="what it says at EHLO")
@click.option("--mail-from", default="", metavar="ADDR", help="envelope sender; empty for the null sender")
@click.option("--now", type=float, default=None, metavar="UNIXTIME", help="the time of the verdict; default: now")
@config_option
@json_option
def auth(file: Any, ip: str, helo: str, mail_from: str, now: float | None, path: str | None, as_json: bool) -> None:
    """Judge a message as if it came from there: SPF, DKIM, DMARC, ARC, each step explained. FILE - is standard input."""
    from gmta.verify import RESERVED, arc, dkim
    from gmta.verify.dmarc import authors_of, evaluate
    from gmta.verify.spf import Spf

    config = load(path)
    lookups = _lookups(config)
    message = _message(file.read())
    sender = mail_from.removeprefix("<").removesuffix(">")
    at = time.time() if now is None else now
    spf = Spf(config.gmta.hostname)
    early = lookups.leaving(RESERVED)
    by_sender = spf.mail_from(early, ip, helo, sender, now=at, trace=True)
    by_helo = spf.helo(early, ip, helo, now=at, trace=True)
    authors = authors_of(message.values("From"))
    signatures = dkim.verify(message, early, now=at, max_signatures=config.limits.dkim_signatures, author_domains=authors.domains,
                             trace=True)
    judged = evaluate(lookups, authors, (by_sender.result, by_sender.domain), [(one.result, one.domain) for one in signatures], trace=True)
    chain = arc.verify_chain(message, lookups, now=at, trace=True)
    if as_json:
        print_json({
            "spf": {"mailfrom": _spf_json(by_sender), "helo": _spf_json(by_helo)},
            "dkim": [{"result": one.result, "d": one.domain, "s": one.selector, "reason": one.reason, "steps": one.steps}
                     for one in signatures],
            "dmarc": _dmarc_json(judged),
            "arc": {"result": chain.result, "reason": chain.reason, "steps": list(chain.steps)},
        })
        return
    for result in (by_sender, by_helo):
        _print(f"spf={result.result} ({result.identity} {result.domain}): {result.reason}", result.steps)
        if result.explanation:
            _print(f"  the domain says: {result.explanation}", ())
    for one in signatures:
        _print(f"dkim={one.result} d={one.domain} s={one.selector}" + (f": {one.reason}" if one.reason else ""), one.steps)
    if not signatures:
        _print("dkim=none: no signature", ())
    _print_dmarc(judged)
    _print(f"arc={chain.result}" + (f": {chain.reason}" if chain.reason else ""), chain.steps)


@click.command()
@click.option("--from", "fields", multiple=True, metavar="FIELD", help="a whole From field with its name; may be repeated, or left out")
@click.option("--spf", default="none:", metavar="RESULT:DOMAIN", help="of the MAIL FROM identity")
@click.option("--dkim", multiple=True, metavar="RESULT:DOMAIN", help="of a signature, with its d=; may be repeated")
@config_option
@json_option
def dmarc(fields: tuple[str, ...], spf: str, dkim: tuple[str, ...], path: str | None, as_json: bool) -> None:
    """The DMARC verdict for results already known, with the tree walk."""
    from gmta.verify.dmarc import authors_of, evaluate

    values = [_FROM.sub(b"", os.fsencode(field), count=1) for field in fields]
    judged = evaluate(_lookups(load(path)), authors_of(values), _pair(spf), [_pair(one) for one in dkim], trace=True)
    if as_json:
        print_json(_dmarc_json(judged))
    else:
        _print_dmarc(judged)


def _lookups(config: Config) -> Lookups:
    """The DNS of a configuration, bounded as a server bounds it for one message."""
    from gmta.services.dns import Resolver
    from gmta.verify import Lookups

    return Lookups(Resolver.configured(config))


def _message(raw: bytes) -> Message:
    """The message of a file; one with the line ends of text files gets those of mail."""
    from gmta.mail.message import Message

    return Message.from_bytes(raw if b"\r\n" in raw else raw.replace(b"\n", b"\r\n"))


def _pair(text: str) -> tuple[str, str]:
    result, colon, domain = text.partition(":")
    if not colon:
        raise click.UsageError(f"{clean(text)}: expected RESULT:DOMAIN, such as pass:example.org or none:")
    return result.strip().lower(), domain.strip()


def _spf_json(result: SpfResult) -> dict[str, Any]:
    return {"result": result.result, "domain": result.domain, "reason": result.reason, "mechanism": result.mechanism,
            "explanation": result.explanation, "steps": list(result.steps)}


def _dmarc_json(judged: DmarcResult) -> dict[str, Any]:
    return {"result": judged.result, "disposition": judged.disposition, "policy": judged.policy, "domain": judged.domain,
            "organizational_domain": judged.organizational_domain, "policy_domain": judged.policy_domain,
            "aligned": list(judged.aligned), "reason": judged.reason, "steps": list(judged.steps)}


def _print(headline: str, steps: Sequence[str]) -> None:
    click.secho(clean(headline), bold=True)
    for step in steps:
        click.echo(f"  {clean(step)}")


def _print_dmarc(judged: DmarcResult) -> None:
    where = f", policy {judged.policy} at {judged.policy_domain}" if judged.policy_domain else ""
    organization = f", organizational domain {judged.organizational_domain}" if judged.organizational_domain else ""
    _print(f"dmarc={judged.result} disposition={judged.disposition} ({judged.domain or 'no domain'}{where}{organization}): {judged.reason}",
           judged.steps)
