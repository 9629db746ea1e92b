"""The address of a server or of a room: a parsed WebSocket URL."""

import re
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

from chatd.client.protocol import CONNECT_SECONDS
from chatd.messages import Id

if TYPE_CHECKING:
    from twisted.internet.interfaces import IStreamClientEndpoint


class ServerAddress(NamedTuple):
    """The address of a room: a parsed WebSocket URL."""

    secure: bool
    host: str
    port: int
    path: str
    query: str

    @classmethod
    def parse(cls, url: str) -> "ServerAddress":
        """Parse `ws://HOST[:PORT][/rooms/NAME][?QUERY]`, or `wss:` for TLS; raise ValueError for anything else."""
        shown = re.sub(r"(?s)^((?:[a-z]+://)?[^:@/]*:(?!//)).*@", r"\1***@", url)  # without the password of a user
        try:
            scheme, place, path, query, fragment = parts = urlsplit(url)
            port = parts.port
        except ValueError:
            scheme = ""
        if scheme not in ("ws", "wss") or not re.fullmatch(r"[!-~]+", url) or not parts.hostname or port == 0:
            raise ValueError(f"{shown!r} is not a URL such as ws://localhost:8085/rooms/main")
        if "@" in place or fragment:
            raise ValueError(f"{shown!r} must have neither a user nor a fragment")
        secure = scheme == "wss"
        return cls(secure, parts.hostname, port or (443 if secure else 80), path or "/", query)

    def __str__(self) -> str:
        return f"{'wss' if self.secure else 'ws'}://{self.uri_host}:{self.port}{self.path}"

    @property
    def uri_host(self) -> str:
        """The host as a URL or a Host header has it: an IPv6 address stands in brackets."""
        return f"[{self.host}]" if ":" in self.host else self.host

    def resource(self, last: Id | None) -> str:
        """Return the path and query of the handshake, which name the last id that the client has."""
        pairs = [pair for pair in parse_qsl(self.query) if last is None or pair[0] != "last_event_id"]
        if last is not None:
            pairs.append(("last_event_id", str(last)))
        return f"{self.path}?{urlencode(pairs)}" if pairs else self.path

    def endpoint(self, reactor: Any) -> "IStreamClientEndpoint":
        """Return an endpoint of Twisted that connects to the server.

        With TLS it trusts the certificate authorities of the machine, or those in the file that SSL_CERT_FILE names.
        """
        from twisted.internet.abstract import isIPAddress, isIPv6Address
        from twisted.internet.endpoints import HostnameEndpoint, TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
        from twisted.internet.ssl import optionsForClientTLS

        endpoint: IStreamClientEndpoint
        # HostnameEndpoint resolves even an IP address in a thread, so that clients connect in any order.
        if isIPv6Address(self.host):
            endpoint = TCP6ClientEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        elif isIPAddress(self.host):
            endpoint = TCP4ClientEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        else:
            endpoint = HostnameEndpoint(reactor, self.host, self.port, CONNECT_SECONDS)
        return wrapClientTLS(optionsForClientTLS(self.host), endpoint) if self.secure else endpoint
