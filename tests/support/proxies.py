"""A TCP proxy that cuts connections."""

import asyncio


class CuttingProxy:
    """A proxy in this process before a port, which `target` returns; an asynchronous context manager.

    `budget` returns how many bytes pass before a connection is cut, or None for all.
    """

    def __init__(self, target, budget=lambda: None):
        self._target, self._budget = target, budget
        self._writers = set()
        self.cuts = 0
        self.silent = False
        """True while bytes of the server get lost, as on a broken network."""

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    def cut(self):
        """Cut all connections."""
        for writer in [*self._writers]:
            writer.transport.abort()

    async def _serve(self, reader, writer):
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target())
        except OSError:
            writer.transport.abort()
            return
        both = {writer, up_writer}
        self._writers |= both
        left = [self._budget()]
        try:
            await asyncio.gather(
                self._carry(reader, up_writer, left, up=True), self._carry(up_reader, writer, left, up=False)
            )
        except OSError:
            pass
        finally:
            for one in both:
                one.transport.abort()
            self._writers -= both

    async def _carry(self, reader, writer, left, *, up):
        while data := await reader.read(65536):
            if self.silent and not up:
                continue
            if left[0] is not None:
                data, left[0] = data[: left[0]], left[0] - len(data)
            writer.write(data)
            await writer.drain()
            if left[0] is not None and left[0] <= 0:
                self.cuts += 1
                raise ConnectionAbortedError
        raise ConnectionAbortedError
