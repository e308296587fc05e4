"""Questions to a web service of the postmaster's own: a POST of JSON, a bounded answer, connections that are kept.

Redirections are not followed; the URL is https, or http on this machine. Failure: ServiceError where the service can't be asked.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "::1", "localhost")


def private_url(value: str) -> str:
    """The URL, if what goes there can be read by nobody else; raises ValueError."""
    parts = urlsplit(value)
    if not parts.hostname or (parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK)):
        raise ValueError("an https URL, or one of http on this machine")
    return value


class ServiceError(OSError):
    """The service can't be asked; the text names its host, and nothing of the question."""


class WebService:
    """One service. authorization: value of that header, or "".  ca_file: authorities, or "" for the system's.  timeout_s: a whole request."""

    def __init__(self, url: str, authorization: str, ca_file: str, timeout_s: float) -> None:
        import urllib3  # costs a worker's start something, and few have a service

        self._error: type[Exception] = urllib3.exceptions.HTTPError
        self.host = urlsplit(url).hostname or ""
        self._url = url
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": authorization} if authorization else {})
        self._pool = urllib3.PoolManager(maxsize=20, retries=False, ca_certs=ca_file or None, timeout=urllib3.Timeout(total=timeout_s))

    def ask(self, question: Any, longest: int) -> tuple[int, bytes]:
        """(status, up to `longest` + 1 octets of the answer); raises ServiceError."""
        try:
            answer = self._pool.request("POST", self._url, body=json.dumps(question).encode(), headers=self._headers, redirect=False,
                                        preload_content=False)
            try:
                octets = answer.read(longest + 1)
                if answer.read(1):
                    answer.close()  # not to be read to its end
            finally:
                answer.release_conn()
        except self._error as error:
            raise ServiceError(f"{type(error).__name__}: {self.host}") from None  # its own text may have the question
        return answer.status, octets
