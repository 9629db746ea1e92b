"""Every option of the server, declared once.

The command line, the environment, the configuration file, `--help`, the checks of `--check` and the tables in the
documentation all follow from OPTIONS.  For each option, the command line overrides the environment, which overrides
the file, which overrides the default.

`python -m chatd.config FILE...` rewrites the tables in Markdown files, between their markers.
"""

import argparse
import difflib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, TypeVar
from urllib.parse import urlsplit

from typing_extensions import override

import chatd
from chatd.messages import Entry
from chatd.room.room import MAX_LAG
from chatd.store.base import Retention
from chatd.transport import frames
from chatd.transport.admission import ANY_ORIGIN, origin_pattern, room_pattern
from chatd.transport.frames import MESSAGE, Form, FrameError
from chatd.transport.jwks import KeyFile, check_url
from chatd.transport.keyring import read_jwks, read_key
from chatd.transport.operator_schema import OperatorSchema
from chatd.transport.operator_schema import read_file as read_schema
from chatd.transport.page import TITLE
from chatd.transport.schema_cost import MOST_BYTES
from chatd.transport.static import read_stylesheet
from chatd.webhooks.sender import WebhookAddress
from chatd.webhooks.signature import read_secrets

_T = TypeVar("_T")
HELP: Final = "`chatd serve --help` explains every option"
SEED: Final = Path(chatd.__file__).parent / "seed" / "messages.json"
"""The messages that a new log begins with by default."""
LOG_FORMATS: Final = "text", "json"
MAX_RATE: Final = 1_000_000
MAX_PER_ADDRESS: Final = 1_000_000
MAX_TITLE: Final = 100
"""The most characters of the title of the page."""
SWITCH: Final = {"off": False, "false": False, "0": False, "on": True, "true": True, "1": True}
"""The values of an option that is on or off."""


class ConfigError(Exception):
    """Options that the server cannot start with.  The text is one line that names the option and the remedy."""


# The values


@dataclass(frozen=True)
class Number:
    """A parser of whole numbers within a range."""

    least: int
    most: int

    def __call__(self, text: str) -> int:
        """Parse a number; raise ValueError if it is outside the range."""
        if not text.isascii() or not text.isdigit() or not self.least <= int(text) <= self.most:
            raise ValueError(f"{text!r} is not a whole number from {self.least} to {self.most}")
        return int(text)


def parse_rate(text: str) -> tuple[int, int]:
    """Parse N[:BURST]; the burst is twice the rate unless it is given."""
    rate, colon, burst = text.partition(":")
    number = Number(0, MAX_RATE)
    return number(rate), number(burst) if colon else 2 * number(rate)


def parse_store(url: str, *, password_elsewhere: bool = True) -> str:
    """Check the URL of a store, and return it.

    A Redis URL may name a user without a password only if the password is elsewhere.
    """
    kind, colon, rest = url.partition(":")
    if kind == "sqlite" and re.match(r"//(?!/)", rest):  # SQLite would open a file in the root folder
        path = rest[2:]
        raise ValueError(f"{url!r} has // before its path: write sqlite:{path}, or sqlite:/PATH from the root folder")
    if (kind == "memory" and colon and not rest) or (kind == "sqlite" and rest):
        return url
    if kind not in ("redis", "rediss"):
        raise ValueError(f"{veiled(url)!r} is neither memory: nor sqlite:PATH nor redis://HOST:PORT/DATABASE")
    # Imported late: txredisapi imports the reactor, which twistd may not have installed yet.
    from chatd.store.redis.link import RedisAddress

    try:
        RedisAddress.parse(url, password_elsewhere=password_elsewhere)
    except ValueError as error:
        raise ValueError(f"{veiled(url)!r} {error}") from None
    return url


def veiled(url: str) -> str:
    """Return the URL of a store with its password replaced by asterisks, even if the URL is wrong."""
    if "@" not in url:  # the host is missing: what is no port is a password
        return re.sub(r"(?s)^(rediss?:/*[^:/[]*:)(?![0-9]+(?:/|\Z)).+", r"\1***", url)
    return re.sub(r"(?s)^((?:[^:@]*:/*(?:[^:@/]*:)?)?).*@", r"\1***@", url)


def parse_seed(path: str, message: Form = MESSAGE) -> tuple[Entry, ...]:
    """Read a file of messages for a new log, which fit a form."""
    try:
        return frames.parse_seed(Path(path).read_bytes(), message)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except FrameError as error:
        raise ValueError(f"{path} {error}") from None


