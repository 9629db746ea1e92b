"""The options: every source, every refusal, and the documentation that follows from them."""

import base64
import json
import pathlib
import re
import tomllib

import pytest
from support.operator_schemas import schema_with

import chatd
from chatd import config
from chatd.config import ConfigError, Configuration, Settings, veiled
from chatd.messages import Entry
from chatd.store.base import DAY, Retention

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAMES = [option.name for option in config.OPTIONS]
SEED = tuple(entry.number for entry in config.parse_seed(str(config.SEED)))


def read(*words, **environ):
    """Return the settings of a command line and an environment."""
    return Configuration(words, environ).settings


def refusal(*words, **environ):
    """Return the line with which a command line and an environment are refused."""
    with pytest.raises(ConfigError) as refused:
        read(*words, **environ)
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.fixture
def file(tmp_path):
    """A function that writes a configuration file and returns the options that name it."""

    def write(text):
        path = tmp_path / "chatd.toml"
        path.write_text(text)
        return f"--config={path}"

    return write


def test_defaults():
    """Every option has its default without any source."""
    assert read()._replace(seed=()) == Settings(
        listen=("tcp:8085:backlog=4096",),
        admin=("tcp:8086:interface=127.0.0.1",),
        admin_token_file=None,
        store="sqlite:chatd.sqlite",
        store_password_file=None,
        seed=(),
        schema=None,
        max_message=0,
        history=100,
        retain=Retention(),
        rooms=(),
        origin=(),
        rate=(20, 40),
        max_per_address=256,
        proxy_hops=0,
        jwt_key=None,
        jwks="",
        jwt_audience="",
        jwt_issuer="",
        jwt_username="sub",
        jwt_cookie="",
        title="chatd",
        stylesheet=None,
        login_url="",
        no_page=False,
        webhook=(),
        webhook_key=None,
        compress=True,
        ping=25,
        drain=30,
        log_format="text",
    )
    assert SEED == (1, 2)


def test_every_option_has_its_setting():
    """Settings has one field for each option, in the same order."""
    assert [option.field for option in config.OPTIONS] == [*Settings._fields[:-3]]


