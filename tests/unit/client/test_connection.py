"""Autobahn still has every name that the client's connections rely on, and calls every method that they override."""

import pytest
from autobahn.twisted.websocket import WebSocketClientFactory, WebSocketClientProtocol
from support.overrides import names_of, overrides, source_of, used_in
from support.server_ends import ServerEnd
from support.websocket_frames import TEXT, frame
from twisted.internet.task import Clock

from chatd.client.connection import ClientConnection, ClientFactory

OWN = {"owner", "options", "_reactor", "_heard", "_deadline", "_patience"}
"""The attributes that our methods give to connections and factories."""
REPLACED = {"factory", "transport", "CONFIG_ATTRS"}
"""The attributes of Autobahn's connections that ours replace on purpose."""


@pytest.fixture
def factory():
    """A factory that Autobahn defines."""
    factory = WebSocketClientFactory("ws://h/", reactor=Clock())
    factory.protocol = WebSocketClientProtocol
    factory.setProtocolOptions(openHandshakeTimeout=0)
    return factory


@pytest.fixture
def theirs(factory):
    """A connection of Autobahn's own that has been through a handshake, a message and a close."""
    wire = ServerEnd(factory.buildProtocol(None))
    wire.answer("101 Switching Protocols", "Server: chatd")
    wire.say(frame(TEXT, b"hi", masked=False) + b"\x01\x00")
    wire.close(1000)
    wire.end()
    return wire.client


def test_names_used_on_a_connection(theirs):
    """Autobahn's connections have every attribute that ours read, set or call on their own."""
    used = used_in(ClientConnection) - names_of(ClientConnection) - OWN
    assert used >= {"state", "data", "consumeData", "_dataReceived", "_connectionLost", "inside_message", "wasClean"}
    assert {name for name in used | REPLACED if not hasattr(theirs, name)} == set()


def test_names_used_on_a_factory(factory):
    """Autobahn's factory has every attribute that ours uses on its own, and every option of a connection."""
    used = used_in(ClientFactory) - names_of(ClientFactory) - OWN
    assert used == {"protocol", "setProtocolOptions"}
    used |= {*WebSocketClientProtocol.CONFIG_ATTRS}
    assert used >= {"openHandshakeTimeout", "closeHandshakeTimeout", "failByDrop"}
    assert {name for name in used if not hasattr(factory, name)} == set()


def test_overridden_methods():
    """Autobahn defines and calls every method that is overridden."""
    source = source_of(WebSocketClientProtocol)
    twisted = {"connectionMade", "connectionLost", "dataReceived"}
    ours = overrides(ClientConnection)
    assert ours >= {"onConnecting", "failHandshake", "sendCloseFrame", "onMessage", "onOpen", "onClose"}
    assert {name for name in ours if not hasattr(WebSocketClientProtocol, name)} == set()
    assert {name for name in ours - twisted if f"self.{name}" not in source} == set()


def test_nothing_shadowed_by_accident(theirs, factory):
    """Names that our connections and factory declare without `override` do not exist in Autobahn."""
    ours = (names_of(ClientConnection) | OWN) - overrides(ClientConnection) - REPLACED
    assert {name for name in ours if hasattr(theirs, name)} == set()
    ours = (names_of(ClientFactory) | OWN) - {"__init__", "noisy"}
    assert {name for name in ours if hasattr(factory, name)} == set()