def parse_jwks(text: str) -> str:
    """Check the URL of a key set, or the file with one, and return it."""
    if "://" in text:
        return check_url(text)
    if text:
        KeyFile(Path(text), read_jwks)
    return text


def parse_claim(text: str) -> str:
    """Check the name of a claim, and return it."""
    if not text:
        raise ValueError("the name of a claim is empty")
    return text


def parse_cookie(text: str) -> str:
    """Check the name of a cookie, and return it."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]*", text):
        raise ValueError(f"{text!r} is not the name of a cookie")
    return text


def parse_title(text: str) -> str:
    """Check the title of the page, and return it."""
    if not text.strip() or len(text) > MAX_TITLE or not text.isprintable():
        raise ValueError(f"{text!r} is not a title of 1 to {MAX_TITLE} characters in one line")
    return text


def parse_login_url(text: str) -> str:
    """Check the URL at which people get a token, and return it."""
    if not text:
        return text
    try:
        url = urlsplit(text)
        valid = url.scheme in ("http", "https") and url.hostname and url.port != 0 and "@" not in url.netloc
    except ValueError:
        valid = False
    if not valid or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError(f"{text!r} is not a URL such as https://app.example/login")
    return text


def parse_switch(text: str) -> bool:
    """Parse the value of an option that is on or off."""
    if text.lower() not in SWITCH:
        raise ValueError(f"{text!r} is neither on nor off")
    return SWITCH[text.lower()]


def parse_log_format(text: str) -> str:
    """Check the name of a log format, and return it."""
    if text not in LOG_FORMATS:
        raise ValueError(f"{text!r} is neither text nor json")
    return text


def _checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """Return a parser that returns the text itself if `check` accepts it."""

    def parse(text: str) -> str:
        check(text)
        return text

    return parse


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _file(check: Callable[[Path], object]) -> Callable[[str], Path | None]:
    """Return a parser that returns the path of a file if `check` accepts the file."""

    def parse(text: str) -> Path | None:
        path = _path(text)
        if path is not None:
            check(path)
        return path

    return parse


class Settings(NamedTuple):
    """The value of every option."""

    listen: tuple[str, ...]
    """Twisted server endpoints."""
    admin: tuple[str, ...]
    admin_token_file: Path | None
    store: str
    """A URL."""
    store_password_file: Path | None
    seed: tuple[Entry, ...]
    schema: Path | None
    max_message: int
    """Bytes; 0: the schema decides."""
    history: int
    retain: Retention
    rooms: tuple[str, ...]
    """Patterns as `room_pattern` reads them; none: any room."""
    origin: tuple[str, ...]
    """Patterns as `origin_pattern` reads them; none: the server's own host."""
    rate: tuple[int, int]
    """Frames a second, and the burst."""
    max_per_address: int
    """0: no limit."""
    proxy_hops: int
    jwt_key: Path | None
    """A file with a public key or a secret."""
    jwks: str
    """The URL of a key set, or a file with one; empty: none."""
    jwt_audience: str
    jwt_issuer: str
    jwt_username: str
    """The name of a claim."""
    jwt_cookie: str
    title: str
    stylesheet: Path | None
    login_url: str
    """Empty: none."""
    no_page: bool
    webhook: tuple[WebhookAddress, ...]
    webhook_key: Path | None
    """A file with the secrets that sign."""
    compress: bool
    ping: int
    """Seconds."""
    drain: int
    """Seconds."""
    log_format: str
    config: Path | None = None
    """The configuration file that was read."""
    folder: Path = Path()
    """The working directory of the server."""
    message: OperatorSchema | None = None
    """The schema of messages in `schema`."""

    @property
    def proxied(self) -> bool:
        """True if trusted proxies stand before the server."""
        return self.proxy_hops > 0

    @property
    def tokens(self) -> bool:
        """True if clients need tokens."""
        return self.jwt_key is not None or bool(self.jwks)


