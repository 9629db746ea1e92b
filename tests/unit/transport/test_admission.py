"""Admission of clients to rooms, and rate limits."""

from http import HTTPStatus
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.helpers import REPEATABLE, ManualTime, count_held

from chatd.messages import Id
from chatd.transport import admission
from chatd.transport.admission import (
    MAX_HOSTS,
    Addresses,
    Admission,
    HttpError,
    JoinRequest,
    Rate,
    check_operator,
    last_id,
    network,
    origin_pattern,
    read_query,
    room_pattern,
)

NOBODY = frozenset()


def asked_room(target, origin=None, *, rooms=(), origins=()):
    """Return the JoinRequest of a path, under rules as they are on the command line."""
    rules = Admission([room_pattern(text) for text in rooms], [origin_pattern(text) for text in origins])
    path, _, query = target.partition("?")
    rules.check_origin(origin, "host.example")
    return rules.join_request(path, read_query(query))


def refusal(target, origin=None, **rules):
    with pytest.raises(HttpError) as refused:
        asked_room(target, origin, **rules)
    assert "\n" not in str(refused.value)
    assert refused.value.code is None
    return refused.value.status


# Rooms


@pytest.mark.parametrize(
    ("path", "room"),
    [
        ("/", "main"),
        ("/rooms/main", "main"),
        ("/rooms/a", "a"),
        ("/rooms/0", "0"),
        ("/rooms/team-1_b", "team-1_b"),
        ("/rooms/a-", "a-"),
        ("/rooms/" + 64 * "a", 64 * "a"),
    ],
)
def test_path_names_a_room(path, room):
    assert asked_room(path) == JoinRequest(room, None, NOBODY, None)


@pytest.mark.parametrize(
    "path",
    [
        *("", "/rooms", "/rooms/", "/rooms//", "/rooms/main/", "//rooms/main", "/main", "/x/rooms/main", "main"),
        *("/rooms/..", "/rooms/.", "/rooms/../main", "/rooms/a/b", "/rooms/a.b", "/rooms/main;x", "/rooms/main\n"),
        *("/rooms/%2f", "/rooms/%6dain", "/rooms/%2e%2e", "/rooms/m%00", "/%72ooms/main", "/rooms/a%20b"),
        *("/rooms/Main", "/rooms/MAIN", "/ROOMS/main", "/Rooms/main"),
        *("/rooms/m%d0%b0in", "/rooms/m\N{CYRILLIC SMALL LETTER A}in", "/rooms/\N{FULLWIDTH LATIN SMALL LETTER M}ain"),
        *("/rooms/-a", "/rooms/_a", "/rooms/" + 65 * "a", "/rooms/\N{ARABIC-INDIC DIGIT THREE}", "/rooms/*"),
    ],
)
def test_any_other_path_is_404(path):
    assert refusal(path) == HTTPStatus.NOT_FOUND


@pytest.mark.parametrize(
    ("patterns", "yes", "no"),
    [
        (["main"], ["main"], ["main2", "xmain", "mai"]),
        (["team-*"], ["team-", "team-1", "team-a-b"], ["team", "xteam-1", "main"]),
        (["a?"], ["ab", "a-"], ["a", "abc"]),
        (["main", "team-*"], ["main", "team-1"], ["other"]),
        (["*"], ["main", "x"], []),
    ],
)
def test_allowed_rooms(patterns, yes, no):
    for name in yes:
        assert asked_room(f"/rooms/{name}", rooms=patterns).room == name
    for name in no:
        assert refusal(f"/rooms/{name}", rooms=patterns) == HTTPStatus.NOT_FOUND


def test_root_without_room_main():
    """The path / is refused when the patterns exclude the room main."""
    assert refusal("/", rooms=["team-*"]) == HTTPStatus.NOT_FOUND
    assert asked_room("/", rooms=["ma*"]).room == "main"


def test_pattern_widens_no_rule_of_names():
    for path in ("/rooms/A", "/rooms/..", "/rooms/-a", "/rooms/" + 65 * "a"):
        assert refusal(path, rooms=["*"]) == HTTPStatus.NOT_FOUND


@pytest.mark.parametrize(
    "text", ["", "Team-*", "a b", "[ab]", "a/b", "rooms/a.b", "\N{CYRILLIC SMALL LETTER A}", "a\n"]
)
def test_what_is_no_pattern_of_room_names_is_said(text):
    with pytest.raises(ValueError, match="is not a pattern of room names such as team-"):
        room_pattern(text)


