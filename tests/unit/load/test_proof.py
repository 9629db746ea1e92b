"""The proof, which finds every single fault in what a server sends."""

import random
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE, count_held

from chatd.client.protocol import History, Posted
from chatd.load.proof import NumberSet, Proof, Reader, Violation
from chatd.messages import Entry, Id
from chatd.transport.frames import MESSAGE

TIME = "2026-01-01T00:00:00.000Z"


@given(st.lists(st.integers(0, 30)))
@REPEATABLE
def test_number_set_adds_each_number_once(numbers):
    once, seen = NumberSet(), set()
    for number in numbers:
        assert once.add(number) is (number not in seen)
        seen.add(number)


@given(st.lists(st.integers(0, 30)))
@REPEATABLE
def test_number_set_contains_and_iterates(numbers):
    once = NumberSet()
    for number in numbers:
        once.add(number)
    assert sorted(once) == sorted({*numbers}) == [number for number in range(40) if number in once]


def test_number_set_stores_a_dense_start_as_a_bound():
    """Numbers below the first gap take no memory."""
    once = NumberSet()
    for number in [*range(1, 1000), 0, 1001]:
        assert once.add(number)
    assert count_held(once) == 1


def test_posts_are_valid_and_unique():
    proof = Proof("abc123", 1, 1)
    texts = [proof.text(poster, place) for poster in range(100) for place in range(100)]
    assert len({*texts}) == len(texts)
    assert all(MESSAGE.accepts({"username": proof.username(99_999), "message": text}) for text in texts)
    assert proof.place(proof.text(7, 41)) == 41


class Given:
    """A proof of three clients, of which two post, in a log that begins empty."""

    def __init__(self, **options):
        self.proof = Proof("run", 3, 2, **options)
        self.readers = self.proof.readers
        self.log = []
        for reader in self.readers:
            self.proof.check_history(reader, History(Id("abcd", 0), []))

    def post(self, *posters):
        for poster in posters:
            _, text = self.proof.post(poster)
            self.log.append(Entry(len(self.log) + 1, self.proof.username(poster), text, TIME))
        return self

    def give(self, reader, *numbers):
        self.proof.check_entries(self.readers[reader], [self.log[number - 1] for number in numbers])

    def ack(self, poster, place, number, *, epoch="abcd", duplicate=False):
        self.proof.check_ack(self.readers[poster], place, Posted(Id(epoch, number), duplicate))

    def begin(self, reader, end, *entries, epoch="abcd"):
        self.proof.check_history(self.readers[reader], History(Id(epoch, end), entries, resumed=False))


def test_correct_run_is_proved():
    given = Given().post(0, 1, 0)
    given.give(0, 1, 2)
    given.give(1, 1)
    given.ack(0, 0, 1)
    given.ack(1, 0, 2, duplicate=True)
    given.give(1, 2, 3)
    given.give(0, 3)
    given.ack(0, 1, 3)
    assert not given.proof.is_level(given.readers[2])
    given.give(2, 1, 2, 3)
    assert all(map(given.proof.is_level, given.readers))
    given.proof.conclude()
    given.proof.check_newest_page(given.readers[0], Id("abcd", 3))
    assert given.proof.delivered == 9
    given.proof.forget()
    log = given.proof.log
    assert (log.known, log.unacknowledged, log.expected) == ({}, {}, {})


def test_forget_drops_only_what_all_readers_have():
    given = Given().post(*[0] * 9)
    given.give(0, *range(1, 10))
    given.give(1, *range(1, 8))
    given.give(2, *range(1, 6))
    given.proof.forget()
    assert sorted(given.proof.log.known) == [6, 7, 8, 9]
    given.give(2, *range(6, 10))
    given.give(1, 8, 9)
    given.proof.forget()
    assert given.proof.log.known == {}


