"""gmta: a mail transfer agent in Python. This module is the public face for plugins: verdicts, outcomes, addresses."""

from gmta.hookspecs import Credentials, Delivery, Duration, PluginConfig, Size, hookimpl
from gmta.mail.address import Address
from gmta.mail.session import AuthResult
from gmta.mail.verdict import (
    Outcome,
    Verdict,
    accept,
    defer,
    deferred,
    delivered,
    disconnect,
    failed,
    reject,
)

__version__ = "0.1.0"

__all__ = ["Address", "AuthResult", "Credentials", "Delivery", "Duration", "Outcome", "PluginConfig", "Size", "Verdict", "accept",
           "defer", "deferred", "delivered", "disconnect", "failed", "hookimpl", "reject"]
