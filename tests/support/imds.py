"""Doubles of the metadata service and of AWS for the programs of an EC2 instance.

Both are one HTTP server in a thread.  The metadata want a token (version 2) and give the role's credentials;
AWS is SSM (JSON), Auto Scaling and Elastic Load Balancing (the query protocol), and takes nothing without the right
signature (Signature Version 4), which is worked out here by hand.
"""

import contextlib
import hashlib
import hmac
import http.server
import json
import os
import secrets
import socketserver
import sys
import threading
import types
import urllib.parse

from support.servers import LONG, ROOT, environment
from support.threads import serving

FILES = ROOT / "packer" / "files"
INSTANCE, REGION, GROUP = "i-0123456789abcdef0", "eu-west-1", "chatd-group"
TARGET_GROUP = f"arn:aws:elasticloadbalancing:{REGION}:123456789012:targetgroup/chatd/0123456789abcdef"
ROLE, KEY, SECRET, SESSION = "chatd", "ASIAEXAMPLE", "not/a+secret", "session-token"
NOTHING_WAITS = "No active Lifecycle Action found with instance ID"
REASONS = {"draining": "Target.DeregistrationInProgress", "unused": "Target.NotRegistered"}


def changed(name, *changes):
    """Return the text of a program of the image, with parts of it changed."""
    text = (FILES / name).read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not in {name} once"
        text = text.replace(old, new)
    return text


def load(name, *changes):
    """Return a program of the image as a module, with parts of its text changed."""
    if str(FILES) not in sys.path:
        sys.path.append(str(FILES))
    text = changed(name, *changes)
    module = types.ModuleType(name.replace("-", "_"))
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is baked as it is
    try:
        exec(compile(text, str(FILES / name), "exec"), vars(module))
    finally:
        sys.dont_write_bytecode = writes
    return module


def surroundings(cloud, **changes):
    """Return the environment of a program, in which it finds this cloud and nothing else of AWS."""
    own = {name: value for name, value in environment().items() if not name.startswith("AWS_")}
    return own | {"PYTHONDONTWRITEBYTECODE": "1"} | settings(cloud) | changes