VALUES = [
    ("history", "1", 1),
    ("history", "10000", 10_000),
    ("retain", "5000", Retention(messages=5000)),
    ("retain", "30d", Retention(seconds=30 * DAY)),
    ("retain", "all", Retention()),
    ("rate", "5", (5, 10)),
    ("rate", "5:7", (5, 7)),
    ("rate", "0", (0, 0)),
    ("rate", "1000000:1000000", (1_000_000, 1_000_000)),
    ("proxy-hops", "0", 0),
    ("proxy-hops", "2", 2),
    ("proxy-hops", "100", 100),
    ("ping", "1", 1),
    ("ping", "3600", 3600),
    ("drain", "0", 0),
    ("drain", "3600", 3600),
    ("compress", "on", True),
    ("compress", "off", False),
    ("log-format", "text", "text"),
    ("log-format", "json", "json"),
    ("store", "memory:", "memory:"),
    ("store", "sqlite:a:b", "sqlite:a:b"),
    ("store", "sqlite:///a", "sqlite:///a"),
    ("store", "redis://ann:secret@h:1/2", "redis://ann:secret@h:1/2"),
    ("store-password-file", "password", pathlib.Path("password")),
    ("admin-token-file", "token", pathlib.Path("token")),
    ("title", "Über uns", "Über uns"),
    ("title", "x" * 100, "x" * 100),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_value_from_each_source(file, name, text, value):
    """A value is the same from the command line, the environment and the file."""
    field = name.replace("-", "_")
    assert getattr(read(f"--{name}={text}"), field) == value
    assert getattr(read(f"--{name}", text), field) == value
    assert getattr(read(**{f"CHATD_{field.upper()}": text}), field) == value
    assert getattr(read(file(f"{name} = {json.dumps(text)}")), field) == value
    if text.isdigit():
        assert getattr(read(file(f"{name} = {text}")), field) == value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        *(("history", text, "is not a whole number from 1 to 10000") for text in ("0", "10001", "-1", "1.5", "", "x")),
        ("history", "\N{ARABIC-INDIC DIGIT THREE}", "is not a whole number from 1 to 10000"),
        ("history", "\N{SUPERSCRIPT TWO}", "is not a whole number from 1 to 10000"),
        *(
            ("retain", text, "is neither a number of messages (5000) nor of days (30d) nor all")
            for text in ("0", "30h", "ALL", "-5", "")
        ),
        *(("rate", text, "is not a whole number from 0 to 1000000") for text in ("x", "1000001", "")),
        *(("proxy-hops", text, "is not a whole number from 0 to 100") for text in ("-1", "101", "1.5", "x", "")),
        *(("ping", text, "is not a whole number from 1 to 3600") for text in ("0", "3601", "2.5", "x")),
        ("drain", "3601", "is not a whole number from 0 to 3600"),
        *(("compress", text, "is neither on nor off") for text in ("yes", "2", "")),
        *(("log-format", text, "is neither text nor json") for text in ("xml", "JSON", "")),
        *(
            ("store", text, "is neither memory: nor sqlite:PATH nor redis://HOST:PORT/DATABASE")
            for text in ("memory", "memory:x", "sqlite", "sqlite:", "chatd.sqlite", "redit://localhost/0", "")
        ),
        (
            "store",
            "sqlite://a/b",
            "has // before its path: write sqlite:a/b, or sqlite:/PATH from the root folder",
        ),
    ],
)
def test_wrong_value(file, name, text, allowed):
    """A wrong value is refused with the place where it was given and with what is allowed."""
    assert refusal(f"--{name}={text}") == f"--{name}: {text!r} {allowed}"
    if text:
        variable = f"CHATD_{name.upper().replace('-', '_')}"
        assert refusal(**{variable: text}) == f"{variable}: {text!r} {allowed}"
    assert refusal(file(f"{name} = {json.dumps(text)}")).endswith(f"chatd.toml: {name}: {text!r} {allowed}")


@pytest.mark.parametrize("text", ["20:", ":40", "20:x", "20:40:60"])
def test_rate_with_a_wrong_burst(text):
    """A rate has at most one burst, which is a number."""
    assert refusal("--rate", text).startswith("--rate: ")


# The sources


def test_order_of_the_sources(file):
    """The command line overrides the environment, which overrides the file, which overrides the default."""
    words = file('history = 2\nlisten = ["tcp:2"]\nping = 2')
    environ = {"CHATD_HISTORY": "3", "CHATD_LISTEN": "tcp:3"}
    for settings, number in ((read(words), 2), (read(words, **environ), 3)):
        assert (settings.listen, settings.history) == ((f"tcp:{number}",), number)
    settings = read(words, "--history=4", "--listen=tcp:4", **environ)
    assert (settings.listen, settings.history) == (("tcp:4",), 4)
    assert (settings.ping, settings.drain) == (2, 30)


def test_empty_variables_are_unset():
    assert read(CHATD_HISTORY="", CHATD_STORE="", CHATD_CONFIG="").history == 100


def test_configuration_file_of_the_environment(file):
    """CHATD_CONFIG names the file, unless --config does."""
    words = file("history = 7")
    path = words.partition("=")[2]
    assert read(CHATD_CONFIG=path).history == 7
    assert read(CHATD_CONFIG=path).config == pathlib.Path(path)
    assert read("--config=", CHATD_CONFIG=path).history == 100


