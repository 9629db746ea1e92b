"""The transports between a room and its clients: WebSocket, HTTP and Server-Sent Events."""
