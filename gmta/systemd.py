"""What systemd hands to the supervisor (sockets, a watchdog) and what it is told in return; without systemd nothing happens.

The variables are taken out of the environment, so that no child takes them for its own. Which listener a given socket serves
is the supervisor's business. Failure: `given_sockets` raises ConfigError for what is no listening TCP socket; a message that
can't be sent is dropped. Protocols: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, MutableMapping
from typing import NamedTuple

from gmta.config import ConfigError, host_port_text

FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START


class Given(NamedTuple):
    """A listening socket from systemd; name: its FileDescriptorName, by default the name of the socket unit."""

    name: str
    sock: socket.socket
    host: str
    port: int

    def matches(self, host: str, port: int) -> bool:
        """Whether it is bound there; one that takes both families on all addresses is where either wildcard is."""
        if port != self.port:
            return False
        both = self.host == "::" and not self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        return host == self.host or (both and host == "0.0.0.0")

    def __str__(self) -> str:
        return f"{self.name or 'unnamed'} ({host_port_text(self.host, self.port)})"


def given_sockets(environ: MutableMapping[str, str], pid: int) -> list[Given]:
    """The sockets that systemd passed to process `pid`, in its order; raises ConfigError."""
    count, meant, names = (environ.pop(name, "") for name in ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"))
    if meant != str(pid) or not count.isdigit():
        return []
    named = names.split(":") if names else []
    found: list[Given] = []
    errors: list[str] = []
    for index in range(int(count)):
        descriptor = FIRST_DESCRIPTOR + index
        name = named[index] if index < len(named) else ""
        try:
            os.set_inheritable(descriptor, False)
            sock = socket.socket(fileno=descriptor)
            if (sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM
                    or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)):
                sock.detach()
                errors.append(f"socket {name or descriptor} from systemd: expected a listening TCP socket (ListenStream=)")
                continue
            host, port = sock.getsockname()[:2]
            found.append(Given(name, sock, host, port))
        except OSError as error:
            errors.append(f"socket {name or descriptor} from systemd: {error.strerror}")
    if errors:
        raise ConfigError(errors)
    return found


class Notifier:
    """Tells systemd how the service stands. now_s: a monotonic clock, for the watchdog."""

    def __init__(self, environ: MutableMapping[str, str], pid: int, now_s: Callable[[], float] = time.monotonic) -> None:
        path = environ.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path  # @: Linux's abstract names
        usec, meant = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._watchdog_s = int(usec) / 1e6 if usec.isdigit() and meant in ("", str(pid)) else 0.0
        self._now_s = now_s
        self._petted_at = float("-inf")

    def ready(self, status: str) -> None:
        """The service is up, or its reload is over."""
        self._tell("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        """A reload has begun; with the time, as Type=notify-reload needs it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", "STATUS=reloading")

    def stopping(self) -> None:
        """The service ends."""
        self._tell("STOPPING=1", "STATUS=stopping")

    def status(self, text: str) -> None:
        """A line for `systemctl status`."""
        self._tell(f"STATUS={text}")

    def alive(self) -> None:
        """Call it in every turn of the loop: pets the watchdog, twice in its time."""
        if self._watchdog_s and self._now_s() - self._petted_at >= self._watchdog_s / 2:
            self._petted_at = self._now_s()
            self._tell("WATCHDOG=1")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)  # a service manager that does not read must not stop the service
                sock.sendto("\n".join(line.replace("\n", " ") for line in lines).encode(), self._address)
        except OSError:
            pass  # nobody to tell