REPEATED = {
    "listen": ("tcp:1", "tcp:2:interface=127.0.0.1"),
    "admin": ("tcp:3", "tcp:4"),
    "rooms": ("main", "team-*", "team-?"),
    "origin": ("https://chat.example", "*.Example.ORG", "null"),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_options(file, name):
    """A repeated option is given several times, or separated by white space, or as a list."""
    texts = REPEATED[name]
    assert getattr(read(*(f"--{name}={text}" for text in texts)), name) == texts
    assert getattr(read(**{f"CHATD_{name.upper()}": "  ".join(texts) + "\n"}), name) == texts
    assert getattr(read(file(f"{name} = {json.dumps(texts)}")), name) == texts
    assert getattr(read(f"--{name}={texts[0]}", **{f"CHATD_{name.upper()}": texts[1]}), name) == (texts[0],)


@pytest.mark.parametrize("name", ["admin", "rooms", "origin"])
def test_empty_repeated_options(file, name):
    """An empty value clears a repeated option."""
    assert getattr(read(f"--{name}="), name) == ()
    assert getattr(read(**{f"CHATD_{name.upper()}": ""}), name) == ()
    assert getattr(read(file(f"{name} = []")), name) == ()


def test_server_without_a_port(file):
    """Every source must name at least one endpoint for clients."""
    line = "--listen: give at least one server endpoint such as tcp:8085"
    assert refusal("--listen=") == refusal(CHATD_LISTEN="") == refusal(file("listen = []")) == line


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        *(
            ("rooms", text, "is not a pattern of room names such as team-*")
            for text in ("Main", "/rooms/main", "[ab]", "a,b", "\N{CYRILLIC SMALL LETTER A}")
        ),
        *(
            ("origin", text, "is not an origin such as https://chat.example or *.example")
            for text in ("chat.example", "**", "https://chat.example/", "wss://chat.example", "https://a.*.example")
        ),
    ],
)
def test_wrong_rooms_and_origins(name, text, fault):
    """A wrong pattern is refused from the command line and from the environment."""
    variable, good = f"CHATD_{name.upper()}", REPEATED[name][0]
    assert refusal(f"--{name}={good}", f"--{name}={text}") == f"--{name}: {text!r} {fault}"
    assert refusal(**{variable: f"{good} {text}"}) == f"{variable}: {text!r} {fault}"


# The file


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("history 5", "--config: PATH is not TOML (Expected '=' after a key"),
        ("a = 1\na = 2", "--config: PATH is not TOML (Cannot overwrite a value"),
        ("histroy = 5", "PATH: there is no option 'histroy': did you mean history?"),
        ("log_format = 'json'", "PATH: there is no option 'log_format': did you mean log-format?"),
        ("hist = 5", "PATH: there is no option 'hist': did you mean history?"),
        ("check = true", "PATH: there is no option 'check': `chatd serve --help` explains"),
        ("[chatd]\nhistory = 5", "PATH: there is no option 'chatd': `chatd serve --help` explains"),
        ("history = true", "PATH: history: the value has the wrong type: write a line like history = 100"),
        ("history = 5.0", "PATH: history: the value has the wrong type"),
        ("history = [5]", "PATH: history: the value has the wrong type"),
        ("store = ['redis://:hunter2@h']", "PATH: store: the value has the wrong type: write a line like store = "),
        ("listen = 'tcp:1'", 'PATH: listen: the value has the wrong type: write a line like listen = ["tcp:8085:'),
        ("listen = [1]", "PATH: listen: the value has the wrong type"),
        ("rooms = {a = 1}", "PATH: rooms: the value has the wrong type: write a line like rooms = []"),
        ("ping = -1", "PATH: ping: '-1' is not a whole number from 1 to 3600"),
    ],
)
def test_wrong_file(file, text, line):
    """A file with a fault is refused in one line that shows no value that could be secret."""
    words = file(text)
    found = refusal(words)
    assert found.startswith(line.replace("PATH", words.partition("=")[2]))
    assert "hunter2" not in found


def test_file_that_cannot_be_read(tmp_path):
    """The error names the path and the reason."""
    missing = tmp_path / "missing.toml"
    line = "cannot be read (No such file or directory): correct the path or its mode"
    assert refusal(f"--config={missing}") == f"--config: {missing} {line}"
    assert refusal(CHATD_CONFIG=str(missing)) == f"CHATD_CONFIG: {missing} {line}"
    assert refusal(f"--config={tmp_path}").startswith(f"--config: {tmp_path} cannot be read (Is a directory): ")
    (tmp_path / "binary").write_bytes(b"\xff")
    assert refusal(f"--config={tmp_path / 'binary'}").startswith(f"--config: {tmp_path / 'binary'} is not TOML (")