# The options


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, whether it is given on the command line, in the environment or in a file."""

    name: str
    """Its name on the command line, without dashes in front, and its key in a file."""
    metavar: str
    """Stands for its value; empty for an option that is on or off, and has no value on the command line."""
    default: str
    help: str
    """Its meaning, as a phrase with Markdown's backticks."""
    parse: Callable[[str], Any]
    """Turns a text into the value; raises ValueError for a wrong one."""
    repeated: bool = False
    """True if the option may be given several times; its value is then a tuple."""
    shown: str = ""
    """Stands for the default in the documentation."""

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return f"CHATD_{self.name.upper().replace('-', '_')}"

    @property
    def field(self) -> str:
        """Its name in Settings."""
        return self.name.replace("-", "_")

    @property
    def meaning(self) -> str:
        """The help with the range, and whether the option may be repeated."""
        allowed = f", {self.parse.least} to {self.parse.most}" if isinstance(self.parse, Number) else ""
        return f"{self.help}{allowed}" + ("; may be repeated" if self.repeated else "")

    def split(self, text: str) -> list[str]:
        """Split a text from the environment: white space separates the values of a repeated option."""
        return text.split() if self.repeated else [text]

    def from_toml(self, value: object) -> list[str]:
        """Return the texts of a value in a file; raise ValueError if it has the wrong type."""
        items = value if self.repeated else [value]
        scalar = str if self.repeated else (str, int)
        if not isinstance(items, list) or not all(
            isinstance(item, scalar) and isinstance(item, bool) <= (not self.metavar) for item in items
        ):
            raise ValueError(f"the value has the wrong type: write a line like {self.toml}")
        return [str(item) for item in items]

    @property
    def toml(self) -> str:
        """A line of a file that sets the default, or an example if the default cannot be written."""
        text = self.metavar if self.shown and not self.repeated else self.default
        if not self.metavar:
            return f"{self.name} = {text}"
        value = text.split() if self.repeated else int(text) if isinstance(self.parse, Number) else text
        return f"{self.name} = {json.dumps(value)}"

    @property
    def usage(self) -> str:
        """Its form on the command line."""
        return f"--{self.name} {self.metavar}".rstrip()