def settings(cloud):
    """Return the settings that botocore reads."""
    return {
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": cloud.url,
        "AWS_ENDPOINT_URL": cloud.url,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64


class Cloud:
    """The surroundings of one instance; a context manager.  Its attributes can be changed at any time.

    `waiting` has the lifecycle hooks that wait for this instance.
    `faults` has by action, or by path of the metadata, the errors to answer first, each a code and a status; without a
    status the connection is cut.  `asked` has what AWS was asked, each an action, its fields and the fault's code.
    """

    def __init__(self, instance=INSTANCE, address=("127.0.0.1", 0)):
        self.instance = instance
        self.region = REGION
        self.user_data = None
        self.state = "InService"
        self.health = "healthy"
        self.parameters = {}
        self.denied = False
        self.waiting = set()
        self.away = False
        self.role = ROLE
        self.faults = {}
        self.asked = []
        self.tokens = set()
        self.wrong = []
        self._changed = threading.Condition()

        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_PUT(self):
                self.answer(*cloud.token(self))

            def do_GET(self):
                self.answer(*cloud.metadata(self))

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) == length:  # otherwise the program has ended
                    self.answer(*cloud.service(self, body))

            def answer(self, status, body=b""):
                if status is None:
                    return
                with contextlib.suppress(ConnectionError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

        self._server = _Server(address, Handler)
        self.port = self._server.server_port
        self.url = f"http://{address[0]}:{self.port}"
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        self._stack.enter_context(serving(self._server))
        return self

    def __exit__(self, *_):
        self._stack.close()
        assert self.wrong == [], self.wrong

    def _fault(self, name):
        with self._changed:
            left = self.faults.get(name)
            return left.pop(0) if left else None

    # The metadata

    def token(self, request):
        if self.away:
            return (None,)
        if not 1 <= int(request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0)) <= 21600:
            return 400, b""
        token = secrets.token_urlsafe()
        self.tokens.add(token)
        return 200, token.encode()

    def metadata(self, request):
        if self.away:
            return (None,)
        if request.headers.get("X-aws-ec2-metadata-token") not in self.tokens:
            return 401, b""
        path = request.path.removeprefix("/latest/")
        fault = self._fault(path)
        if fault:
            return fault[1], b""
        role = "meta-data/iam/security-credentials/"
        credentials = {"Code": "Success", "Type": "AWS-HMAC", "Expiration": "2099-01-01T00:00:00Z"}
        credentials |= {"AccessKeyId": KEY, "SecretAccessKey": SECRET, "Token": SESSION}
        found = {
            "user-data": self.user_data,
            "meta-data/autoscaling/target-lifecycle-state": self.state,
            "meta-data/instance-id": self.instance,
            "meta-data/placement/region": self.region,
            role: self.role,
            f"{role}{self.role}": json.dumps(credentials),
        }.get(path)
        if found is None:
            return 404, b""
        return 200, found if isinstance(found, bytes) else found.encode()

    # AWS

    def service(self, request, body):
        name = signed(request, body)
        if name is None:
            self.wrong.append(f"not signed: {request.headers}")
            return 403, b""
        target = request.headers.get("X-Amz-Target")
        if target:
            action, fields = target.rpartition(".")[2], json.loads(body)
        else:
            fields = dict(urllib.parse.parse_qsl(body.decode()))
            action = fields.pop("Action")
            fields.pop("Version")
        fault = self._fault(action)
        answers = {"ssm": self._ssm, "autoscaling": self._autoscaling, "elasticloadbalancing": self._balancer}
        if fault is None:
            try:
                fault, answer = answers[name](action, fields)
            except (AssertionError, KeyError) as error:
                self.wrong.append(f"{action} {fields}: {error!r}")
                return 400, b""
        with self._changed:
            self.asked.append((action, fields, fault and fault[0]))
            self._changed.notify_all()
        if fault is None:
            return 200, answer
        code, status, *said = fault
        if status is None:
            return None, b""
        said = said[0] if said else code
        if target:
            return status, json.dumps({"__type": code, "message": said}).encode()
        error = f"<Error><Type>Sender</Type><Code>{code}</Code><Message>{said}</Message></Error>"
        return status, f"<ErrorResponse>{error}<RequestId>1</RequestId></ErrorResponse>".encode()

    def _ssm(self, action, fields):
        assert action == "GetParameter"
        if self.denied:
            return ("AccessDeniedException", 400, "the role may not perform ssm:GetParameter"), None
        name = fields["Name"]
        if name not in self.parameters:
            return ("ParameterNotFound", 400), None
        value = self.parameters[name] if fields.get("WithDecryption") else "AQICAHencrypted"
        parameter = {"Name": name, "Type": "SecureString", "Value": value, "Version": 1}
        return None, json.dumps({"Parameter": parameter}).encode()

    def _autoscaling(self, action, fields):
        assert action in ("CompleteLifecycleAction", "RecordLifecycleActionHeartbeat")
        hook = fields["LifecycleHookName"]
        if (fields["AutoScalingGroupName"], fields["InstanceId"]) != (GROUP, self.instance) or hook not in self.waiting:
            return ("ValidationError", 400, f"{NOTHING_WAITS} {fields['InstanceId']}"), None
        if action == "CompleteLifecycleAction":
            assert fields["LifecycleActionResult"] in ("CONTINUE", "ABANDON")
            self.waiting.discard(hook)
            if (hook, fields["LifecycleActionResult"]) == ("chatd-launch", "ABANDON"):
                self.state = "Terminated"
                self.waiting.add("chatd-terminate")  # the group waits for this hook of every instance that ends
        return None, f"<{action}Response><{action}Result/></{action}Response>".encode()

    def _balancer(self, action, fields):
        assert action == "DescribeTargetHealth"
        if fields["TargetGroupArn"] != TARGET_GROUP:
            return ("TargetGroupNotFound", 400), None
        assert fields == {"TargetGroupArn": TARGET_GROUP, "Targets.member.1.Id": self.instance}
        reason = f"<Reason>{REASONS[self.health]}</Reason>" if self.health in REASONS else ""
        target = f"<Target><Id>{self.instance}</Id><Port>8085</Port></Target>"
        health = f"<TargetHealth><State>{self.health}</State>{reason}</TargetHealth>"
        members = f"<TargetHealthDescriptions><member>{target}{health}</member></TargetHealthDescriptions>"
        return None, f"<{action}Response><{action}Result>{members}</{action}Result></{action}Response>".encode()

    # Interface of the tests

    def taken(self, action):
        """Return the fields of the requests for an action that succeeded."""
        with self._changed:
            return [fields for name, fields, fault in self.asked if name == action and fault is None]

    def wait(self, action, count=1, *, fault=None, seconds=LONG):
        """Wait until so many requests have come that went well, or ended in this fault."""

        def enough():
            return len([1 for name, _, ended in self.asked if (name, ended) == (action, fault)]) >= count

        with self._changed:
            assert self._changed.wait_for(enough, seconds), self.asked


def signed(request, body):
    """Return the service that a request is signed for with the role's credentials; None if it is not."""
    head = request.headers
    scheme, _, rest = head.get("Authorization", "").partition(" ")
    parts = dict(part.strip().partition("=")[::2] for part in rest.split(","))
    if scheme != "AWS4-HMAC-SHA256" or head.get("X-Amz-Security-Token") != SESSION:
        return None
    key, date, region, service, last = parts["Credential"].split("/")
    if (key, region, last) != (KEY, REGION, "aws4_request"):
        return None
    names = parts["SignedHeaders"].split(";")
    if not {"host", "x-amz-date", "x-amz-security-token"} <= {*names}:
        return None
    lines = "".join(f"{name}:{' '.join(head[name].split())}\n" for name in names)
    canonical = "\n".join(["POST", "/", "", lines, ";".join(names), hashlib.sha256(body).hexdigest()])
    scope = f"{date}/{region}/{service}/{last}"
    text = "\n".join([scheme, head["X-Amz-Date"], scope, hashlib.sha256(canonical.encode()).hexdigest()])
    secret = f"AWS4{SECRET}".encode()
    for part in (date, region, service, last, text):
        secret = hmac.digest(secret, part.encode(), "sha256")
    return service if hmac.compare_digest(secret.hex(), parts["Signature"]) else None