# The store and the seed


def test_redis_user_without_a_password(file):
    """A URL may name a user alone if a file holds the password."""
    url = "redis://ann@h"
    line = f"--store: {'redis://***@h'!r} names a user and no password"
    assert refusal(f"--store={url}").startswith(line)
    assert read(f"--store={url}", CHATD_STORE_PASSWORD_FILE="p").store_password_file == pathlib.Path("p")
    assert read(file(f'store = "{url}"\nstore-password-file = "p"')).store == url


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:s3cret@h:x", "redis://:***@h:x"),
        ("redis://ann:s3cret@h/x", "redis://ann:***@h/x"),
        ("rediss://:s3cret/@h", "rediss://:***@h"),
        ("redis://s3cret@h", "redis://***@h"),
        ("postgres://ann:s3cret@h", "postgres://ann:***@h"),
        ("redis://:s3cret", "redis://:***"),
        ("s3cret@h", "***@h"),
    ],
)
def test_refused_store_hides_its_password(file, url, shown):
    assert refusal(f"--store={url}").startswith(f"--store: {shown!r} ")
    assert f"chatd.toml: store: {shown!r} " in refusal(file(f"store = {json.dumps(url)}"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:secret@h:1/0", "redis://:***@h:1/0"),
        ("rediss://ann:secret@h", "rediss://ann:***@h"),
        ("redis://secret@h", "redis://***@h"),
        ("redis://:se/cret@h/0", "redis://:***@h/0"),
        ("redis://:se@cr:e#t?@h", "redis://:***@h"),
        ("redis://:se\ncret@h", "redis://:***@h"),
        ("redis:/ann:secret@h", "redis:/ann:***@h"),
        ("redis:secret@h", "redis:***@h"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("redis://h:1", "redis://h:1"),
        ("redis://h:1x", "redis://h:***"),
        ("redis://ann:secret/0", "redis://ann:***"),
        ("redis://[::1]:x", "redis://[::1]:x"),
    ],
)
def test_url_without_its_password(url, shown):
    """The password of a URL is replaced by asterisks."""
    assert veiled(url) == shown


@pytest.mark.parametrize("option", ["", "--origin=", "--ping=", "--log-format=", "--seed="])
def test_store_in_the_wrong_place_hides_its_password(option):
    """No error repeats the password of a URL that was given to another option, or to none."""
    found = refusal(f"{option}redis://:s3cret@h/0")
    assert "redis:" in found
    assert "s3cret" not in found


def test_endpoint_that_is_a_store_hides_its_password():
    """Endpoints are parsed after the other options."""

    def parse(text):
        raise ValueError(f"{text!r} is no endpoint")

    found = Configuration(["--listen=redis://:s3cret@h/0"], {})
    with pytest.raises(ConfigError, match=r"^--listen: 'redis://:\*\*\*@h/0' is no endpoint$"):
        found.each("listen", parse)


def test_value_with_a_zero_byte(file):
    """A file can contain values that the operating system takes for no path."""
    assert refusal(file('store = "sqlite:a\\u0000b"')).endswith(": store: the value contains a zero byte: remove it")


def test_seed_from_a_file(tmp_path):
    """--seed reads the messages of a new log from a JSON file."""
    path = tmp_path / "seed.json"
    path.write_text('[{"username":"ann","message":"hi","timestamp":"2024-10-20T12:30:00Z"}]')
    assert read(f"--seed={path}").seed == (Entry(1, "ann", "hi", "2024-10-20T12:30:00Z"),)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[", "is not JSON: "),
        ("{}", "must be a list of messages"),
        ('[{"username":"ann"}]', 'message 1: "message" is required'),
        ('[{"username":"ann","message":"hi"}]', 'message 1: "timestamp" must be a time such as 2024-10-20T12:30:00Z'),
    ],
)
def test_wrong_seed(tmp_path, text, fault):
    """The error names the path of the seed and its fault."""
    path = tmp_path / "seed.json"
    path.write_text(text)
    assert refusal(f"--seed={path}").startswith(f"--seed: {path} {fault}")


