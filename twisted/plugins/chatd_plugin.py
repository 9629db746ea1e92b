"""The plugin that gives twistd the chatd command."""

from twisted.application.service import ServiceMaker

chatd = ServiceMaker("chatd", "chatd.tap", "A chat-room server over WebSocket that keeps every message.", "chatd")
