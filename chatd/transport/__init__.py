"""What carries a room to its clients: WebSocket, HTTP and Server-Sent Events."""