@pytest.fixture
def schema(tmp_path):
    """A function that writes a schema whose messages have these fields too, and returns the option."""

    def write(**fields):
        path = tmp_path / "schema.json"
        path.write_text(json.dumps(schema_with(**fields)))
        return f"--schema={path}"

    return write


def test_schema_of_messages(schema, tmp_path):
    """The schema is read with the other options, and its payload limit may be given."""
    settings = read(schema(color={"type": "string", "maxLength": 2000}))
    assert settings.schema == tmp_path / "schema.json"
    assert settings.message.form.schema["properties"].keys() == {"username", "message", "color", "label", "replaces"}
    assert 24_000 < settings.message.max_bytes < 30_000
    assert read(schema(), "--max-message=2000").message.max_bytes == 2000
    assert (read("--max-message=2000").max_message, read("--max-message=2000").message) == (2000, None)
    line = (
        f'--schema: {tmp_path / "schema.json"} has a property "type", which is a name of the protocol: choose another'
    )
    assert refusal(schema(type={})) == line
    assert refusal(f"--schema={tmp_path}") == f"--schema: {tmp_path} cannot be read (Is a directory)"
    assert refusal("--max-message=1000000").startswith("--max-message: '1000000' is not a whole number from 0 to ")


def test_seed_fits_the_schema(schema, tmp_path):
    """A seed that is given must fit, and the default one is left out if it does not."""
    seed = tmp_path / "seed.json"
    seed.write_text('[{"username":"ann","message":"hi","color":"red","timestamp":"2024-10-20T12:30:00Z"}]')
    red = Entry(1, "ann", "hi", "2024-10-20T12:30:00Z", extra={"color": "red"})
    assert read(schema(color={}), f"--seed={seed}").seed == (red,)
    assert refusal(schema(), f"--seed={seed}") == f'--seed: {seed} message 1: "color" is not allowed'
    assert len(read(schema()).seed) == 2
    assert read(schema(message={"type": "string", "maxLength": 1})).seed == ()


def test_seed_that_cannot_be_read(tmp_path):
    """The error names the path of the seed and the reason."""
    missing = tmp_path / "missing.json"
    assert refusal(f"--seed={missing}") == f"--seed: {missing} cannot be read (No such file or directory)"
    assert refusal(f"--seed={tmp_path}") == f"--seed: {tmp_path} cannot be read (Is a directory)"


# The command line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--xyzzy=red"], "there is no option --xyzzy: `chatd serve --help` explains every option"),
        (["--hist", "5"], "there is no option --hist: did you mean --history?"),
        (["--histroy=5"], "there is no option --histroy: did you mean --history?"),
        (["--ping=5", "--log_format=json"], "there is no option --log_format: did you mean --log-format?"),
        (["--max-per-address=many"], "--max-per-address: 'many' is not a whole number from 0 to 1000000"),
        (["-p", "5"], "there is no option -p: `chatd serve --help` explains every option"),
        (["8085"], "unexpected argument '8085': `chatd serve --help` explains every option"),
        (["--store"], "argument --store: expected one argument: `chatd serve --help` explains every option"),
        (["--check=yes"], "argument --check: ignored explicit argument 'yes': "),
    ],
)
def test_wrong_command_line(words, line):
    """Options are never abbreviated, and an unknown one is refused with the most similar name."""
    assert refusal(*words).startswith(line)


@pytest.mark.parametrize("name", NAMES)
def test_no_option_is_abbreviated(name):
    assert refusal(f"--{name[:-1]}=1").startswith(f"there is no option --{name[:-1]}: did you mean --{name[:2]}")


def test_check_is_a_flag():
    assert Configuration(["--check"], {}).check
    assert not Configuration([], {"CHATD_CHECK": "1"}).check


def test_version(capsys):
    """--version prints the version and exits."""
    with pytest.raises(SystemExit) as end:
        read("--version")
    assert end.value.code == 0
    assert capsys.readouterr().out == f"chatd {chatd.__version__}\n"


