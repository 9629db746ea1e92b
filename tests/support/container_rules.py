"""Rules for the files that run chatd in containers: Dockerfile, compose.yaml and docs/kubernetes.yaml."""

import json
import re
import shlex
import tomllib

import yaml
from support.needs import ROOT

import chatd
from chatd import config
from chatd.__main__ import PROGRAMS
from chatd.operate.drain import GRACE_SECONDS

DOCKERFILE, IGNORE, COMPOSE = (ROOT / name for name in ("Dockerfile", ".dockerignore", "compose.yaml"))
MANIFEST = ROOT / "docs" / "kubernetes.yaml"
OPTIONS = {option.variable: option for option in config.OPTIONS}
PORT = 8085
MARGIN = 10
"""Seconds beyond `--drain` that a stop may take, as docs/operations.md advises for systemd."""
DOCKER_STOP = 10
"""Seconds after which `docker stop` kills a container."""
FAILURES = 3
"""The default of `failureThreshold`: failures in a row after which a probe counts."""
PROBE = {"exec", "periodSeconds", "timeoutSeconds"}
"""The keys of a probe that fails three times before it counts."""
SECONDS = re.compile(r"(\d+)s")


def parse_dockerfile(text):
    """Return the stages of a Dockerfile, each a list of its instructions and their values."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", "", lines)
    stages = [[]]
    for line in filter(None, joined.splitlines()):
        word, _, value = line.partition(" ")
        if word == "FROM":
            stages.append([])
        stages[-1].append((word, value.strip()))
    return stages


def values(stage, word):
    """Return the values of the instructions with this word."""
    return [value for name, value in stage if name == word]


def environment_of(stage):
    """Return the variables that a stage sets."""
    pairs = [pair.partition("=") for value in values(stage, "ENV") for pair in shlex.split(value)]
    return {name: value for name, _, value in pairs}


def health_check(text):
    """Return the command of the HEALTHCHECK in a Dockerfile; empty without one in exec form."""
    (found,) = values(parse_dockerfile(text)[-1], "HEALTHCHECK") or [""]
    command = found.partition("CMD ")[2]
    return json.loads(command) if command.startswith("[") else []


def faults(rules):
    """Return the names of the rules that do not hold; a rule that cannot be looked at does not."""
    found = []
    for name, holds in rules.items():
        try:
            if not holds():
                found.append(name)
        except (AttributeError, IndexError, KeyError, SyntaxError, TypeError, ValueError):
            found.append(name)
    return found


def known_options(environment):
    """Return whether all variables are options of chatd, with values that it accepts."""
    for name, text in environment.items():
        if name not in OPTIONS or not isinstance(text, str):
            return False
        OPTIONS[name].parse(text)
    return True


def dockerfile_faults(text, ignore):
    """Return the rules that a Dockerfile with its .dockerignore breaks."""
    before, *stages = parse_dockerfile(text)
    build, final = stages
    runs = [run for stage in stages for run in values(stage, "RUN")]
    installs = [part for run in runs for part in run.split("&&") if " install " in f"{part} " and "pip" in part]
    environment = environment_of(final)
    copied = [word for value in values(build, "COPY") for word in shlex.split(value)[:-1]]
    allowed = [line[1:] for line in ignore.splitlines() if line.startswith("!")]
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*(path.split("/")[0] for path in wheel["only-include"]), "schemas", "seed"}
    folder = values(final, "VOLUME")[0] if values(final, "VOLUME") else ""
    made = " && ".join(values(final, "RUN"))
    return faults(
        {
            "the base can be chosen": lambda: (
                re.fullmatch(r"BASE=python:3\.1[1-4]-slim-\w+", values(before, "ARG")[0])
                and [values(stage, "FROM") for stage in stages] == [["${BASE} AS build"], ["${BASE}"]]
            ),
            "pip installs what is locked": lambda: (
                len(installs) == 3
                and all(
                    {"--require-hashes", "--only-binary=:all:"} <= {*part.split()}
                    or {"--no-index", "--no-deps"} <= {*part.split()}
                    for part in installs
                )
                and {"requirements.txt", "requirements-build.txt"} <= {*copied}
            ),
            "what the wheel is built from is copied": lambda: (
                needed <= {*copied} and all((ROOT / path).exists() for path in copied)
            ),
            "nothing else reaches the engine": lambda: ignore.splitlines()[1] == "*" and {*allowed} == {*copied},
            "the last stage only copies the environment": lambda: (
                values(final, "COPY") == ["--from=build /opt/chatd /opt/chatd"]
                and "pip" not in made
                and environment["PATH"].startswith("/opt/chatd/bin:")
            ),
            "it is not root, by number": lambda: re.fullmatch(r"[1-9]\d*:[1-9]\d*", values(final, "USER")[-1]),
            "its user owns the volume": lambda: (
                f"--uid {values(final, 'USER')[-1].split(':')[0]} " in made
                and f"--create-home --home-dir {folder} " in made
                and f"chmod 700 {folder}" in made
            ),
            "the store lies in the volume": lambda: (
                environment["CHATD_STORE"] == f"sqlite:{folder}/chatd.sqlite" and values(final, "WORKDIR") == [folder]
            ),
            "the drain ends before docker stop kills": lambda: int(environment["CHATD_DRAIN"]) <= DOCKER_STOP // 2,
            "a stop is SIGTERM": lambda: values(final, "STOPSIGNAL") == ["SIGTERM"],
            "the options exist": lambda: known_options(
                {name: text for name, text in environment.items() if name.startswith("CHATD_")}
            ),
            "its first process is chatd": lambda: (
                json.loads(values(final, "ENTRYPOINT")[0]) == ["chatd"]
                and json.loads(values(final, "CMD")[0])[0] in PROGRAMS
            ),
            "the port is the default": lambda: values(final, "EXPOSE") == [str(PORT)],
            "its health is checked without other programs": lambda: (
                health_check(text)[:2] == ["python3", "-c"]
                and compile(health_check(text)[2], "HEALTHCHECK", "exec")
                and all(word in health_check(text)[2] for word in ("'/readyz'", f"127.0.0.1', {PORT}"))
            ),
        }
    )


def seconds(text):
    """Return a time of Docker such as 45s as a number."""
    return int(SECONDS.fullmatch(text)[1])


def haproxy_of(whole):
    """Return the configuration of HAProxy in a compose file, as the container gets it."""
    return whole["configs"]["haproxy"]["content"].replace("$$", "$")


def compose_faults(text, dockerfile):
    """Return the rules that a compose file breaks, beside the Dockerfile of its nodes."""
    whole = yaml.safe_load(text)
    services = whole["services"]
    nodes = {name: one for name, one in services.items() if one.get("image") == "chatd"}
    valkey, haproxy = services["valkey"], services["haproxy"]
    final = parse_dockerfile(dockerfile)[-1]
    uid, _, gid = (values(final, "USER") or [""])[-1].partition(":")
    settings = haproxy_of(whole)
    command = valkey["command"]

    def set_to(word, value):
        return command[command.index(word) + 1] == value

    def written(one):
        """Return whether Docker Compose writes a file into a service before it starts; it refuses a read-only one."""
        return any("file" not in whole["configs"][config["source"]] for config in one.get("configs", []))

    def of_nodes(holds):
        return lambda: all(holds(one) for one in nodes.values())

    return faults(
        {
            "there are three nodes": lambda: [*nodes] == ["chatd-1", "chatd-2", "chatd-3"],
            "one build makes the image of all nodes": lambda: (
                [(name, one["build"]) for name, one in services.items() if "build" in one] == [("chatd-1", ".")]
            ),
            "a node is killed after its drain": of_nodes(
                lambda one: seconds(one["stop_grace_period"]) >= int(one["environment"]["CHATD_DRAIN"]) + MARGIN
            ),
            "nodes share the store": of_nodes(lambda one: one["environment"]["CHATD_STORE"] == "redis://valkey:6379/0"),
            "the options exist": of_nodes(lambda one: known_options(one["environment"])),
            "nodes cannot write": of_nodes(
                lambda one: (
                    one["read_only"] is True
                    and one["tmpfs"] == f"{values(final, 'VOLUME')[0]}:uid={uid},gid={gid},mode=0700"
                    and one["cap_drop"] == ["ALL"]
                )
            ),
            "nodes wait for the store": of_nodes(
                lambda one: one["depends_on"] == {"valkey": {"condition": "service_healthy"}}
            ),
            "clients wait for the nodes": lambda: (
                haproxy["depends_on"] == {name: {"condition": "service_healthy"} for name in nodes}
            ),
            "the store keeps what is acknowledged": lambda: (
                set_to("--appendonly", "yes")
                and set_to("--appendfsync", "always")
                and set_to("--maxmemory-policy", "noeviction")
                and valkey["volumes"] == ["valkey:/data"]
                and "valkey" in whole["volumes"]
            ),
            "the health of the store is known": lambda: (
                valkey["healthcheck"]["test"] == ["CMD", "valkey-cli", "-e", "ping"]
            ),
            "everything starts again, and gains no rights": lambda: all(
                one["restart"] == "unless-stopped"
                and one.get("read_only", False) is not written(one)
                and "no-new-privileges:true" in one["security_opt"]
                for one in services.values()
            ),
            "images say their version": lambda: all(
                re.search(r":\d+\.\d+$", one["image"]) for name, one in services.items() if name not in nodes
            ),
            "only this machine reaches it": lambda: (
                haproxy["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
                and not any("ports" in one for one in services.values() if one is not haproxy)
            ),
            "HAProxy knows the nodes": lambda: (
                re.findall(r"^ +server (\S+) (\S+)$", settings, re.MULTILINE)
                == [(name, f"{name}:{PORT}") for name in nodes]
            ),
            "HAProxy asks the nodes": lambda: (
                "option httpchk GET /readyz" in settings and re.search(r"default-server check inter \ds ", settings)
            ),
            "HAProxy finds a node that was made again": lambda: (
                "nameserver dns 127.0.0.11:53" in settings and "resolvers docker init-addr libc,none" in settings
            ),
            "HAProxy names the client": lambda: (
                ("option forwardfor" in settings)
                == all(one["environment"].get("CHATD_PROXY_HOPS") == "1" for one in nodes.values())
                == ("http-request set-header X-Forwarded-Host %[req.hdr(host)]" in settings)
            ),
            "there are files for the clients": lambda: (
                int(re.search(r"maxconn (\d+)", settings)[1]) * 2 + 100 <= haproxy["ulimits"]["nofile"]
                and all(one["ulimits"] == haproxy["ulimits"] for one in nodes.values())
            ),
            "HAProxy cuts no idle client": lambda: all(
                seconds(found) > int(OPTIONS["CHATD_PING"].default)
                for found in re.findall(r"timeout (?:client|server|tunnel) (\S+)", settings)
            ),
        }
    )


def by_kind(text):
    """Return the documents of a manifest by their kinds and names."""
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}


def pod(text, kind="Deployment", name="chatd"):
    """Return the specification of the pods, and of their one container."""
    found = by_kind(text)[kind, name]["spec"]["template"]["spec"]
    (container,) = found["containers"]
    return found, container


def variables(container):
    """Return the variables of a container that have a value."""
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


def manifest_faults(text, dockerfile):
    """Return the rules that the manifest breaks, beside the Dockerfile of its nodes."""
    documents = by_kind(text)
    final = parse_dockerfile(dockerfile)[-1]
    uid, gid = map(int, values(final, "USER")[-1].split(":"))
    (folder,) = values(final, "VOLUME")
    nodes, node = pod(text)
    store, valkey = pod(text, "StatefulSet", "chatd-store")
    deployment, budget = documents["Deployment", "chatd"]["spec"], documents["PodDisruptionBudget", "chatd"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    service = documents["Service", "chatd"]["spec"]
    environment = variables(node)
    volumes = {one["name"]: one for one in nodes["volumes"]}
    mounts = {one["mountPath"]: one for one in node["volumeMounts"]}
    secrets = {one["valueFrom"]["secretKeyRef"]["name"] for one in valkey["env"] if "valueFrom" in one}
    command = valkey["command"][-1]

    def locked(specification, container, number):
        context, own = specification["securityContext"], container["securityContext"]
        return (
            context["runAsNonRoot"] is True
            and context["runAsUser"] == context["fsGroup"] == number > 0
            and context["seccompProfile"] == {"type": "RuntimeDefault"}
            and own["allowPrivilegeEscalation"] is False
            and own["readOnlyRootFilesystem"] is True
            and own["capabilities"] == {"drop": ["ALL"]}
            and specification["automountServiceAccountToken"] is False
        )

    def asks_admin(handler, request):
        python, option, script = handler["exec"]["command"]
        return (
            (python, option) == ("python3", "-c")
            and compile(script, "handler", "exec")
            and all(word in script for word in (request, "'127.0.0.1', 8086"))
        )

    return faults(
        {
            "a pod is killed after its drain": lambda: (
                nodes["terminationGracePeriodSeconds"] >= int(environment["CHATD_DRAIN"]) + MARGIN
            ),
            "the drain begins before the pod leaves the service": lambda: (
                asks_admin(node["lifecycle"]["preStop"], "'POST', '/drain'")
                and OPTIONS["CHATD_ADMIN"].default == "tcp:8086:interface=127.0.0.1"
                and "CHATD_ADMIN" not in environment
            ),
            "only a ready pod gets clients": lambda: (
                node["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "chat"}
            ),
            "one lost probe takes no pod out of the service": lambda: (
                node["readinessProbe"].get("failureThreshold", FAILURES) > 1
            ),
            "a drained pod leaves the service before its ports close": lambda: (
                node["readinessProbe"]["periodSeconds"] * node["readinessProbe"].get("failureThreshold", FAILURES)
                < min(GRACE_SECONDS, int(environment["CHATD_DRAIN"]) / 4)
            ),
            "no client names its own address": lambda: "CHATD_PROXY_HOPS" not in environment,
            "a store that fails kills no pod": lambda: (
                asks_admin(node["livenessProbe"], "'GET', '/healthz'") and node["livenessProbe"].keys() == PROBE
            ),
            "the options exist": lambda: known_options(environment) and nodes["enableServiceLinks"] is False,
            "the image has the version of this checkout": lambda: (
                node["image"] == f"registry.example/chatd:{chatd.__version__}"
            ),
            "nodes have no rights": lambda: locked(nodes, node, uid) and nodes["securityContext"]["runAsGroup"] == gid,
            "the store has no rights": lambda: locked(store, valkey, 999),
            "the folder can be written": lambda: "emptyDir" in volumes[mounts[folder]["name"]],
            "the password is a file of the secret": lambda: (
                environment["CHATD_STORE_PASSWORD_FILE"] == "/etc/chatd/password"
                and volumes[mounts["/etc/chatd"]["name"]]["secret"]
                == {"secretName": "chatd-store", "defaultMode": 0o440}
                and secrets == {"chatd-store"}
                and '--requirepass "$PASSWORD"' in command
            ),
            "the store keeps what is acknowledged": lambda: (
                "--appendonly yes --appendfsync always" in command
                and "--maxmemory-policy noeviction --dir /data" in command
                and valkey["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
                and documents["StatefulSet", "chatd-store"]["spec"]["volumeClaimTemplates"][0]["metadata"]["name"]
                == "data"
            ),
            "nodes share the store": lambda: (
                environment["CHATD_STORE"] == "redis://chatd-store:6379/0"
                and documents["Service", "chatd-store"]["spec"]["ports"][0]["port"] == 6379
            ),
            "what selects pods finds them": lambda: all(
                found == labels
                for found in (
                    deployment["selector"]["matchLabels"],
                    service["selector"],
                    budget["selector"]["matchLabels"],
                    nodes["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
                )
            ),
            "clients reach the port": lambda: (
                service["ports"] == [{"name": "chat", "port": PORT, "targetPort": "chat"}]
                and node["ports"] == [{"name": "chat", "containerPort": PORT}]
            ),
            "most nodes stay": lambda: (
                deployment["replicas"] >= 3
                and budget["maxUnavailable"] == 1
                and deployment["strategy"] == {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
            ),
        }
    )
