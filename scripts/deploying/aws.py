"""The account: calls to AWS, whose errors are one line with the remedy, and the clock by which it is waited for.

botocore repeats what failed for a moment (AWS_MAX_ATTEMPTS says how often).  What fails all the same is *passing* if a
later try may succeed and nobody need do anything for that: who waits for something goes on, anybody else gives up.
"""

import os
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, Final

import botocore.config
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, NoCredentialsError
from botocore.parsers import ResponseParserError

PREFIXES: Final = {"elbv2": "elasticloadbalancing"}
"""What IAM calls a service, where botocore calls it otherwise."""
DENIED: Final = frozenset(("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "NotAuthorized"))
INVALID: Final = frozenset(
    {"AuthFailure", "ExpiredToken", "ExpiredTokenException", "IncompleteSignature", "InvalidClientTokenId"}
    | {"InvalidSignatureException", "RequestExpired", "SignatureDoesNotMatch", "UnrecognizedClientException"}
)
THROTTLED: Final = frozenset(
    ("RequestLimitExceeded", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequestsException")
)
FAULTS: Final = (ClientError, BotoCoreError, ResponseParserError)
"""What botocore raises."""
POLL_SECONDS: Final = 10
"""How often it is looked at what is waited for."""


class DeployError(Exception):
    """It failed before anything was changed; the text says why, and what to do."""

    status = 1
    """The exit status that says so."""


class CallDenied(DeployError):
    """It is not safe to begin."""

    status = 3


class RolledBack(DeployError):
    """It was begun, went wrong, and what ran before runs again."""

    status = 4


class Stuck(DeployError):
    """It was begun, and neither done nor undone: a person is needed."""

    status = 5


class AwsError(DeployError):
    """AWS did not do what it was asked."""

    def __init__(self, text: str, code: str = "", *, passing: bool = False) -> None:
        super().__init__(text)
        self.code = code
        """The service's own word for it, if it said one."""
        self.passing = passing


def say(text: str) -> None:
    """Tell how far it is, on standard error."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)  # noqa: T201


class Clock:
    """Seconds, and waiting for them."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


class Counted(Clock):
    """A clock for rehearsals, which goes on only, and at once, when it is waited for."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


def clock() -> Clock:
    """The clock that is asked for in the environment: with CHATD_DEPLOY_CLOCK=counted, one for rehearsals."""
    return Counted() if os.environ.get("CHATD_DEPLOY_CLOCK") == "counted" else Clock()


class Account:
    """The account that the environment names, in one region."""

    def __init__(self, region: str) -> None:
        self._region = region
        self._session = botocore.session.Session()
        self._clients: dict[str, Any] = {}

    def call(self, service: str, operation: str, **arguments: Any) -> dict[str, Any]:
        """Call an operation, by botocore's name of it; AwsError if it fails."""
        try:
            answer: dict[str, Any] = getattr(self._client(service), operation)(**arguments)
        except FAULTS as error:
            raise _plain(service, operation, error) from error
        return answer

    def pages(self, service: str, operation: str, key: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """What is listed under a key on all pages of an answer; AwsError."""
        try:
            for page in self._client(service).get_paginator(operation).paginate(**arguments):
                yield from page[key]
        except FAULTS as error:
            raise _plain(service, operation, error) from error

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            config = botocore.config.Config(retries={"mode": "standard"}, connect_timeout=10, read_timeout=60)
            self._clients[service] = self._session.create_client(service, region_name=self._region, config=config)
        return self._clients[service]


def _plain(service: str, operation: str, error: ClientError | BotoCoreError | ResponseParserError) -> AwsError:
    """An error of botocore's in one line."""
    name = f"{PREFIXES.get(service, service)}:{''.join(word.capitalize() for word in operation.split('_'))}"
    code = ""
    passing = isinstance(error, HTTPClientError | ResponseParserError)  # the latter is what a proxy has said
    if passing:
        text = f"{name}: AWS cannot be reached, or did not answer: run this again"
    elif isinstance(error, NoCredentialsError):
        text = "there are no credentials for AWS: log in, or name a profile with AWS_PROFILE"
    elif not isinstance(error, ClientError):
        text = f"{name}: {' '.join(str(error).split())}"
    else:
        code, words = error.response["Error"]["Code"], " ".join(error.response["Error"]["Message"].split())
        failing = error.response["ResponseMetadata"]["HTTPStatusCode"] >= HTTPStatus.INTERNAL_SERVER_ERROR
        passing = code in THROTTLED or failing
        if code in DENIED:
            text = f"access denied: {name}: the role needs this action (docs/deploy.md has the policy)"
        elif code in INVALID:
            text = f"{name}: the credentials are not valid, or not any longer: log in again ({code})"
        elif code in THROTTLED:
            text = f"{name}: AWS throttles this account: run this again in a minute"
        else:
            text = f"{name}: {words}" + (": run this again" if failing else "")
    return AwsError(text, code, passing=passing)
