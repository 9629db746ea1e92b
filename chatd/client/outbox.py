"""The outbox of a room: posts that are sent one after another, each until the server answers.

A post is stored before it is sent, under the label that it has for ever.  So the next program sends it again, and the
server stores it once.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import orjson

from chatd.client.protocol import ClientStopped, Posted, Rejected, Requester
from chatd.client.storage import PendingPost, Storage
from chatd.client.view import RoomEntry
from chatd.messages import Id


class _Sent:
    """Receives the answer to one post."""

    def __init__(self, outbox: "Outbox", label: str) -> None:
        self._outbox, self._label = outbox, label

    def callback(self, result: Posted) -> None:
        """Take the acknowledgement."""
        self._outbox.acknowledged(self._label, result)

    def errback(self, fail: Exception) -> None:
        """Take the refusal, or the end of the room."""
        self._outbox.refused(self._label, fail)


class Outbox:
    """The posts of one user in one room.

    `send` sends a request until it is answered, `forget` drops one, and `wall` returns the seconds since 1970.
    `changed` is called after each change, and `failed` while an exception of the storage is handled.
    """

    def __init__(
        self,
        storage: Storage,
        key: str,
        *,
        send: Callable[[dict[str, Any], Requester, str], Any],
        forget: Callable[[str], None],
        wall: Callable[[], float],
        changed: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        self._storage, self._key = storage, key
        self._send, self._forget, self._wall = send, forget, wall
        self._changed, self._failed = changed, failed
        self._answers: dict[str, list[Requester]] = {}
        self._in_flight: str | None = None
        self._settled: set[Id] = set()
        """The ids of posts that were acknowledged since the outbox was empty."""
        self._end: Exception | None = None
        self.posts: list[PendingPost] = sorted(storage.list(key), key=_order)
        """All posts without an acknowledgement, oldest first."""

    def post(self, frame: dict[str, Any], answer: Requester, since: Id | None) -> None:
        """Store a post and send it after the others; raise TypeError if its fields are not JSON."""
        if self._end is not None:
            answer.errback(self._end)
            return
        frame = orjson.loads(orjson.dumps(frame))  # later changes of the fields do not count
        newest = self.posts[-1].at if self.posts else 0
        label = secrets.token_urlsafe(16)
        post = PendingPost(label, self._key, max(int(self._wall() * 1000), newest + 1), frame, since)
        self._storage.put(post)
        self.posts.append(post)
        self._answers[post.label] = [answer]
        self._changed()
        self.send_next()

    def retry(self, label: str, answer: Requester) -> bool:
        """Send a refused post again, under its label; return whether there is such a post."""
        post = self._find(label)
        if post is None or post.error is None or self._end is not None:
            return False
        self._update(replace(post, error=None))
        self._answers[label] = [answer]
        self.send_next()
        return True

    def discard(self, label: str) -> None:
        """Remove a post.  The server may have stored it."""
        if self._find(label) is None:
            return
        if self._in_flight == label:
            self._in_flight = None
            self._forget(label)
        self._remove(label)
        self._settle(label, "errback", ClientStopped("the post was discarded"))
        self.send_next()

    def stop(self, error: Exception) -> None:
        """Send nothing any more.  The posts stay in the storage."""
        self._end = error
        for label in [*self._answers]:
            self._settle(label, "errback", error)

    def send_next(self) -> None:
        """Send the oldest post that was not refused, unless another one is in flight."""
        waiting = next((post for post in self.posts if post.error is None), None)
        if waiting is not None and self._in_flight is None and self._end is None:
            self._in_flight = waiting.label
            self._send({**waiting.frame}, _Sent(self, waiting.label), waiting.label)

    def missing(self, entries: Sequence[RoomEntry]) -> list[PendingPost]:
        """Return the posts whose entries have not arrived: an entry comes before its acknowledgement."""
        taken = {*self._settled}
        return [post for post in self.posts if post.error is not None or not _arrived(post, entries, taken)]

    # For its requests

    def acknowledged(self, label: str, posted: Posted) -> None:
        """Remove a post that the server has stored."""
        self._in_flight = None
        self._settled.add(posted.id)
        self._remove(label)
        self._settle(label, "callback", posted)
        self.send_next()

    def refused(self, label: str, error: Exception) -> None:
        """Keep a post that the server refuses, with the reason; keep all posts as they are at the end of the room."""
        self._in_flight = None
        post = self._find(label)
        if self._end is None and post is not None and isinstance(error, Rejected):
            self._update(replace(post, error=error))
        self._settle(label, "errback", error)
        self.send_next()

    def _settle(self, label: str, way: str, outcome: Any) -> None:
        for answer in self._answers.pop(label, ()):
            getattr(answer, way)(outcome)

    def _find(self, label: str) -> PendingPost | None:
        return next((post for post in self.posts if post.label == label), None)

    def _update(self, post: PendingPost) -> None:
        self._keep(self._storage.put, post)
        self.posts = [post if one.label == post.label else one for one in self.posts]
        self._changed()

    def _remove(self, label: str) -> None:
        self._keep(self._storage.delete, label)
        self.posts = [post for post in self.posts if post.label != label]
        if not self.posts:
            self._settled.clear()
        self._changed()

    def _keep(self, change: Callable[[Any], None], what: PendingPost | str) -> None:
        """Change the storage.  If that fails, the next program sends the post again, and the server stores it once."""
        try:
            change(what)
        except Exception:  # noqa: BLE001 -- it is the application's, and must not end the connection
            self._failed("the storage of the outbox failed")


def _order(post: PendingPost) -> tuple[int, str]:
    return post.at, post.label


def _arrived(post: PendingPost, entries: Sequence[RoomEntry], taken: set[Id]) -> bool:
    """Return whether an entry is that of the post; `taken` are those of earlier posts."""
    frame = post.frame
    for entry in reversed(entries):
        if post.since is not None and (entry.id.epoch != post.since.epoch or entry.id.number <= post.since.number):
            return False
        same = entry.message == frame.get("message") and entry.username == frame.get("username")
        if same and entry.id not in taken and frame.get("replaces") == (entry.replaces and str(entry.replaces)):
            taken.add(entry.id)
            return True
    return False
