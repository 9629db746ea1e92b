"""The Python client of a chatd server.

A `Client` joins the room at a URL and calls a `Listener` for each entry, over as many connections as needed.  A
`SharedClient` joins many rooms over one connection, with a `Listener` for each.
"""

from chatd.client.address import ServerAddress
from chatd.client.client import Client
from chatd.client.core import Listener
from chatd.client.protocol import Backoff, ClientStopped, Event, History, Posted, ProtocolError, Rejected
from chatd.client.shared import JoinedRoom, SharedClient
from chatd.messages import Entry, Id

__all__ = [
    "Backoff",
    "Client",
    "ClientStopped",
    "Entry",
    "Event",
    "History",
    "Id",
    "JoinedRoom",
    "Listener",
    "Posted",
    "ProtocolError",
    "Rejected",
    "ServerAddress",
    "SharedClient",
]