def test_help_names_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        read("--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in (*config.OPTIONS, config.CONFIG):
        assert f"{option.usage} " in text
        assert f"[default: {option.shown or option.default}]" in text
    assert "1 to 10000 [default: 100]" in text
    assert "CHATD_STORE for --store" in text
    assert "--check" in text


# The page


@pytest.mark.parametrize("text", ["", " ", "x" * 101, "a\nb", "a\tb", "a\x1bb"])
def test_title_is_one_line(text):
    assert refusal(f"--title={text}") == f"--title: {text!r} is not a title of 1 to 100 characters in one line"


@pytest.mark.parametrize(
    "text",
    [
        "app.example",
        "/login",
        "//app.example",
        "javascript:alert(1)",
        "data:text/html,x",
        "https:",
        "https://",
        "https://[",
        "https://app.example:x/",
        "https://app.example:0/",
        "https://ann:secret@app.example/",
        "https://app.example/a b",
        "https://app.example/\u00e9",
        "https://app.example/\n",
    ],
)
def test_login_url_is_one_of_the_web(keys, text):
    line = refusal("--jwt-key=secret", f"--login-url={text}")
    assert line.startswith("--login-url: ")
    assert line.endswith(" is not a URL such as https://app.example/login")
    assert "secret" not in line


@pytest.mark.parametrize("text", ["https://app.example/login?a=b", "http://localhost:3000/#/login", "HTTPS://[::1]/"])
def test_login_url(keys, text):
    assert read("--jwt-key=secret", f"--login-url={text}").login_url == text


def test_stylesheet_is_read_at_the_start(file, tmp_path):
    (tmp_path / "team.css").write_text("p { color: teal }")
    assert read(f"--stylesheet={tmp_path}/team.css").stylesheet == tmp_path / "team.css"
    assert read("--stylesheet=").stylesheet is None
    missing = tmp_path / "missing.css"
    assert refusal(f"--stylesheet={missing}") == f"--stylesheet: {missing} cannot be read (No such file or directory)"


def test_page_is_switched_off(file):
    """On the command line the option has no value; elsewhere it is true or false."""
    assert not read().no_page
    assert read("--no-page").no_page
    for text in ("1", "true", "True", "TRUE"):
        assert read(CHATD_NO_PAGE=text).no_page
    for text in ("", "0", "false", "False"):
        assert not read(CHATD_NO_PAGE=text).no_page
    assert read(file("no-page = true")).no_page
    assert not read(file("no-page = true"), CHATD_NO_PAGE="false").no_page
    assert read(file("no-page = false"), "--no-page").no_page


def test_switch_has_two_values(file):
    assert refusal(CHATD_NO_PAGE="yes") == "CHATD_NO_PAGE: 'yes' is neither on nor off"
    assert refusal("--no-page=true").startswith("argument --no-page: ignored explicit argument 'true'")
    assert refusal(file("no-page = [true]")).endswith("the value has the wrong type: write a line like no-page = false")
    assert refusal(file("title = true")).endswith('the value has the wrong type: write a line like title = "chatd"')


# The documentation


@pytest.mark.parametrize(("page", "name"), [("README.md", "options"), ("docs/operations.md", "sources")])
def test_documentation_is_up_to_date(page, name):
    """`python -m chatd.config README.md docs/operations.md` writes the tables again."""
    text = (ROOT / page).read_text("utf-8")
    assert f"<!-- {name}: python -m chatd.config -->" in text
    assert config.fill(text) == text


def test_tables_are_filled_between_their_markers():
    """The text outside the markers stays, and a second run changes nothing."""
    page = "before\n<!-- sources: python -m chatd.config -->\nold\n<!-- end of sources -->\nafter\n"
    filled = config.fill(page)
    assert filled.startswith(
        "before\n<!-- sources: python -m chatd.config -->\n| command line | environment | file |\n"
    )
    assert filled.endswith("|\n<!-- end of sources -->\nafter\n")
    assert "old" not in filled
    assert config.fill(filled) == filled


def test_command_rewrites_the_tables_of_each_file(tmp_path):
    """`python -m chatd.config FILE...` fills the tables of every file in place."""
    files = [tmp_path / "a.md", tmp_path / "b.md"]
    page = "<!-- sources: python -m chatd.config -->\nold\n<!-- end of sources -->\n"
    for file in files:
        file.write_text(page)
    config.main([*map(str, files)])
    assert [file.read_text() for file in files] == [config.fill(page)] * 2


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2)])
def test_usage_of_the_command(capsys, words, status):
    """`--help` prints the usage, and a command line without a file is an error that includes it."""
    with pytest.raises(SystemExit) as end:
        config.main(words)
    captured = capsys.readouterr()
    assert end.value.code == status
    assert (captured.out or captured.err).startswith("usage: python -m chatd.config [-h] FILE [FILE ...]\n")


