"""The Python client of a chatd server."""

from chatd.client.client import Client, Listener, ServerAddress

__all__ = ["Client", "Listener", "ServerAddress"]
