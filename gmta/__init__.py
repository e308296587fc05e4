"""gmta, a mail transfer agent; and what a plugin imports: `from gmta import hookimpl, PluginConfig, accept, reject`.

The names are looked up when they are first used: a worker imports this package before its monkey patch, which must
find no other module loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmta.config import Duration, Size
    from gmta.hookspecs import Credentials, Delivery, PluginConfig, hookimpl
    from gmta.mail.address import Address
    from gmta.mail.envelope import Envelope, RecipientState
    from gmta.mail.message import Message
    from gmta.mail.reply import Reply
    from gmta.mail.session import AuthResult, Recipient, Session, Transaction
    from gmta.mail.verdict import Outcome, Verdict, accept, defer, deferred, delivered, disconnect, failed, reject

__version__ = "0.1.0"

_HOMES = {
    "gmta.config": ("Duration", "Size"),
    "gmta.hookspecs": ("Credentials", "Delivery", "PluginConfig", "hookimpl"),
    "gmta.mail.address": ("Address",),
    "gmta.mail.envelope": ("Envelope", "RecipientState"),
    "gmta.mail.message": ("Message",),
    "gmta.mail.reply": ("Reply",),
    "gmta.mail.session": ("AuthResult", "Recipient", "Session", "Transaction"),
    "gmta.mail.verdict": ("Outcome", "Verdict", "accept", "defer", "deferred", "delivered", "disconnect", "failed", "reject"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Address", "AuthResult", "Credentials", "Delivery", "Duration", "Envelope", "Message", "Outcome", "PluginConfig", "Recipient",
    "RecipientState", "Reply", "Session", "Size", "Transaction", "Verdict", "__version__", "accept", "defer", "deferred", "delivered",
    "disconnect", "failed", "hookimpl", "reject",
]


def __getattr__(name: str) -> Any:
    """The public name from its module (PEP 562)."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'gmta' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value