# Origins


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        (
            "https://chat.example",
            ["https://chat.example"],
            [
                *(
                    "http://chat.example",
                    "https://chat.example:8443",
                    "https://a.chat.example",
                    "https://xchat.example",
                ),
                *("https://chat-example", "https://chatxexample", "https://chat.example.attacker.net", "null", ""),
                *("https://chat.example/", "https://chat.example\n", " https://chat.example", "https://chat.exampl"),
                *("wss://chat.example", "https://chat.example@evil.net", "https://evil.net#https://chat.example"),
            ],
        ),
        ("http://localhost:3000", ["http://localhost:3000"], ["http://localhost", "http://localhost:30000"]),
        (
            "*.example.org",
            ["https://a.example.org", "http://a.example.org", "https://a.b-c.example.org", "https://1.example.org"],
            [
                *("https://example.org", "https://xexample.org", "https://evil.example.org.attacker.net", "null", ""),
                *("https://a.example.org:8443", "https://a.examplexorg", "https://.example.org@evil.net"),
                *(
                    "ftp://a.example.org",
                    "https://evil.net/.example.org",
                    "https://evil.net?.example.org",
                    "a.example.org",
                ),
                *("https://evil.net#.example.org", "https://evil.net:1.example.org", "https://a.example.org\n"),
                *(
                    "https://a.example.org/",
                    "https://\N{CYRILLIC SMALL LETTER A}.example.org",
                    "xhttps://a.example.org",
                ),
            ],
        ),
        ("https://*.example.org", ["https://a.example.org"], ["http://a.example.org", "https://example.org"]),
        ("http://*.example.org", ["http://a.example.org"], ["https://a.example.org"]),
        (
            "*.example.org:8443",
            ["https://a.example.org:8443", "http://a.example.org:8443"],
            ["https://a.example.org", "https://a.example.org:84430", "https://a.example.org:443"],
        ),
        ("https://*.example.org:8443", ["https://a.example.org:8443"], ["http://a.example.org:8443"]),
        ("HTTPS://Chat.EXAMPLE", ["https://chat.example"], ["https://other.example"]),
        ("*.EXAMPLE.org", ["https://a.example.org"], ["https://xexample.org"]),
        ("null", ["null"], ["", "nullx", "https://null", "http://chat.example"]),
    ],
)
def test_page_may_connect_if_its_origin_is_the_operators(pattern, yes, no):
    for origin in yes:
        assert asked_room("/", origin, origins=[pattern]).room == "main"
    for origin in no:
        assert refusal("/", origin, origins=[pattern]) == HTTPStatus.FORBIDDEN, origin


def test_one_of_several_origins_is_enough():
    rules = {"origins": ["https://a.example", "*.b.example"]}
    for origin in ("https://a.example", "https://x.b.example"):
        assert asked_room("/", origin, **rules)
    assert refusal("/", "https://c.example", **rules) == HTTPStatus.FORBIDDEN


def test_requests_without_origin_are_allowed():
    assert asked_room("/", None, origins=["https://chat.example"])


def test_every_page_may_connect_by_a_star():
    for origin in ("https://anything.example", "null", "nonsense", "", None):
        assert asked_room("/", origin, origins=["null", "*"])
    assert Admission(origins=[origin_pattern("*")]).any_origin
    assert not Admission(origins=[origin_pattern("null")]).any_origin
    assert not Admission().any_origin


SAME_HOST = [
    ("https://chat.example", "chat.example"),
    ("https://chat.example", "chat.example:443"),
    ("https://chat.example:443", "chat.example"),
    ("http://chat.example", "Chat.Example:80"),
    ("http://chat.example:8085", "chat.example:8085"),
    ("http://localhost:8085", "localhost:8085"),
    ("http://[::1]:8085", "[::1]:8085"),
    ("http://192.0.2.1", "192.0.2.1"),
    ("capacitor://localhost", "localhost"),
]
FOREIGN = [
    ("https://chat.example", "evil.example"),
    ("https://chat.example.evil.example", "chat.example"),
    ("https://chat.example:8443", "chat.example"),
    ("https://chat.example", "chat.example:80"),
    ("http://localhost:3000", "localhost:8085"),
    ("https://evil.example", None),
    ("https://evil.example", ""),
    ("https://evil.example@chat.example", "chat.example"),
    ("https://chat.example/", "chat.example"),
    ("https://chat.example, https://chat.example", "chat.example"),
    ("chat.example", "chat.example"),
    ("null", "null"),
    ("null", "chat.example"),
    ("", "chat.example"),
    ("%%%", "chat.example"),
]


