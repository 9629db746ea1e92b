"""Limits on what the server reads from its clients, which all connections to a port share.

A connection handles a few frames or one request in each reactor turn.  The rest waits in a fair queue, so a client that
sends much at once delays the others by one such budget at most.
"""

from collections import Counter
from typing import Final

from twisted.internet.interfaces import IReactorTime

from chatd.messages import Code
from chatd.room.moderation import Sanctions
from chatd.room.turns import TurnQueue
from chatd.transport.admission import Rate
from chatd.transport.connections import HTTP, WEBSOCKET
from chatd.transport.frames import STANDARD, Vocabulary
from chatd.transport.limits import Limits
from chatd.transport.moderator import Moderator
from chatd.transport.tokens import Tokens

FRAMES_PER_TURN: Final = 64
"""The largest number of frames that one connection handles in a reactor turn."""
FRAMES_PER_LOOK: Final = 4
"""The number of frames between two looks at the clock."""
SECONDS_PER_TURN: Final = 0.001
"""The time after which a connection leaves its other frames for the next turn, measured from its first look."""
PROMPT_HANDSHAKES: Final = 32
"""The number of handshakes that are answered at once; the others of a crowd wait in the queue."""
PROMPT_HANDSHAKES_PER_SECOND: Final = 400
"""The number of handshakes a second that are answered at once after that, which take a tenth of a core."""
SCHEMA: Final = "schema"
"""The key of errors without a code in the count of refused frames: those that break their schema."""


class Intake:
    """The state that the connections to a port share: the turns, the counts, and a rate limit and tokens, if any."""

    def __init__(
        self,
        clock: IReactorTime,
        rate: Rate | None = None,
        limits: Limits | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self.clock = clock
        self.rate = rate
        self.limits = Limits(clock) if limits is None else limits
        self.tokens = tokens
        self.moderator = Moderator(Sanctions(), (), clock.seconds)
        """Refuses clients; by default, nobody is sanctioned."""
        self.vocabulary: Vocabulary = STANDARD
        """The frames that clients may send."""
        self.turns = TurnQueue(clock)
        self.due = 0.0
        """The state that the rate of handshakes keeps (admission.Paced)."""
        self._handshakes = Rate(PROMPT_HANDSHAKES_PER_SECOND, PROMPT_HANDSHAKES, clock.seconds)
        self.refusals = Counter(dict.fromkeys([SCHEMA, *Code], 0))
        """The number of refused frames, by the code of the error."""
        self.throttles = Counter({WEBSOCKET: 0, HTTP: 0})
        """The number of pauses after a frame or a request above the rate, by carrier."""

    def answers_promptly(self) -> bool:
        """Count a handshake; return whether to answer it now, because it belongs to no crowd."""
        return not self._handshakes.take(self)
