"""The address that a server listens on: bound before anything is loaded, so that one that is taken is told at once.

Knows no HTTP.
"""

from __future__ import annotations

import errno
import os
import socket

from headrace.errors import UserError, reason

__all__ = ["bound"]


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to an address, one for each that the host's name stands for. Nobody can connect to them yet.

    Args:
        host: a name or an address.
        port: 0 takes a free one, the same for all.

    Raises:
        UserError: there is no such host, the port is taken, or it may not be used.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host!r} is not known ({reason(error)}); expected an address of this computer"
        ) from None
    made: list[socket.socket] = []
    problem: OSError | None = None
    for family, kind, protocol, _, (address, _, *scope) in dict.fromkeys(found):
        try:
            one = socket.socket(family, kind, protocol)
        except OSError as error:  # a family that this computer does not have
            problem = error
            continue
        made.append(one)
        if os.name == "posix":
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended holds none
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # IPv4 has a socket of its own
        try:
            one.bind((address, port, *scope))
            port = port or one.getsockname()[1]
        except OSError as error:
            made.pop().close()
            problem = error
            if error.errno != errno.EADDRNOTAVAIL:  # localhost is often ::1 too where there is no IPv6
                break
    else:
        if made:
            return made
    for one in made:
        one.close()
    if problem is not None and problem.errno == errno.EADDRINUSE:
        raise UserError(f"port {port} of {host} is taken; choose another --port, or 0 for a free one")
    why = "" if problem is None else f" ({reason(problem)})"
    raise UserError(f"{host}, port {port}, cannot be listened on{why}; choose another --host or --port")
