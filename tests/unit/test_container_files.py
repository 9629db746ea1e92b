"""Dockerfile, compose.yaml and docs/kubernetes.yaml: rules, each with a negative control, and the health check.

tests/system/test_containers.py builds the image and runs it.
"""

import http.server
import subprocess
import sys
import threading

import pytest
from support.container_rules import (
    COMPOSE,
    DOCKERFILE,
    IGNORE,
    MANIFEST,
    PORT,
    compose_faults,
    dockerfile_faults,
    health_check,
    manifest_faults,
)
from support.servers import LONG

TEXTS = {path.name: path.read_text() for path in (DOCKERFILE, IGNORE, COMPOSE, MANIFEST)}


def broken(**changes):
    """Return the rules that the files break when one of them has other texts."""
    found = dict(TEXTS)
    for name, (old, new) in changes.items():
        key = {"dockerfile": DOCKERFILE, "ignore": IGNORE, "compose": COMPOSE, "manifest": MANIFEST}[name].name
        assert old in found[key]
        found[key] = found[key].replace(old, new)
    dockerfile, ignore, compose, manifest = found.values()
    if "dockerfile" in changes or "ignore" in changes:
        return dockerfile_faults(dockerfile, ignore)
    return compose_faults(compose, dockerfile) + manifest_faults(manifest, dockerfile)


def test_files_follow_the_rules():
    assert dockerfile_faults(TEXTS["Dockerfile"], TEXTS[".dockerignore"]) == []
    assert broken() == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("python:3.13-slim-trixie", "python:latest"), "the base can be chosen"),
        (("\nFROM ${BASE}\n", "\nFROM debian\n"), "the base can be chosen"),
        (("--require-hashes --only-binary=:all: --requirement r", "--requirement r"), "pip installs what is locked"),
        (("--no-index --no-deps", "--no-deps"), "pip installs what is locked"),
        (("COPY schemas schemas\n", ""), "what the wheel is built from is copied"),
        (("COPY seed seed\n", "COPY seed seed\nCOPY docs docs\n"), "nothing else reaches the engine"),
        (("COPY --from=build /opt/chatd /opt/chatd", "COPY . ."), "the last stage only copies the environment"),
        (("USER 10001:10001\n", ""), "it is not root, by number"),
        (("USER 10001:10001", "USER chatd"), "it is not root, by number"),
        (("--uid 10001", "--uid 10002"), "its user owns the volume"),
        (("VOLUME /var/lib/chatd", "VOLUME /data"), "the store lies in the volume"),
        (("sqlite:/var/lib/chatd/chatd.sqlite", "sqlite:/tmp/chatd.sqlite"), "the store lies in the volume"),
        (("CHATD_DRAIN=5", "CHATD_DRAIN=30"), "the drain ends before docker stop kills"),
        (("STOPSIGNAL SIGTERM", "STOPSIGNAL SIGINT"), "a stop is SIGTERM"),
        (("CHATD_DRAIN=5", "CHATD_DRAINS=5"), "the options exist"),
        (('ENTRYPOINT ["chatd"]', "ENTRYPOINT chatd"), "its first process is chatd"),
        (('CMD ["serve"]', 'CMD ["server"]'), "its first process is chatd"),
        (('CMD ["python3", "-c", ', 'CMD ["curl", '), "its health is checked without other programs"),
        (("HEALTHCHECK --interval=10s --timeout=5s --start-period=30s", "LABEL a=b"), "its health is checked "),
    ],
)
def test_broken_dockerfile(change, rule):
    assert any(found.startswith(rule) for found in broken(dockerfile=change))