OPTIONS: Final = (
    Option(
        name="listen",
        metavar="ENDPOINT",
        default="tcp:8085:backlog=4096",
        help="listen for clients at a Twisted server endpoint, such as `tcp:8085` or "
        "`ssl:443:privateKey=key.pem:certKey=cert.pem`",
        parse=str,
        repeated=True,
    ),
    Option(
        name="admin",
        metavar="ENDPOINT",
        default="tcp:8086:interface=127.0.0.1",
        help="listen for operators: `/healthz`, `/readyz`, `/metrics`, `POST /drain`, and moderation; empty: no admin "
        "port",
        parse=str,
        repeated=True,
    ),
    Option(
        name="admin-token-file",
        metavar="FILE",
        default="",
        help="ask for the bearer token in a file on the admin port, except for `/healthz` and `/readyz`",
        parse=_path,
        shown="none",
    ),
    Option(
        name="store",
        metavar="URL",
        default="sqlite:chatd.sqlite",
        help="store messages in `sqlite:PATH`; in `redis[s]://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE]`, which many "
        "nodes can share; or in `memory:`, which loses them on exit",
        parse=parse_store,
    ),
    Option(
        name="store-password-file",
        metavar="FILE",
        default="",
        help="read the password for Redis from a file",
        parse=_path,
        shown="none",
    ),
    Option(
        name="seed",
        metavar="FILE",
        default=str(SEED),
        help="begin a new log with the messages in a file, which is a JSON list",
        parse=str,
        shown="two messages",
    ),
    Option(
        name="schema",
        metavar="FILE",
        default="",
        help="check messages with a JSON Schema (2020-12) of your own, which may have further fields and other limits",
        parse=_path,
        shown="none",
    ),
    Option(
        name="max-message",
        metavar="BYTES",
        default="0",
        help="limit the size of a message as clients send it; 0: the longest of `--schema`, but at least 16384",
        parse=Number(0, MOST_BYTES),
    ),
    Option(
        name="history",
        metavar="N",
        default="100",
        help="number of messages in a client's first frame",
        parse=Number(1, MAX_LAG),
    ),
    Option(
        name="retain",
        metavar="N|Nd|all",
        default="all",
        help="keep the newest N messages of each room, or N days of messages, or all; `memory:` keeps at most 10,000 "
        "unless N is given",
        parse=Retention.parse,
    ),
    Option(
        name="rooms",
        metavar="PATTERN",
        default="",
        help="allow only rooms with names like `team-*`; `/` is the room `main`, so include it if `/` should work",
        parse=_checked(room_pattern),
        repeated=True,
        shown="any",
    ),
    Option(
        name="origin",
        metavar="PATTERN",
        default="",
        help="allow only browser pages from `https://chat.example`, `https://*.example`, `*.example`, or from "
        "anywhere: `*`",
        parse=_checked(origin_pattern),
        repeated=True,
        shown="pages of the server's own host",
    ),
    Option(
        name="rate",
        metavar="N[:BURST]",
        default="20:40",
        help="limit frames per second for each connection, and HTTP posts and reads per second for each address; "
        "0: no limit",
        parse=parse_rate,
    ),
    Option(
        name="max-per-address",
        metavar="N",
        default="256",
        help="limit connections of one address, or of one IPv6 network of 64 bits, except those of this machine and of "
        "private networks; 0: no limit",
        parse=Number(0, MAX_PER_ADDRESS),
    ),
    Option(
        name="proxy-hops",
        metavar="N",
        default="0",
        help="number of trusted proxies that add to `X-Forwarded-For`, and may set `X-Forwarded-Host`",
        parse=Number(0, 100),
    ),
    Option(
        name="jwt-key",
        metavar="FILE",
        default="",
        help="ask every client for a token (JSON Web Token), signed with the public key or the secret in a file: a PEM "
        "file allows only asymmetric algorithms, any other file only HS256",
        parse=_file(lambda path: KeyFile(path, read_key)),
        shown="none",
    ),
    Option(
        name="jwks",
        metavar="URL",
        default="",
        help="ask every client for a token, signed with a key of a JSON Web Key Set, at an `https:` URL or in a file",
        parse=parse_jwks,
        shown="none",
    ),
    Option(
        name="jwt-audience",
        metavar="TEXT",
        default="",
        help="accept only tokens for this audience (claim `aud`)",
        parse=str,
        shown="tokens without an audience",
    ),
    Option(
        name="jwt-issuer",
        metavar="TEXT",
        default="",
        help="accept only tokens of this issuer (claim `iss`)",
        parse=str,
        shown="any",
    ),
    Option(
        name="jwt-username",
        metavar="CLAIM",
        default="sub",
        help="the claim of a token that is the username of its posts",
        parse=parse_claim,
    ),
    Option(
        name="jwt-cookie",
        metavar="NAME",
        default="",
        help="also take a token from this cookie; requires `--origin`",
        parse=parse_cookie,
        shown="none",
    ),
    Option(
        name="title",
        metavar="TEXT",
        default=TITLE,
        help="the title of the page for browsers",
        parse=parse_title,
    ),
    Option(
        name="stylesheet",
        metavar="FILE",
        default="",
        help="add a CSS file to the page",
        parse=_file(read_stylesheet),
        shown="none",
    ),
    Option(
        name="login-url",
        metavar="URL",
        default="",
        help="the page sends people who need a token to this URL, with the parameter `return_to`",
        parse=parse_login_url,
        shown="none",
    ),
    Option(
        name="no-page",
        metavar="",
        default="false",
        help="serve no page to chat on: show the instructions of `/about` instead",
        parse=parse_switch,
    ),
    Option(
        name="webhook",
        metavar="URL",
        default="",
        help="post the messages of all rooms to an application at an `https:` or `http:` URL; requires `--webhook-key`",
        parse=WebhookAddress.parse,
        repeated=True,
        shown="none",
    ),
    Option(
        name="webhook-key",
        metavar="FILE",
        default="",
        help="sign what is posted to webhooks with the keys in a file, one `whsec_…` a line",
        parse=_file(read_secrets),
        shown="none",
    ),
    Option(
        name="compress",
        metavar="on|off",
        default="on",
        help="compress messages for clients that offer it (permessage-deflate)",
        parse=parse_switch,
    ),
    Option(
        name="ping",
        metavar="SECONDS",
        default="25",
        help="ping every client this often; clients must answer before the next ping",
        parse=Number(1, 3600),
    ),
    Option(
        name="drain",
        metavar="SECONDS",
        default="30",
        help="time to move all clients to other servers when this one stops",
        parse=Number(0, 3600),
    ),
    Option(
        name="log-format",
        metavar="text|json",
        default="text",
        help="format of the log: one event a line, as text or as a JSON object",
        parse=parse_log_format,
    ),
)
CONFIG: Final = Option(
    name="config",
    metavar="FILE",
    default="",
    help="read options from a TOML file, whose keys are the names of options",
    parse=_path,
    shown="none",
)
CHECK: Final = "check the options and this machine for problems, and exit"