def test_messages_of_others_must_agree():
    """Others may post in the room, if all readers receive the same."""
    given = Given().post(0)
    given.log.append(Entry(2, "ann", "run of the mill", TIME))
    given.give(0, 1, 2)
    given.give(1, 1, 2)
    assert given.proof.others == 1
    given.log[1] = given.log[1]._replace(message="other")
    with pytest.raises(Violation, match=r"client 2 received ann: 'other' of .* as abcd-2, and client 0 ann: 'run of"):
        given.give(2, 1, 2)


def test_messages_of_others_may_be_edited():
    """A reader that comes later gets the newest text; another author, or an unexplained text, is still a fault."""
    given = Given().post(0)
    given.log.append(Entry(2, "ann", "old", TIME))
    given.log.append(Entry(3, "ann", "new", TIME, replaces=2))
    given.give(0, 1, 2, 3)
    given.log[1] = given.log[1]._replace(message="new", replaced=3)
    given.give(1, 1, 2, 3)
    given.log[1] = given.log[1]._replace(username="bob")
    with pytest.raises(Violation, match="client 2 received bob: 'new'"):
        given.give(2, 1, 2)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((1, 3), "abcd-3 after abcd-1"), ((1, 1), "abcd-1 after abcd-1"), ((2, 1), "abcd-2 after abcd-0")],
)
def test_gap_duplicate_or_swap_is_found(numbers, words):
    with pytest.raises(Violation, match=f"client 1 received {words}"):
        Given().post(0, 0, 0).give(1, *numbers)


@pytest.mark.parametrize(
    "changes",
    [
        {"message": "run 0 0 x"},
        {"message": "run 0 1 |"},
        {"message": "run 2 0 |"},
        {"message": "run 1 0 |"},
        {"message": "something"},
        {"username": "ann"},
        {"username": "load-run-1"},
        {"extra": {"color": "red"}},
    ],
)
def test_altered_message_is_found(changes):
    given = Given().post(0)
    given.log[0] = given.log[0]._replace(**changes)
    with pytest.raises(Violation, match="abcd-1, as client 0 received it, is not what anyone posted: "):
        given.give(0, 1)


def test_post_stored_twice_is_found():
    given = Given().post(0, 0)
    given.log.append(given.log[0]._replace(number=3))
    with pytest.raises(Violation, match="abcd-3, as client 1 received it, is post 0 of client 0 a second time"):
        given.give(1, 1, 2, 3)


def test_two_messages_with_one_number():
    given = Given().post(0, 1)
    given.give(0, 1, 2)
    given.log = [given.log[1]._replace(number=1), given.log[0]._replace(number=2)]
    with pytest.raises(Violation, match=r"client 1 received load-run-1: .* as abcd-1, and client 0 load-run-0: "):
        given.give(1, 1)


def test_wrong_acknowledgement_is_found():
    given = Given().post(0, 0, 0)
    with pytest.raises(
        Violation, match=r"post 0 of client 0 was acknowledged as abcd-1 before the client received it; .* abcd-0"
    ):
        given.ack(0, 0, 1)
    given.give(0, 1, 2)
    with pytest.raises(Violation, match="post 0 of client 0 was acknowledged as abcd-2, and is abcd-1"):
        given.ack(0, 0, 2)
    with pytest.raises(Violation, match="post 2 of client 0 was acknowledged as abcd-2, and is nowhere"):
        given.ack(0, 2, 2)
    with pytest.raises(Violation, match="was acknowledged as efgh-2, of another log than abcd"):
        given.ack(0, 1, 2, epoch="efgh")
    with pytest.raises(Violation, match="received something before its history"):
        given.proof.check_ack(Reader(7), 0, Posted(Id("abcd", 1)))


def test_acknowledgement_refuted_by_a_later_message():
    given = Given().post(0, 1)
    given.ack(0, 0, 2, duplicate=True)
    with pytest.raises(Violation, match=r"abcd-1, .* is post 0 of client 0, acknowledged as abcd-2"):
        given.give(1, 1)