def refuses(rules, *hosts):
    """Return whether a page is refused, always with the same status."""
    try:
        rules.check_origin(*hosts)
    except HttpError as refused:
        return refused.status == HTTPStatus.FORBIDDEN
    return False


@pytest.mark.parametrize("case", SAME_HOST + FOREIGN)
def test_page_of_the_same_host(case):
    """By default, pages of the host that the request names may connect, and no others."""
    origin, host = case
    for rules in (Admission(), Admission(proxied=True)):
        assert refuses(rules, origin, host) == (case in FOREIGN)
        assert not refuses(rules, None, host)


@pytest.mark.parametrize("forwarded", ["chat.example", "a.example, chat.example", "chat.example,10.0.0.1:80"])
def test_host_that_a_proxy_forwards(forwarded):
    """Behind trusted proxies, pages may also be of a host that a proxy names."""
    asked = "https://chat.example", "backend:8085", forwarded
    assert not refuses(Admission(proxied=True), *asked)
    assert refuses(Admission(), *asked)
    assert refuses(Admission(proxied=True), "https://evil.example", *asked[1:])
    assert refuses(Admission(proxied=True, origins=[origin_pattern("https://other.example")]), *asked)


@pytest.mark.parametrize(("before", "behind", "allowed"), [(9999, MAX_HOSTS - 1, True), (0, MAX_HOSTS, False)])
def test_many_forwarded_hosts(before, behind, allowed):
    """The last names count, which proxies have added, so that a client cannot make each request expensive."""
    names = ",".join(["x"] * before + ["chat.example"] + ["x"] * behind)
    assert refuses(Admission(proxied=True), "https://chat.example", "internal:8085", names) is not allowed


OWN = "host.chat.com"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "localhost"},
        {"host": "localhost:8086"},
        {"host": "127.0.0.1:8086"},
        {"host": "[::1]:8086"},
        {"host": "192.0.2.1"},
        {"host": "chatd-1:8086"},
        {"host": "chatd-1.internal:8086"},
        {"host": "chatd.ns.svc.cluster.local"},
        {"host": "Host.Chat.Com:8086"},
        {"host": "localhost:8086", "origin": "http://localhost:8086", "sec-fetch-site": "same-origin"},
        {"host": "localhost:8086", "sec-fetch-site": "none"},
    ],
)
def test_operator_may_use_the_admin_port(headers):
    check_operator(headers, OWN)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.com"},
        {"host": "evil.com:8086"},
        {"host": "127.0.0.1.evil.com"},
        {"host": "127.1"},
        {"host": "chatd.internal.evil.com"},
        {"host": "localhost."},
        {"host": "a.host.chat.com"},
        {"host": "evil.com@localhost"},
    ],
)
def test_foreign_host_on_the_admin_port(headers):
    """A page that made its own name resolve to this machine sends that name; scripts learn what to send."""
    with pytest.raises(HttpError, match=r"send Host: localhost$") as refused:
        check_operator(headers, OWN)
    assert refused.value.status == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "origin": "http://localhost:8086"},
        {"sec-fetch-site": "none, cross-site"},
    ],
)
def test_page_on_the_admin_port(headers):
    """No other page may use it, of whatever origin."""
    with pytest.raises(HttpError, match=r"^no web page may use the admin port$") as refused:
        check_operator({"host": "localhost:8086"} | headers, OWN)
    assert refused.value.status == HTTPStatus.FORBIDDEN


def test_page_elsewhere_does_not_learn_which_rooms_there_are():
    assert refusal("/nowhere", "https://evil.example", origins=["null"]) == HTTPStatus.FORBIDDEN


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "**",
            "chat.example",
            "https://",
            "https://chat.example/",
            "https://chat.example/x",
            "https://a*.example",
        ),
        *(
            "wss://chat.example",
            "https://chat.example:",
            "https://chat.example:x",
            "*.",
            "*example",
        ),
        *("https://a.*.example", "https://chat.example\n", "https://a b", "*.example.org,*.example.net", "nullx"),
    ],
)
def test_what_is_no_origin_is_said(text):
    with pytest.raises(ValueError, match="is not an origin such as https://chat"):
        origin_pattern(text)


# The query


def test_what_is_asked_for_is_read():
    assert asked_room("/rooms/a?last_event_id=k7Q2-1042&events=presence,typing&username=ann") == JoinRequest(
        "a", Id("k7Q2", 1042), frozenset({"presence", "typing"}), "ann"
    )