@pytest.mark.parametrize("change", [("*\n!LICENSE", "!LICENSE"), ("!chatd\n", "!chatd\n!docs\n"), ("!seed\n", "")])
def test_broken_dockerignore(change):
    assert "nothing else reaches the engine" in broken(ignore=change)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("  chatd-3: *node\n", ""), "there are three nodes"),
        (("    build: . # here alone", "    # here alone"), "one build makes the image of all nodes"),
        (("  image: chatd\n", "  image: chatd\n  build: .\n"), "one build makes the image of all nodes"),
        (("stop_grace_period: 45s", "stop_grace_period: 30s"), "a node is killed after its drain"),
        (('CHATD_DRAIN: "30"', 'CHATD_DRAIN: "60"'), "a node is killed after its drain"),
        (("  stop_grace_period: 45s # longer than CHATD_DRAIN\n", ""), "a node is killed after its drain"),
        (("redis://valkey:6379/0", "redis://redis:6379/0"), "nodes share the store"),
        (("CHATD_PROXY_HOPS: ", "CHATD_HOPS: "), "the options exist"),
        (('CHATD_DRAIN: "30"', "CHATD_DRAIN: 30"), "the options exist"),
        (("uid=10001", "uid=0"), "nodes cannot write"),
        (("  cap_drop: [ALL]\n  sec", "  sec"), "nodes cannot write"),
        (("    valkey: { condition: service_healthy }", "    valkey: {}"), "nodes wait for the store"),
        (("chatd-2: { condition", "chatd-1: { condition"), "clients wait for the nodes"),
        (("always", "everysec"), "the store keeps what is acknowledged"),
        (('volumes: ["valkey:/data"]', 'volumes: ["./data:/data"]'), "the store keeps what is acknowledged"),
        (("valkey-cli, -e, ping", "redis-cli, -e, ping"), "the health of the store is known"),
        (("valkey-cli, -e, ping", "valkey-cli, ping"), "the health of the store is known"),
        (
            ("    image: haproxy:3.2\n    restart: unless-stopped #", "    image: haproxy:3.2\n    #"),
            "everything starts again",
        ),
        (("  read_only: true\n    security_opt", "  security_opt"), "everything starts again, and gains no rights"),
        (("3.2\n    restart: ", "3.2\n    read_only: true\n    restart: "), "everything starts again, and gains no "),
        (("haproxy:3.2", "haproxy:latest"), "images say their version"),
        (('"127.0.0.1:8085:8085"', '"8085:8085"'), "only this machine reaches it"),
        (("server chatd-2 chatd-2:8085", "server chatd-2 chatd-1:8085"), "HAProxy knows the nodes"),
        (("GET /readyz", "GET /healthz"), "HAProxy asks the nodes"),
        ((" resolvers docker init-addr", " init-addr"), "HAProxy finds a node that was made again"),
        (("          option forwardfor\n", ""), "HAProxy names the client"),
        (("maxconn 9000", "maxconn 20000"), "there are files for the clients"),
        (("ulimits: { nofile: 20000 } # a client is one", "ulimits: {} # a client is one"), "there are files for "),
        (("timeout tunnel 60s", "timeout tunnel 20s"), "HAProxy cuts no idle client"),
    ],
)
def test_broken_compose(change, rule):
    assert any(found.startswith(rule) for found in broken(compose=change))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("terminationGracePeriodSeconds: 45", "terminationGracePeriodSeconds: 30"), "a pod is killed after its drain"),
        (('CHATD_DRAIN, value: "30"', 'CHATD_DRAIN, value: "60"'), "a pod is killed after its drain"),
        (("'POST', '/drain'", "'GET', '/drain'"), "the drain begins before the pod leaves the service"),
        (("c.getresponse()", "c.getresponse("), "the drain begins before the pod leaves the service"),
        (("CHATD_LOG_FORMAT, value: json", "CHATD_ADMIN, value: tcp:8086"), "the drain begins before the pod leaves "),
        (("path: /readyz", "path: /healthz"), "only a ready pod gets clients"),
        (
            ("periodSeconds: 2\n          livenessProbe", "failureThreshold: 1\n          livenessProbe"),
            "one lost probe takes no ",
        ),
        (
            ("periodSeconds: 2\n          livenessProbe", "periodSeconds: 3\n          livenessProbe"),
            "a drained pod leaves the ",
        ),
        (
            ("name: CHATD_LOG_FORMAT, value: json", 'name: CHATD_PROXY_HOPS, value: "1"'),
            "no client names its own address",
        ),
        (("'GET', '/healthz'", "'GET', '/readyz'"), "a store that fails kills no pod"),
        (("8086, timeout=4); c.request('GET'", "8085, timeout=4); c.request('GET'"), "a store that fails kills no pod"),
        (("            periodSeconds: 10\n", "            failureThreshold: 1\n"), "a store that fails kills no pod"),
        (("CHATD_LOG_FORMAT, value: json", "CHATD_LOG_FORMAT, value: xml"), "the options exist"),
        (("enableServiceLinks: false", "enableServiceLinks: true"), "the options exist"),
        (("chatd:0.", "chatd:9."), "the image has the version of this checkout"),
        (("runAsUser: 10001", "runAsUser: 10002"), "nodes have no rights"),
        (("runAsUser: 999", "runAsUser: 0"), "the store has no rights"),
        (("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"), "nodes have no rights"),
        (("mountPath: /var/lib/chatd", "mountPath: /data"), "the folder can be written"),
        (("defaultMode: 0440", "defaultMode: 0444"), "the password is a file of the secret"),
        (("--appendfsync always", "--appendfsync everysec"), "the store keeps what is acknowledged"),
        (("redis://chatd-store:", "redis://store:"), "nodes share the store"),
        (("  selector: { app.kubernetes.io/name: chatd }", "  selector: { app: chatd }"), "what selects pods finds "),
        (("targetPort: chat ", "targetPort: web "), "clients reach the port"),
        (("maxUnavailable: 1", "maxUnavailable: 3"), "most nodes stay"),
    ],
)
def test_broken_manifest(change, rule):
    assert any(found.startswith(rule) for found in broken(manifest=change))


@pytest.fixture
def answering():
    """A server that answers each request with the status in its list; it notes the paths."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            self.send_response(statuses[0])
            self.end_headers()

        def log_message(self, *_):
            pass

    paths, statuses = [], [200]
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port, statuses, paths
        server.shutdown()
        thread.join()


def check(port):
    """Run the HEALTHCHECK of the Dockerfile against another port, in an environment with a proxy; return its status."""
    _, *words = health_check(TEXTS["Dockerfile"])
    command = [sys.executable, *(word.replace(str(PORT), str(port)) for word in words)]
    proxy = {"http_proxy": "http://127.0.0.1:1/"}
    return subprocess.run(command, env=proxy, stderr=subprocess.DEVNULL, timeout=LONG, check=False).returncode


def test_health_check(answering):
    """It accepts the answer 200 alone: a draining server answers 503."""
    port, statuses, paths = answering
    assert check(port) == 0
    statuses[0] = 503
    assert check(port) == 1
    assert paths == ["/readyz", "/readyz"]


def test_health_check_without_a_server(answering):
    port, *_ = answering
    assert check(port) == 0
    assert check(1) == 1