def test_acknowledgement_confirmed_by_a_later_message():
    given = Given().post(0)
    given.ack(0, 0, 1, duplicate=True)
    given.give(1, 1)
    assert given.proof.log.expected == given.proof.log.unacknowledged == {}


def test_acknowledgement_of_a_missing_message():
    given = Given().post(0, 1)
    given.ack(0, 0, 2, duplicate=True)
    given.log[0] = given.log[1]._replace(number=1)
    given.log[1] = Entry(2, "ann", "hi", TIME)
    for reader in range(3):
        assert not given.proof.is_level(given.readers[reader])
        given.give(reader, 1, 2)
    with pytest.raises(Violation, match="post 0 of client 0 was acknowledged as abcd-2, and is not there"):
        given.proof.conclude()


def test_log_ends_before_a_received_message():
    given = Given().post(0, 0)
    given.give(0, 1, 2)
    with pytest.raises(Violation, match="the newest message that client 1 can read is abcd-1: abcd-2 is lost"):
        given.proof.check_newest_page(given.readers[1], Id("abcd", 1))
    given.proof.check_newest_page(given.readers[1], Id("efgh", 1))


def test_fresh_start_in_the_same_log():
    given = Given().post(0, 0)
    given.give(0, 1)
    with pytest.raises(Violation, match="client 0 had abcd-1 and had to start over at abcd-2"):
        given.begin(0, 2, given.log[1])


def test_new_log_loses_posts_that_it_does_not_hold():
    given = Given().post(0, 1, 0, 1)
    for reader in range(3):
        given.give(reader, 1, 2, 3, 4)
    for poster, place, number in ((0, 0, 1), (1, 0, 2), (0, 1, 3)):
        given.ack(poster, place, number)
    assert given.proof.lost == 0
    del given.log[1:]  # what is left; and one is posted again
    given.log.append(Entry(2, given.proof.username(1), given.proof.text(1, 1), TIME))
    for reader in range(3):
        given.begin(reader, 2, *given.log, epoch="efgh")
    given.ack(1, 1, 2, epoch="efgh")
    assert (given.proof.fresh_starts, given.proof.logs_lost, given.proof.lost) == (3, 1, None)
    assert given.proof.unread() is None
    with pytest.raises(Violation, match="the log abcd is lost, with 2 acknowledged messages: now there is efgh"):
        given.proof.conclude()
    assert given.proof.lost == 2


def test_second_new_log_loses_posts_of_both():
    given = Given().post(0, 0)
    given.give(0, 1)
    given.ack(0, 0, 1)
    for reader in range(3):
        given.begin(reader, 0, epoch="efgh")
    second = given.log[1]._replace(number=1)
    given.proof.check_entries(given.readers[0], [second])
    given.ack(0, 1, 1, epoch="efgh")
    for reader in range(3):
        given.begin(reader, 1, second, epoch="ijkl")
    with pytest.raises(
        Violation, match="the log abcd and efgh is lost, with 1 acknowledged messages: now there is ijkl"
    ):
        given.proof.conclude()


def test_unread_part_of_a_new_log_is_read_back():
    given = Given().post(*[0] * 9)
    given.give(0, *range(1, 10))
    for place in range(8):
        given.ack(0, place, place + 1)
    for reader in range(3):
        given.begin(reader, 7, given.log[6], epoch="efgh")
    assert given.proof.unread() == Id("efgh", 7)
    with pytest.raises(Violation, match="client 1 received efgh-5 as the one before efgh-7"):
        given.proof.check_older_page(given.readers[1], History(Id("efgh", 5), given.log[3:5]))
    given.proof.check_older_page(given.readers[0], History(Id("efgh", 6), given.log[3:6], more=True))
    assert given.proof.unread() == Id("efgh", 4)
    given.proof.check_older_page(given.readers[0], History(Id("efgh", 3), given.log[:3]))
    assert given.proof.unread() is None
    with pytest.raises(Violation, match="with 1 acknowledged messages"):
        given.proof.conclude()