@pytest.mark.parametrize(
    "query", ["", "last_event_id=&events=&username=", "last_event_id", "colour=red&colour=%00", "&&", "LAST_EVENT_ID=x"]
)
def test_what_is_empty_or_unknown_is_not_asked_for(query):
    assert asked_room(f"/?{query}") == JoinRequest("main", None, NOBODY, None)


def test_last_of_repeated_parameters_counts():
    asked = asked_room(
        "/?last_event_id=nonsense&last_event_id=k7Q2-1&events=nonsense&events=typing&username=ann&username=bob"
    )
    assert asked == JoinRequest("main", Id("k7Q2", 1), frozenset({"typing"}), "bob")


@pytest.mark.parametrize("number", ["0", "1", "9" * 16])
@pytest.mark.parametrize("epoch", ["k7Q2", "0123456789abcDEF"])
def test_id_of_the_last_message_is_an_epoch_and_a_number(epoch, number):
    assert asked_room(f"/?last_event_id={epoch}-{number}").last == Id(epoch, int(number))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "1042",
            "k7Q2",
            "k7Q2-",
            "-1",
            "k7Q2--1",
            "k7Q2-01",
            "k7Q2-1.0",
            "k7Q2-1x",
            "k7Q2_1",
            "k7Q2-1-1",
            "k7Q2-%2b1",
        ),
        *("k7Q-1", "0123456789abcDEFx-1", "k7Q2-" + "9" * 17, "k7Q2-%d9%a3", "k7%d0%90-1", "k7Q2-1%0a", "k7Q2-1+"),
        *("%20k7Q2-1", "null", "k7Q2-1%00"),
    ],
)
def test_malformed_id_is_400(text):
    assert refusal(f"/?last_event_id={text}") == HTTPStatus.BAD_REQUEST


def test_id_that_is_no_query_is_read_alike():
    assert last_id("k7Q2-3") == Id("k7Q2", 3)
    assert last_id(None) is None
    assert last_id("") is None
    with pytest.raises(HttpError, match="last_event_id: an id is an epoch and a number, such as "):
        last_id("nonsense")


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("presence", {"presence"}),
        ("typing,presence", {"presence", "typing"}),
        ("typing,typing", {"typing"}),
        ("presence%2Ctyping", {"presence", "typing"}),
    ],
)
def test_events_are_chosen_by_name(text, events):
    assert asked_room(f"/?events={text}").events == events


@pytest.mark.parametrize(
    "text", ["x", "presence,x", "presence,", ",", "Presence", "presence%20", "presence;typing", "*"]
)
def test_unknown_events_are_400(text):
    assert refusal(f"/?events={text}") == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(
    ("text", "username"),
    [
        ("a", "a"),
        (30 * "a", 30 * "a"),
        (30 * "%F0%9F%91%8B", 30 * "\N{WAVING HAND SIGN}"),
        ("%D0%90%D0%BB%D0%B8%D1%81%D0%B0", "Алиса"),
        ("ann+b%20c", "ann b c"),
        ("a%26b%3Dc", "a&b=c"),
    ],
)
def test_username_of_a_join_request(text, username):
    """A username is 1 to 30 code points of percent-encoded UTF-8."""
    assert asked_room(f"/?username={text}").username == username


@pytest.mark.parametrize("text", [31 * "a", 31 * "%F0%9F%91%8B", "%FF", "%D0", "%ED%A0%80", "a%C0%80"])
def test_any_other_username_is_400(text):
    assert refusal(f"/?username={text}") == HTTPStatus.BAD_REQUEST


def test_query_that_is_not_utf_8_is_400_whatever_key_it_is_in():
    for query in ("x=%FF", "%FF=x", "last_event_id=%FF"):
        assert refusal(f"/?{query}") == HTTPStatus.BAD_REQUEST


# The rate limit


def paced():
    return SimpleNamespace(due=0.0)


def burst(rate, who, most=1000):
    """Return the number of frames that are allowed at once."""
    return next(number for number in range(most) if rate.take(who))


@pytest.mark.parametrize("size", [1, 2, 40])
@pytest.mark.parametrize("a_second", [1, 3, 7, 20, 1000])
def test_burst_then_steady_rate(a_second, size):
    """A burst is allowed at once, and then one frame per interval."""
    now = ManualTime()
    rate, who = Rate(a_second, size, now), paced()
    assert burst(rate, who) == size
    for _ in range(3 * size):
        wait = rate.take(who)
        assert wait == pytest.approx(1 / a_second, abs=2e-5)
        now.advance(wait / 2)
        assert rate.take(who)
        now.advance(wait / 2)
        assert burst(rate, who) == 1


