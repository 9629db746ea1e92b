"""The Python client of a chatd server.

A `Client` joins the room at a URL and calls a `Listener` for each entry, over as many connections as needed.
"""

from chatd.client.client import Client, Listener, ServerAddress
from chatd.client.protocol import Backoff, ClientStopped, Event, History, Posted, ProtocolError, Rejected
from chatd.messages import Entry, Id

__all__ = [
    "Backoff",
    "Client",
    "ClientStopped",
    "Entry",
    "Event",
    "History",
    "Id",
    "Listener",
    "Posted",
    "ProtocolError",
    "Rejected",
    "ServerAddress",
]