def test_documented_lines_of_a_file(file, tmp_path, monkeypatch):
    """The lines that the documentation shows are those of a valid file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text(f"[{' ' * 32}]")  # an empty seed, and a secret
    lines = re.findall(r"`([a-z-]+ = [^`]+)` \|$", config.tables()["sources"], re.MULTILINE)
    assert [*tomllib.loads("\n".join(lines))] == NAMES
    # One of the two keys, no cookie without an origin, no key of webhooks without one, and no URL that is only a word.
    lines = [
        line for line in lines if not line.startswith(("jwks ", "jwt-cookie ", "login-url ", "webhook-key ", "schema "))
    ]
    settings = read(file("\n".join(lines)))
    assert settings.store_password_file == pathlib.Path("FILE")
    names = ("seed", "store-password-file", "admin-token-file", "jwt-key", "stylesheet")
    files = [f"--{name}=FILE" for name in names]
    expected = read(*files, "--jwt-audience=TEXT", "--jwt-issuer=TEXT")
    assert settings._replace(config=None) == expected


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Files with a secret and with a key set, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_text("s" * 32)
    key = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "1"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [key]}))


HOOK, HOOK_KEY = "https://app.example/hook", "--webhook-key=hooks"


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """A file with a key for webhooks, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hooks").write_text(f"whsec_{'A' * 32}\n")


def test_webhooks(hooks):
    """Credentials are apart from the URL, so that one webhook keeps its cursors when they change."""
    settings = read(f"--webhook={HOOK}", "--webhook=http://ann:gehe%2Fim@127.0.0.1:8000?a=b", HOOK_KEY)
    one, other = settings.webhook
    assert (one.url, one.origin, one.authorization) == (HOOK.encode(), "https://app.example", None)
    assert (other.url, other.origin) == (b"http://127.0.0.1:8000/?a=b", "http://127.0.0.1:8000")
    assert base64.b64decode(other.authorization.removeprefix(b"Basic ")) == b"ann:gehe/im"
    assert "gehe" not in f"{settings}"
    assert one.reader != other.reader == read("--webhook=http://127.0.0.1:8000/?a=b", HOOK_KEY).webhook[0].reader
    assert len(read(f"--webhook={HOOK}", f"--webhook={HOOK}", HOOK_KEY).webhook) == 1


NO_HOOK = "the URL of a webhook is like https://app.example/chatd, without a fragment"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        *(
            ([f"--webhook={url}", HOOK_KEY], f"--webhook: {NO_HOOK}")
            for url in (
                "ftp://app.example",
                "https://",
                "https://x:0/",
                "https://x:y/",
                "https://x/#a",
                "https://\u00fc/",
            )
        ),
        (["--webhook=https://ann:geheim@[/", HOOK_KEY], f"--webhook: {NO_HOOK}"),
        ([f"--webhook={HOOK}"], "--webhook: name the file with the keys that sign with --webhook-key"),
        ([HOOK_KEY], "--webhook-key: there are no webhooks without --webhook"),
        (
            ["--webhook=https://a:b@x/", "--webhook=https://a:c@x/", HOOK_KEY],
            "--webhook: a URL is given twice, with two passwords: give it once",
        ),
        ([f"--webhook={HOOK}", "--webhook-key=none"], "--webhook-key: none cannot be read (No such file or directory)"),
    ],
)
def test_wrong_webhooks(hooks, words, line):
    """The line does not repeat the URL, which may hold a password."""
    assert refusal(*words) == line