def test_burst_recovers_after_idle_time():
    """An idle client has its whole burst again, and no more."""
    now = ManualTime()
    rate, who = Rate(2, 5, now), paced()
    assert burst(rate, who) == 5
    now.advance(1)
    assert burst(rate, who) == 2
    now.advance(1_000_000)
    assert burst(rate, who) == 5


def test_asking_too_early_costs_nothing():
    now = ManualTime()
    rate, who = Rate(1, 1, now), paced()
    assert rate.take(who) == 0.0
    for _ in range(100):
        assert rate.take(who) == pytest.approx(1)
    now.advance(1)
    assert rate.take(who) == 0.0


def test_each_has_a_burst_of_its_own():
    rate = Rate(1, 3, ManualTime())
    assert [burst(rate, paced()) for _ in range(2)] == [3, 3]


def test_burst_of_none_is_one():
    assert burst(Rate(1, 0, ManualTime()), paced()) == 1


def test_clock_that_begins_at_zero_will_do():
    assert burst(Rate(1, 3, ManualTime(0.0)), paced()) == 3


def test_rate_after_the_clock_is_set_back():
    """No client waits longer than for one frame after the clock is set back."""
    now = ManualTime()
    rate, who = Rate(20, 40, now), paced()
    burst(rate, who)
    now.advance(-3600)
    assert rate.take(who) <= 1 / 20 + 1e-5


@REPEATABLE
@given(
    a_second=st.integers(1, 100),
    size=st.integers(1, 50),
    pauses=st.lists(st.floats(0, 2), min_size=1, max_size=60),
)
def test_rate_holds_over_every_interval(a_second, size, pauses):
    """No interval allows more frames than the burst and the rate."""
    now = ManualTime()
    rate, who = Rate(a_second, size, now), paced()
    taken = []
    for pause in pauses:
        now.advance(pause)
        taken += [now() for _ in range(10) if not rate.take(who)]
    for first, begin in enumerate(taken):
        for last, end in enumerate(taken[first:], first):
            assert last - first + 1 <= size + (end - begin) * a_second + 0.01


# Addresses


@pytest.fixture
def now():
    return ManualTime()


@pytest.fixture
def addresses(now):
    """A function that makes Addresses behind this many proxies; each address may send one frame a second."""
    return lambda hops: Addresses(Rate(1, 1, now), hops, now)


def test_each_address_has_a_rate_of_its_own(addresses, now):
    limit = addresses(0)
    assert limit.take("192.0.2.1", None) == 0.0
    assert limit.take("192.0.2.1", None) == pytest.approx(1)
    assert limit.take("192.0.2.2", None) == 0.0
    now.advance(1)
    assert limit.take("192.0.2.1", None) == 0.0


def test_addresses_without_a_rate(now):
    """Without a rate there is no limit, and no address is stored."""
    limit = Addresses(None, 0, now)
    assert {limit.take("192.0.2.1", None) for _ in range(100)} == {0.0}
    assert count_held(limit) == 0


@pytest.mark.parametrize(
    ("hops", "forwarded", "address"),
    [
        (0, None, "peer"),
        (0, "203.0.113.9", "peer"),
        (1, None, "peer"),
        (1, "", "peer"),
        (1, "203.0.113.9", "203.0.113.9"),
        (1, "spoofed, 203.0.113.9", "203.0.113.9"),
        (1, "spoofed,spoofed ,  203.0.113.9 ", "203.0.113.9"),
        (2, None, "peer"),
        (2, "spoofed", "peer"),
        (2, "203.0.113.9, 198.51.100.1", "203.0.113.9"),
        (2, "spoofed, 203.0.113.9, 198.51.100.1", "203.0.113.9"),
    ],
)
def test_only_trusted_proxies_count_in_forwarded(addresses, hops, forwarded, address):
    limit = addresses(hops)
    assert limit.take("peer", forwarded) == 0.0
    limited = [name for name in ("peer", "spoofed", "203.0.113.9", "198.51.100.1") if limit.take(name, None)]
    assert limited == [address]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("203.0.113.9:4711", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("[::ffff:203.0.113.9]:4711", "203.0.113.9"),
        ("::ffff:cb00:7109", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:DB8:1:2::7", "2001:db8:1:2::"),
        ("[2001:db8:1:2::7]", "2001:db8:1:2::"),
        ("[2001:db8:1:2::7]:4711", "2001:db8:1:2::"),
        ("2001:db8:1:3::7", "2001:db8:1:3::"),
        ("fe80::7%eth0", "fe80::"),
        (f"fe80::7%{'e' * 5000}", "fe80::"),
        ("::1", "::"),
        ("", None),
        ("unknown", None),
        ("_hidden", None),
        ("[unknown]", None),
        ("[]:4711", None),
        ("203.0.113", None),
        ("203.0.113.09", None),
        ("203.0.113.9:port", None),
        ("203.0.113.9:", None),
        ("203.0.113.256", None),
        ("203.0.113.9/32", None),
        ("3405803785", None),
        ("x" * 5000, None),
        ("1" * 5000, None),
        ("٣.0.113.9", None),
    ],
)
def test_network_of_an_address(text, found):
    """A rate applies to a host with IPv4 and to a network of 64 bits with IPv6, with or without a port."""
    assert network(text) == found