# Reading


class OptionParser(argparse.ArgumentParser):
    """A command line whose errors are ConfigErrors and whose options cannot be abbreviated."""

    def __init__(self) -> None:
        super().__init__(
            prog="chatd serve",
            usage="chatd serve [options]\n       twistd [twistd options] chatd [options]",
            description="A chat-room server over WebSocket that stores every message. Connect with: "
            "npx wscat -c ws://localhost:8085/",
            epilog="Every option that takes a value, and --no-page, can also be given in the environment (CHATD_STORE "
            "for --store, CHATD_NO_PAGE=true) or in the configuration file (store, no-page = true). The command line "
            "overrides the environment, which overrides the file.",
            allow_abbrev=False,
        )
        for option in (*OPTIONS, CONFIG):
            text = f"{option.meaning} [default: {option.shown or option.default}]"
            form: dict[str, Any] = {"action": "append" if option.repeated else "store", "metavar": option.metavar}
            self.add_argument(
                f"--{option.name}",
                dest=option.name,
                help=text.replace("`", "").replace("%", "%%"),
                **(form if option.metavar else {"action": "store_const", "const": "true"}),
            )
        self.add_argument("--check", action="store_true", help=CHECK)
        self.add_argument("--version", action="version", version=f"chatd {chatd.__version__}", help="print the version")

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}: {HELP}")

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """Return what was given for each option, and None for the others."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            word = unknown[0].partition("=")[0]
            if not word.startswith("-"):
                raise ConfigError(f"unexpected argument {veiled(word)!r}: {HELP}")
            options = [f"--{option.name}" for option in (*OPTIONS, CONFIG)]
            raise ConfigError(f"there is no option {word}: {_nearest(word, options) or HELP}")
        return vars(found)


def _nearest(word: str, words: Sequence[str]) -> str:
    """Return a question that names the most similar word, if there is one."""
    near = [one for one in words if len(word) > len("--") and one.startswith(word)]
    near += difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else ""


class Given(NamedTuple):
    """The texts that were given for one option, and where."""

    option: Option
    source: str
    texts: list[str]

    def values(self, parse: Callable[[str], _T]) -> dict[str, _T]:
        """Return the value of each text; raise ConfigError for the first wrong one."""
        found = {}
        for text in self.texts:
            if "\0" in text:
                raise ConfigError(f"{self.source}: the value contains a zero byte: remove it")
            try:
                if text or not self.option.repeated:
                    found[text] = parse(text)
            except ValueError as error:
                # The URL of a store may have been given to another option.
                reason = str(error).replace(text, veiled(text)) if "://" in text else str(error)
                raise ConfigError(f"{self.source}: {reason}") from None
        return found


class Configuration:
    """The options of one server, from every source.  The constructor raises ConfigError."""

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        given = OptionParser().read(words)
        self.check: bool = given["check"]
        """True if `--check` was given: the server then only checks its options."""
        word = given[CONFIG.name]
        path = _path(environ.get(CONFIG.variable, "") if word is None else word)
        file = {} if path is None else read_file(path, CONFIG.variable if word is None else f"--{CONFIG.name}")
        self._given = {option.name: self._pick(option, given[option.name], environ, file) for option in OPTIONS}
        self.settings = self._settings(path)

    @staticmethod
    def _pick(
        option: Option, words: str | list[str] | None, environ: Mapping[str, str], file: dict[str, Given]
    ) -> Given:
        """Return what the source with the highest precedence gives for an option."""
        source = f"--{option.name}"
        if words is not None:
            return Given(option, source, [words] if isinstance(words, str) else words)
        text = environ.get(option.variable)
        if text or (option.repeated and text is not None):
            return Given(option, option.variable, option.split(text))
        return file.get(option.name, Given(option, source, option.split(option.default)))

    def _settings(self, path: Path | None) -> Settings:
        fields: dict[str, Any] = {}
        for given in self._given.values():
            values = tuple(given.values(given.option.parse).values())
            fields[given.option.field] = values if given.option.repeated else values[0]
        most = fields["max_message"]
        (message,) = self.each("schema", lambda text: read_schema(Path(text), most) if text else None).values()
        fields["seed"] = self._seed(MESSAGE if message is None else message.form)
        settings = Settings(**fields, config=path, message=message)
        if not settings.listen:
            raise ConfigError("--listen: give at least one server endpoint such as tcp:8085")
        _check_tokens(settings)
        _check_webhooks(settings)
        if settings.store_password_file is None:
            self.each("store", lambda url: parse_store(url, password_elsewhere=False))
        return settings

    def _seed(self, form: Form) -> tuple[Entry, ...]:
        """Return the seed; none if it is the default, and a schema of the operator's own refuses it."""
        if self._given["seed"].texts == [str(SEED)] and form is not MESSAGE:
            with suppress(ValueError):
                return parse_seed(str(SEED), form)
            return ()
        (seed,) = self.each("seed", lambda text: parse_seed(text, form)).values()
        return seed

    def each(self, name: str, make: Callable[[str], _T]) -> dict[str, _T]:
        """Return what `make` makes of each text of an option; ConfigError if that raises ValueError."""
        return self._given[name].values(make)