def test_entries_read_back_must_match_the_posts():
    given = Given(lenient=True).post(0, 0)
    given.begin(0, 2, given.log[1], epoch="efgh")
    with pytest.raises(Violation, match="efgh-1, as client 0 received it, is post 1 of client 0 a second time"):
        given.proof.check_older_page(given.readers[0], History(Id("efgh", 1), [given.log[1]._replace(number=1)]))


def test_nothing_is_read_back_without_a_lost_log():
    proof = Proof("run", 1, 1)
    proof.check_history(proof.readers[0], History(Id("abcd", 9), []))
    assert proof.unread() is None
    assert (proof.logs_lost, proof.fresh_starts) == (0, 0)


def test_ack_from_a_new_log_may_precede_its_history():
    given = Given(lenient=True).post(0, 0)
    given.ack(0, 0, 1, epoch="efgh", duplicate=True)
    given.ack(0, 1, 7, epoch="efgh", duplicate=True)
    assert not given.proof.is_level(given.readers[0])
    for reader in range(3):
        given.begin(reader, 7, given.log[1]._replace(number=7), epoch="efgh")
    with pytest.raises(Violation, match="post 0 of client 0 was acknowledged as efgh-1, and is not there"):
        given.proof.conclude()
    given.proof.check_older_page(given.readers[0], History(Id("efgh", 6), [given.log[0]._replace(number=1)]))
    given.proof.conclude()
    assert given.proof.lost == 0


def test_ack_of_an_older_entry_of_a_new_log():
    """The entry that is read back must have the acknowledged number."""
    given = Given(lenient=True).post(0)
    given.begin(0, 7, epoch="efgh")
    given.ack(0, 0, 3, epoch="efgh", duplicate=True)
    with pytest.raises(Violation, match=r"efgh-2, .* is post 0 of client 0, acknowledged as efgh-3"):
        given.proof.check_older_page(given.readers[0], History(Id("efgh", 7), [given.log[0]._replace(number=2)]))


def test_ack_from_a_lost_log_is_found():
    given = Given(lenient=True).post(0)
    given.give(0, 1)
    given.begin(0, 0, epoch="efgh")
    for duplicate in (False, True):
        with pytest.raises(Violation, match="was acknowledged as abcd-1, of another log than efgh"):
            given.ack(0, 0, 1, duplicate=duplicate)


def test_newest_page_may_come_from_a_new_log():
    given = Given(lenient=True)
    assert given.proof.is_level(given.readers[1])
    given.proof.check_newest_page(given.readers[0], Id("efgh", 1))
    assert not any(map(given.proof.is_level, given.readers))
    assert given.proof.logs_lost == 1


def test_lost_log_must_not_return():
    given = Given(lenient=True)
    for reader in range(3):
        given.begin(reader, 0, epoch="efgh")
    given.proof.forget()
    with pytest.raises(Violation, match="the log abcd, which was lost, has replaced efgh"):
        given.begin(0, 0)


def test_lenient_proof_accepts_a_new_log():
    """The lost log takes no memory once every client has left it."""
    given = Given(lenient=True).post(0, 0)
    lost = weakref.ref(given.proof.log)
    given.give(0, 1)
    given.ack(0, 0, 1)
    given.give(1, 1, 2)
    given.begin(0, 1, given.log[1]._replace(number=1), epoch="efgh")
    given.ack(0, 1, 1, epoch="efgh")
    given.proof.forget()
    assert [given.proof.is_level(reader) for reader in given.readers] == [True, False, False]
    for reader in (1, 2):
        given.begin(reader, 1, given.log[1]._replace(number=1), epoch="efgh")
    given.proof.forget()
    assert all(map(given.proof.is_level, given.readers))
    assert lost() is None
    assert given.proof.logs_lost == 1
    given.proof.conclude()


