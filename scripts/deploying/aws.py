"""Calls to AWS, whose errors are one line with the remedy, and the clock for polling.

botocore retries transient errors, AWS_MAX_ATTEMPTS times.  An error that remains is *passing* if a later attempt may
succeed without anyone's action.  Callers that poll retry passing errors; all others give up.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from typing import Any, Final

import botocore.config
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError, NoCredentialsError  # noqa: A004
from botocore.parsers import ResponseParserError

PREFIXES: Final = {"elbv2": "elasticloadbalancing", "service-quotas": "servicequotas"}
"""Names of services in IAM that differ from those in botocore."""
DENIED: Final = frozenset(("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "NotAuthorized"))
ELSEWHERE: Final = frozenset(("AuthFailure", "InvalidClientTokenId", "OptInRequired", "UnrecognizedClientException"))
"""Error codes for invalid credentials, or for a region that the account has not enabled."""
INVALID: Final = ELSEWHERE | {
    *("ExpiredToken", "ExpiredTokenException", "IncompleteSignature", "InvalidSignatureException"),
    *("RequestExpired", "SignatureDoesNotMatch"),
}
"""All error codes with which no call of the credentials succeeds here."""
THROTTLED: Final = frozenset(
    ("RequestLimitExceeded", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException")
)
FAULTS: Final = (ClientError, BotoCoreError, ResponseParserError)
"""The exceptions that botocore raises."""
REFUSED: Final = re.compile(r"not authorized to perform: ([\w-]+:\w+)")
"""The action that a denied caller lacks, which need not be that of the call."""
POLL_SECONDS: Final = 10
"""The interval between polls."""


class DeployError(Exception):
    """A failure before anything was changed; the text gives the reason and the remedy."""

    status = 1
    """The exit status of scripts/deploy."""


class CallDenied(DeployError):
    """It is not safe to begin, and nothing was changed."""

    status = 3


class RolledBack(DeployError):
    """The rollout failed and was rolled back."""

    status = 4


class Stuck(DeployError):
    """The rollout neither succeeded nor was rolled back: manual action is needed."""

    status = 5


class AwsError(DeployError):
    """A call to AWS failed."""

    def __init__(self, text: str, code: str = "", *, passing: bool = False) -> None:
        super().__init__(text)
        self.code = code
        """The error code of the service; empty if it sent none."""
        self.passing = passing


def say(text: str) -> None:
    """Print a line of progress, with the time, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: T201


class Clock:
    """A monotonic clock that can sleep."""

    def now(self) -> float:
        """Return the seconds since an arbitrary moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Sleep for a number of seconds."""
        time.sleep(seconds)


class Counted(Clock):
    """A clock for tests: `sleep` returns at once and advances the clock."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def clock() -> Clock:
    """Return a clock: with CHATD_DEPLOY_CLOCK=counted in the environment, one for tests."""
    return Counted() if os.environ.get("CHATD_DEPLOY_CLOCK") == "counted" else Clock()


class Account:
    """One region of the account that the environment names."""

    def __init__(self, region: str) -> None:
        self.region = region
        self._session = botocore.session.Session()
        self._clients: dict[str, Any] = {}

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call an operation by its name in botocore and return the answer; raises AwsError."""
        try:
            answer: dict[str, Any] = getattr(self._client(service), operation)(**arguments)
        except FAULTS as error:
            raise _plain(service, operation, error) from error
        return answer

    def pages(self, service: str, operation: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Yield the items under a key from all pages of an answer; raises AwsError."""
        try:
            for page in self._client(service).get_paginator(operation).paginate(**arguments):
                yield from page[key]
        except FAULTS as error:
            raise _plain(service, operation, error) from error

    def listen(self, heard: Callable[[str, Mapping[str, Any], Mapping[str, Any]], None]) -> None:
        """Have a function called with the name, the arguments and the answer of each call, page by page.

        The name is that of the service in botocore, a colon, and that of the operation.  An error is an answer too.
        """

        def ask(params: Mapping[str, Any], context: dict[str, Any], **_more: Any) -> None:
            context["asked"] = {**params}

        def note(parsed: Mapping[str, Any], model: Any, context: Mapping[str, Any], **_more: Any) -> None:
            heard(f"{model.service_model.service_name}:{model.name}", context["asked"], parsed)

        self._session.register("provide-client-params", ask)
        self._session.register("after-call", note)
        self._clients.clear()

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            config = botocore.config.Config(retries={"mode": "standard"}, connect_timeout=10, read_timeout=60)
            self._clients[service] = self._session.create_client(service, region_name=self.region, config=config)
        return self._clients[service]


def _plain(service: str, operation: str, error: ClientError | BotoCoreError | ResponseParserError) -> AwsError:
    """Convert an exception of botocore to an AwsError of one line."""
    name = f"{PREFIXES.get(service, service)}:{''.join(word.capitalize() for word in operation.split('_'))}"
    code = ""
    passing = isinstance(error, ConnectionError | HTTPClientError | ResponseParserError)  # the last comes from a proxy
    if isinstance(error, ConnectionError):
        text = f"{name}: {' '.join(str(error).split())}: check the region and the network, and run this again"
    elif passing:
        text = f"{name}: cannot reach AWS, or it did not answer: run this again"
    elif isinstance(error, NoCredentialsError):
        text = "no credentials for AWS: log in, or name a profile with AWS_PROFILE"
    elif not isinstance(error, ClientError):
        text = f"{name}: {' '.join(str(error).split())}"
    else:
        code, words = error.response["Error"]["Code"], " ".join(error.response["Error"]["Message"].split())
        failing = error.response["ResponseMetadata"]["HTTPStatusCode"] >= HTTPStatus.INTERNAL_SERVER_ERROR
        passing = code in THROTTLED or failing
        if code in DENIED:
            action = found[1] if (found := REFUSED.search(words)) else name
            text = f"access denied: {action}: the role needs this action (docs/deploy.md has the policy)"
            if "explicit deny" in words:
                text = f"access denied: {action}: a policy denies this action: {words}"
        elif code in ELSEWHERE:
            text = f"{name}: the credentials are invalid in this region: log in again, or enable the region ({code})"
        elif code in INVALID:
            text = f"{name}: the credentials are invalid or expired: log in again ({code})"
        elif code in THROTTLED:
            text = f"{name}: AWS throttles this account: run this again in a minute"
        else:
            text = f"{name}: {words}" + (": run this again" if failing else "")
    return AwsError(text, code, passing=passing)
