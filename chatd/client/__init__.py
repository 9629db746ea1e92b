"""The Python client of a chatd server."""

from chatd.client.client import Address, Client, Listener

__all__ = ["Address", "Client", "Listener"]
