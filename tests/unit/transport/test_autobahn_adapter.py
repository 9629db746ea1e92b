"""Autobahn still has every name that the adapter relies on, and calls every method that it overrides."""

import pytest
import txaio
from autobahn.twisted.websocket import WebSocketServerFactory, WebSocketServerProtocol
from support.helpers import HEAD
from support.overrides import names_of, overrides, source_of, used_in
from support.websocket_frames import masked
from twisted.internet.error import ConnectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from chatd.transport.autobahn_adapter import AutobahnConnection, AutobahnFactory
from chatd.transport.websocket import ChatFactory, WebSocketConnection

REPLACED = {
    *("factory", "transport", "peer", "is_closed", "is_open", "utf8validator"),
    *("current_frame", "inside_message", "websocket_version", "__init__"),
    *("_perMessageCompress", "_isMessageCompressed"),
}
"""The attributes of Autobahn's connections that ours replace on purpose."""


@pytest.fixture
def theirs():
    """A connection of Autobahn's own that has been through a handshake, a message and a close."""
    theirs = WebSocketServerProtocol()
    theirs.factory = WebSocketServerFactory()
    theirs.makeConnection(StringTransport())
    handshake = HEAD + b"\r\n\r\n"
    theirs.dataReceived(handshake + masked(b"hi") + masked(b"", first=0x01) + masked(b"\x03\xe8", first=0x88))
    theirs.connectionLost(Failure(ConnectionDone()))
    return theirs


@pytest.fixture
def factory():
    return AutobahnFactory(WebSocketConnection, "chatd", Clock())


def test_names_used_on_a_connection(theirs):
    """Autobahn's connections have every attribute that the adapter reads, sets or calls on its own."""
    used = used_in(AutobahnConnection) - names_of(AutobahnConnection)
    assert used >= {"state", "data", "consumeData", "processData", "remoteCloseCode", "failedByMe", "wasClean"}
    assert {name for name in used if not hasattr(theirs, name)} == set()
    assert {name for name in REPLACED if not hasattr(theirs, name)} == set()


def test_names_used_on_a_factory():
    """Autobahn's factory and blank connection have every attribute that the adapter uses on its own."""
    used = used_in(AutobahnFactory) - names_of(AutobahnFactory)
    assert used >= {"countConnections", "setProtocolOptions", "_connectionMade"}
    theirs = WebSocketServerFactory()
    assert {name for name in used if not hasattr(theirs, name) and not hasattr(WebSocketServerProtocol, name)} == set()
    assert hasattr(txaio.config, "loop")


def test_overridden_methods():
    """Autobahn defines and calls every method that is overridden."""
    source = source_of(WebSocketServerProtocol)
    ours = overrides(AutobahnConnection) | (overrides(WebSocketConnection) - names_of(AutobahnConnection))
    twisted = {"connectionMade", "connectionLost", "dataReceived"}
    assert ours >= {"processHandshake", "sendData", "sendCloseFrame", "_fail_connection", "onPong"}
    assert {name for name in ours if not hasattr(WebSocketServerProtocol, name)} == set()
    assert {name for name in ours - twisted if f"self.{name}" not in source} == set()


def test_nothing_shadowed_by_accident(theirs):
    """Names that our connections and factory declare without `override` do not exist in Autobahn."""
    for one in (AutobahnConnection, WebSocketConnection):
        ours = names_of(one) - overrides(one) - REPLACED
        assert {name for name in ours if hasattr(theirs, name)} == set()
    ours = (names_of(ChatFactory) | names_of(AutobahnFactory)) - {"__init__", "noisy"}
    assert {name for name in ours if hasattr(WebSocketServerFactory(), name)} == set()


def test_shared_attributes(factory):
    """A connection has every attribute that Autobahn would have given it, with the same value."""
    theirs = WebSocketServerProtocol()
    theirs.factory = factory
    theirs._connectionMade()
    ours = factory.buildProtocol(None)
    own = {"is_closed", "is_open", "utf8validator", "trafficStats", "_transport_details"}
    for name, value in vars(theirs).items():
        assert hasattr(ours, name), name
        if callable(value):
            assert getattr(ours, name)(None) == value(None), name
        elif name not in own:
            assert getattr(ours, name) == value, name


def test_own_attributes(factory):
    """A new connection has almost no attributes of its own."""
    assert {*vars(factory.buildProtocol(None))} == {"factory"}


def test_no_connection_is_counted_before_the_first(factory):
    assert factory.getConnectionCount() == 0