def test_forget_keeps_a_log_without_readers():
    proof = Proof("run", 2, 1, lenient=True)
    proof.check_history(proof.readers[0], History(Id("abcd", 0), []))
    proof.readers[0].log = None
    proof.forget()
    assert proof.log.epoch == "abcd"


def test_forgetting_waits_for_readers_that_have_yet_to_join():
    """A client that joins late receives what the others did, or the proof fails."""
    proof = Proof("run", 2, 1)
    old = [Entry(number, "ann", "hi", TIME) for number in (1, 2)]
    proof.check_history(proof.readers[0], History(Id("abcd", 2), old))
    proof.forget()
    with pytest.raises(Violation, match="client 1 received ann: 'invented'"):
        proof.check_history(proof.readers[1], History(Id("abcd", 2), [old[0]._replace(message="invented"), old[1]]))


def test_forgetting_waits_for_readers_of_an_older_log():
    given = Given(lenient=True).post(0)
    given.begin(0, 1, given.log[0], epoch="efgh")
    given.begin(1, 1, given.log[0], epoch="efgh")
    given.proof.forget()
    with pytest.raises(Violation, match="client 2 received ann: 'hi'"):
        given.begin(2, 1, Entry(1, "ann", "hi", TIME), epoch="efgh")


def test_acknowledged_posts_missing_from_a_log_are_named():
    given = Given().post(0, 0, 1)
    given.give(0, 1, 2, 3)
    given.give(1, 1, 2, 3)
    given.ack(0, 0, 1)
    given.ack(1, 0, 3)
    assert given.proof.missing_from(given.log) == []
    assert given.proof.missing_from(given.log[:2]) == [given.log[2].message]
    other = given.log[0]._replace(message=given.log[1].message)
    assert given.proof.missing_from([other, given.log[2]]) == [given.log[0].message]


def test_texts_have_the_requested_size():
    proof = Proof("run", 1, 1, size=100)
    assert len(proof.text(0, 7)) == 100
    assert proof.place(proof.text(0, 7)) == 7


def test_messages_from_before_the_run_are_no_posts():
    proof = Proof("run", 2, 1)
    old = [Entry(number, "ann", "hi", TIME) for number in (8, 9)]
    proof.check_history(proof.readers[0], History(Id("abcd", 9), old, more=True))
    proof.forget()
    proof.check_history(proof.readers[1], History(Id("abcd", 9), old, more=True))
    assert (proof.others, proof.delivered) == (2, 4)
    assert all(map(proof.is_level, proof.readers))


@pytest.mark.parametrize("kind", ["drop", "double", "swap", "alter", "exchange"])
@pytest.mark.parametrize("seed", range(5))
def test_one_fault_in_a_hundred_thousand_deliveries(kind, seed):
    chance = random.Random(seed)
    proof = Proof("run", 100, 10)
    log = []
    for number in range(1, 1001):
        poster = chance.randrange(10)
        log.append(Entry(number, proof.username(poster), proof.post(poster)[1], TIME))
    streams = [[*log] for _ in proof.readers]
    victim, place = chance.randrange(100), chance.randrange(999)
    stream = streams[victim]
    if kind == "drop":
        del stream[place]
    elif kind == "double":
        stream.insert(place, stream[place])
    elif kind == "swap":
        stream[place : place + 2] = stream[place + 1], stream[place]
    elif kind == "alter":
        stream[place] = stream[place]._replace(message=stream[place].message[:-1])
    else:
        one, two = stream[place : place + 2]
        stream[place : place + 2] = two._replace(number=one.number), one._replace(number=two.number)
    for reader in proof.readers:
        proof.check_history(reader, History(Id("abcd", 0), []))

    def deliver():
        for number in range(0, 1000, 50):
            for reader in chance.sample(proof.readers, 100):
                proof.check_entries(reader, streams[reader.number][number : number + 50])

    with pytest.raises(Violation) as fault:
        deliver()
    assert any(f"abcd-{place + number}" in str(fault.value) for number in (0, 1, 2))