def test_hosts_of_a_network_share_a_rate(addresses):
    limit = addresses(1)
    assert limit.take("proxy", "2001:db8:1:2::1") == 0.0
    assert limit.take("proxy", "[2001:db8:1:2:ffff::2]:9") == pytest.approx(1)
    assert limit.take("proxy", "2001:db8:1:3::1") == 0.0
    direct = addresses(0)
    assert direct.take("2001:db8:1:2::1", None) == 0.0
    assert direct.take("2001:db8:1:2::2", None) == pytest.approx(1)


def test_forged_addresses_take_no_memory(addresses):
    """What is no address counts as the peer, whatever its length."""
    limit = addresses(1)
    assert limit.take("192.0.2.1", "x" * 5000) == 0.0
    before = count_held(limit)
    for number in range(100):
        assert limit.take("192.0.2.1", f"{number}" * 2500)
    assert count_held(limit) == before
    assert limit.take("unix", "x") == 0.0


def test_client_cannot_forge_its_address(addresses):
    for hops, trusted in ((0, ""), (1, ", 203.0.113.9"), (2, ", 203.0.113.9, 198.51.100.1")):
        limit = addresses(hops)
        assert limit.take("peer", f"first{trusted}") == 0.0
        assert limit.take("peer", f"other{trusted}") == pytest.approx(1)


def test_behind_one_proxy_each_client_has_a_rate_of_its_own(addresses):
    limit = addresses(1)
    assert limit.take("proxy", "203.0.113.9") == 0.0
    assert limit.take("proxy", "203.0.113.10") == 0.0


def test_idle_addresses_are_removed(addresses, now, monkeypatch):
    """Idle addresses are removed when there are many addresses."""
    monkeypatch.setattr(admission, "MAX_ADDRESSES", 10)
    limit = addresses(0)
    for number in range(100):
        limit.take(f"192.0.2.{number}", None)
        now.advance(0.25)
        assert count_held(limit) <= 10


def test_busy_addresses_are_kept(addresses, now, monkeypatch):
    """An address within its limit stays in memory, however many there are."""
    monkeypatch.setattr(admission, "MAX_ADDRESSES", 2)
    limit = addresses(0)
    for number in range(5):
        assert limit.take(f"192.0.2.{number}", None) == 0.0
    assert limit.take("192.0.2.0", None) == pytest.approx(1)


@pytest.mark.parametrize(
    "origin", ["capacitor://localhost", "chrome-extension://abcdefgh", "http://[::1]:3000", "ionic://localhost"]
)
def test_app_or_an_address_may_be_an_origin(origin):
    rules = Admission(origins=[origin_pattern(origin)])
    rules.check_origin(origin, None)
    with pytest.raises(HttpError):
        rules.check_origin(f"{origin}1", None)


def test_address_scans_become_rarer(monkeypatch):
    """The limit for the next scan doubles with the number of busy addresses."""
    monkeypatch.setattr(admission, "MAX_ADDRESSES", 4)
    now, scans = ManualTime(), []
    addresses = Addresses(Rate(1, 1, now), 0, lambda: scans.append(count_held(addresses)) or now())
    for number in range(8):
        assert not addresses.take(str(number), None)
    assert scans == [4]
    now.advance(10)
    addresses.take("another", None)
    assert scans == [4, 8]
    assert count_held(addresses) == 1
    for number in range(4):
        assert not addresses.take(str(number), None)
    assert scans == [4, 8, 4]
