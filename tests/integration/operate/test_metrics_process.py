"""The metrics of a server process, and the alerts and the dashboard as promtool reads them."""

import http.client
import json
import re
import subprocess

import pytest
from support.metrics import ALERTS, METRICS, WEBHOOK_METRICS, Scrape, queries, rules, unknown
from support.servers import LONG, ROOT, Raw, Server, need, post

ALERT_TESTS = ROOT / "tests" / "alerts_test.yml"


def ask_metrics(port, method="GET", path="/metrics"):
    """Send a request as a scraper does; return the status, the media type and the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LONG)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, response.headers["content-type"], body


@pytest.fixture(scope="module")
def scraped(tmp_path_factory):
    """The text of a scrape of a server process with two clients, one message and a webhook that nobody receives."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "keys").write_text(f"whsec_{'A' * 32}")
    hook = "--webhook=http://127.0.0.1:1/", "--webhook-key=keys"
    with Server(folder, *hook, admin="tcp:port=0:interface=127.0.0.1") as server:
        with Raw(server.port) as ann, Raw(server.port) as bob:
            ann.join()
            bob.join()
            ann.send(post("ann", "hi"))
            assert ann.json()["type"] == bob.json()["type"] == "message"
            status, kind, text = ask_metrics(server.admin_port)
            assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
            assert ask_metrics(server.admin_port, "HEAD") == (200, kind, "")
            assert ask_metrics(server.admin_port, "POST")[0] == 405
            for method in ("GET", "HEAD", "POST"):
                assert ask_metrics(server.port, method)[0] == 404, "metrics are for operators alone"
        server.stop()
    return text


def test_metrics_of_a_real_server(scraped):
    """A server process reports every metric, with the values that its traffic must cause."""
    scrape = Scrape(scraped)
    assert scrape.types == METRICS | WEBHOOK_METRICS | dict.fromkeys(
        ("chatd_log_bytes", "chatd_log_free_bytes", "chatd_log_wal_bytes"), "gauge"
    )
    assert scrape.some("chatd_connections") == {("websocket",): 2}
    assert (scrape("chatd_messages_total"), scrape("chatd_deliveries_total")) == (1, 2)
    assert (scrape("chatd_members"), scrape("chatd_rooms"), scrape("chatd_tail_messages")) == (2, 1, 3)
    assert scrape("chatd_commit_seconds_count") == scrape("chatd_store_up") == 1
    assert scrape.sum("chatd_refusals_total") == scrape.sum("chatd_closes_total") == 0


def promtool(*arguments, **options):
    """Run promtool; return whether it succeeded, and its output."""
    done = subprocess.run(
        [need("promtool"), *arguments], capture_output=True, text=True, timeout=LONG, check=False, **options
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_a_scrape(scraped):
    """`promtool check metrics` accepts the text of a scrape."""
    assert promtool("check", "metrics", input=scraped) == (True, "")
    assert not promtool("check", "metrics", input=scraped.replace("_total", "_count"))[0], "promtool detects a fault"


# The alerts and the dashboard


def test_every_alert_uses_existing_metrics(scraped):
    """The metrics and labels in the expression of every alert exist in a scrape."""
    scrape = Scrape(scraped)
    for name, (expression, _) in rules(ALERTS.read_text("utf-8")).items():
        assert [*unknown(expression, scrape)] == [], name


def test_every_panel_uses_existing_metrics(scraped):
    """The metrics and labels in every query of the dashboard exist in a scrape."""
    scrape = Scrape(scraped)
    for query in queries():
        assert [*unknown(query, scrape)] == [], query


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("chatd_store_ok == 0", "chatd_store_ok"),
        ("rate(chatd_messages[5m]) > 1", "chatd_messages"),
        ('chatd_closes_total{code="1014"}', "chatd_closes_total{code}"),
        ('chatd_closes_total{reason="1013"}', "chatd_closes_total{reason}"),
        ('chatd_closes_total{reason=~"1.*"}', "chatd_closes_total{reason}"),
        ("sum by (room) (chatd_members)", "room"),
        ("absent(up) or chatd_member", "chatd_member"),
    ],
)
def test_unknown_metric_is_found(scraped, expression, found):
    """The check of expressions finds a metric, a label and a value that no server has."""
    assert [*unknown(expression, Scrape(scraped))] == [found]


def test_dashboard_queries_are_promql(tmp_path):
    """promtool accepts every query of the dashboard as the expression of a rule."""
    lines = [
        f"      - record: panel:{place}\n        expr: {json.dumps(query.replace('$__rate_interval', '5m'))}\n"
        for place, query in enumerate(queries())
    ]
    file = tmp_path / "rules.yml"
    file.write_text("groups:\n  - name: dashboard\n    rules:\n" + "".join(lines))
    well, said = promtool("check", "rules", str(file))
    assert well, said
    file.write_text(file.read_text().replace("sum by (le)", "sum bye (le)"))
    assert not promtool("check", "rules", str(file))[0], "promtool detects a fault"


def test_alerts_are_valid_and_fire():
    """promtool accepts the alerts, and their unit tests pass."""
    well, said = promtool("check", "rules", str(ALERTS))
    assert well, said
    assert f"{len(rules(ALERTS.read_text('utf-8')))} rules found" in said
    well, said = promtool("test", "rules", str(ALERT_TESTS))
    assert well, said


def test_rule_with_another_metric_fails_its_test(tmp_path):
    """Every alert has a unit test that fails if the alert uses another metric."""
    text = ALERTS.read_text("utf-8")
    renamed = re.sub(r"(?<= expr: ).+", lambda found: re.sub(r"\b(chatd|process)_", "other_", found[0]), text)
    for name, content in {"docs/alerts.yml": renamed, "tests/alerts_test.yml": ALERT_TESTS.read_text("utf-8")}.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content)
    well, said = promtool("test", "rules", str(tmp_path / "tests" / "alerts_test.yml"))
    assert not well
    use_up = {"ChatdDown", "ChatdAbsent"}
    assert {*re.findall(r'exp: {alertname="(\w+)"}', said)} == {*rules(text)} - use_up