@pytest.mark.parametrize("words", [["--jwt-key=secret"], ["--jwks=jwks.json"], ["--jwks=https://login.example/jwks"]])
def test_keys_for_tokens(keys, words):
    settings = read(*words, "--jwt-audience=chat", "--jwt-cookie=session", "--origin=https://chat.example")
    assert settings.tokens
    assert not read().tokens


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--jwt-key=none"], "--jwt-key: none cannot be read (No such file or directory)"),
        (["--jwks=secret"], "--jwks: secret is not JSON"),
        (
            ["--jwks=http://login.example/jwks"],
            "--jwks: http://login.example could be answered by anyone on the way: use https",
        ),
        (["--jwt-key=secret", "--jwks=jwks.json"], "--jwt-key and --jwks: give one of them"),
        (["--jwt-audience=chat"], "--jwt-audience: there are no tokens without --jwt-key or --jwks"),
        (
            ["--login-url=https://app.example"],
            "--login-url: there are no tokens without --jwt-key or --jwks",
        ),
        (
            ["--jwt-key=secret", "--jwt-cookie=session"],
            "--jwt-cookie: name the pages that may connect with --origin, and not with *",
        ),
        (
            ["--jwt-key=secret", "--jwt-cookie=session", "--origin=*"],
            "--jwt-cookie: name the pages that may connect with --origin, and not with *",
        ),
        (["--jwt-key=secret", "--jwt-cookie=a b"], "--jwt-cookie: 'a b' is not the name of a cookie"),
        (["--jwt-key=secret", "--jwt-username="], "--jwt-username: the name of a claim is empty"),
    ],
)
def test_wrong_options_for_tokens(keys, words, line):
    assert refusal(*words) == line


DEFAULTS = (
    r"`--(?P<name>[a-z-]+)`,? \(?(?P<value>[0-9][\w:]*)(?: [a-z]+)? by default",
    r"(?i)\bby default,? \(?`--(?P<name>[a-z-]+)[ =](?P<value>[^`]+)`",
    r"(?i)\bdefault of `--(?P<name>[a-z-]+)`,? (?:is |of )?\(?(?P<value>[0-9][\w:]*)",
    r"(?P<value>[0-9][\w:]*)(?: s| seconds?)? \(`--(?P<name>[a-z-]+)`",
)
"""The forms in which prose may state the default of an option."""


def stated(page):
    """Yield the name and the value of each default that a page states, across the ends of its lines."""
    text = " ".join(page.split())
    for form in DEFAULTS:
        yield from ((found["name"], found["value"]) for found in re.finditer(form, text))


def test_stated_defaults():
    """A default in the prose is the default of the option."""
    pages = [ROOT / "README.md", ROOT / "scripts/deploying/stack.yaml", *sorted((ROOT / "docs").glob("*.md"))]
    defaults = {option.name: option.default for option in config.OPTIONS}
    found = [(page.name, *one) for page in pages for one in stated(page.read_text("utf-8"))]
    assert {(page, name) for page, name, _ in found} >= {
        *((page, "ping") for page in ("protocol.md", "deploy.md", "performance.md", "stack.yaml")),
        ("protocol.md", "rate"),
    }
    assert [one for one in found if one[2] != defaults[one[1]]] == []


@pytest.mark.parametrize(
    "text",
    [
        "(`--ping`, 24 s by default)",
        "`--ping` (24 by\ndefault)",
        "By default (`--ping 24`) ...",
        "the default of `--ping` is 24",
        "every 24 seconds (`--ping`)",
    ],
)
def test_stated_default_is_found(text):
    """The test above sees every form, so a wrong number fails it."""
    assert [*stated(text)] == [("ping", "24")]


def test_each_option_is_documented():
    table = config.tables()["options"]
    for option in (*config.OPTIONS, config.CONFIG):
        assert f"| `{option.usage.replace('|', chr(92) + '|')}` | " in table
    assert "| `--check` | " in table