def _check_tokens(settings: Settings) -> None:
    """Raise ConfigError for options about tokens that contradict each other."""
    if settings.jwt_key is not None and settings.jwks:
        raise ConfigError("--jwt-key and --jwks: give one of them")
    if settings.tokens:
        if settings.jwt_cookie and (not settings.origin or ANY_ORIGIN in map(origin_pattern, settings.origin)):
            # A browser sends a cookie with the requests of every page.
            raise ConfigError("--jwt-cookie: name the pages that may connect with --origin, and not with *")
        return
    for name in ("jwt_audience", "jwt_issuer", "jwt_cookie", "login_url"):
        if getattr(settings, name):
            raise ConfigError(f"--{name.replace('_', '-')}: there are no tokens without --jwt-key or --jwks")


def _check_webhooks(settings: Settings) -> None:
    """Raise ConfigError for options about webhooks that contradict each other."""
    if settings.webhook and settings.webhook_key is None:
        raise ConfigError("--webhook: name the file with the keys that sign with --webhook-key")
    if settings.webhook_key is not None and not settings.webhook:
        raise ConfigError("--webhook-key: there are no webhooks without --webhook")
    if len({address.reader for address in settings.webhook}) < len(settings.webhook):
        raise ConfigError("--webhook: a URL is given twice, with two passwords: give it once")


def read_file(path: Path, source: str) -> dict[str, Given]:
    """Read the configuration file that `source` names; return its options by name."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{source}: {path} cannot be read ({error.strerror}): correct the path or its mode") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: {path} is not TOML ({reason}): write lines like {OPTIONS[0].toml}") from None
    options = {option.name: option for option in OPTIONS}
    found = {}
    for key, value in document.items():
        if key not in options:
            raise ConfigError(f"{path}: there is no option {key!r}: {_nearest(key, [*options]) or HELP}")
        place = f"{path}: {key}"
        try:
            found[key] = Given(options[key], place, options[key].from_toml(value))
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None
    return found


# The documentation


def _table(*rows: Sequence[str]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def tables() -> dict[str, str]:
    """Return the tables of the documentation, by the names in their markers."""
    meanings = [
        (f"`{option.usage}`", option.shown or f"`{option.default}`", option.meaning) for option in (*OPTIONS, CONFIG)
    ]
    names = [(f"`--{option.name}`", f"`{option.variable}`", f"`{option.toml}`") for option in OPTIONS]
    return {
        "options": _table(("option", "default", "meaning"), *meanings, ("`--check`", "", CHECK)),
        "sources": _table(("command line", "environment", "file"), *names),
    }


def fill(page: str) -> str:
    """Return a Markdown page with the tables between its markers up to date."""
    found = tables()
    return re.sub(
        r"(?s)(<!-- (\w+): python -m chatd.config -->\n).*?(<!-- end of \2 -->)",
        lambda marked: f"{marked[1]}{found[marked[2]]}\n{marked[3]}",
        page,
    )


def main(words: Sequence[str]) -> None:
    """Run `python -m chatd.config`."""
    parser = argparse.ArgumentParser(
        prog="python -m chatd.config", description="Rewrite the tables of options in Markdown files."
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a page with markers around its tables")
    for file in parser.parse_args(words).files:
        file.write_text(fill(file.read_text("utf-8")), "utf-8")


if __name__ == "__main__":  # pragma: no cover -- `main` is tested
    main(sys.argv[1:])
