"""The metadata of an EC2 instance, and calls to AWS, for chatd-agent, chatd-boot and chatd-lifecycle.

The variables of botocore, AWS_EC2_METADATA_SERVICE_ENDPOINT and AWS_ENDPOINT_URL, change the endpoints.
"""
# ruff: noqa: INP001 -- installed beside the programs that use it

import os
import re
from collections.abc import Callable
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from typing import Any, Final
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from botocore.parsers import ResponseParserError

METADATA: Final = "http://169.254.169.254"
"""The address of the metadata service on every instance."""
METADATA_SECONDS: Final = 2
"""The timeout of the metadata service, which is on the same machine."""
TOKEN_SECONDS: Final = 60
"""The lifetime of a token for the metadata service."""
CONNECT_SECONDS: Final = 3
READ_SECONDS: Final = 10
"""The timeout of an AWS service."""
ATTEMPTS: Final = 4
"""The attempts of botocore on throttling, 5xx and timeouts, with its own backoff."""
LAUNCH_HOOK: Final = "chatd-launch"
"""The hook of the group that keeps a new instance out of service until it is completed."""
TERMINATE_HOOK: Final = "chatd-terminate"
"""The hook of the group that keeps an instance that ends from being terminated until it is completed."""
ROOM: Final = "launch"
"""The room that chatd-lifecycle posts to, which nobody reads; chatd-boot permits it."""
TROUBLE: Final = (OSError, HTTPException, BotoCoreError, ClientError, ResponseParserError)
"""Errors of a request that may succeed later."""


def ask(method: str, url: str, seconds: float, **headers: str) -> str:
    """Send a plain HTTP request and return the body; raises one of TROUBLE, FileNotFoundError for 404."""
    place = urlsplit(url)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with closing(HTTPConnection(str(place.hostname), place.port, timeout=seconds)) as connection:
        try:
            connection.request(method, place.path, headers=named)
            answer = connection.getresponse()
            body = answer.read().decode()
        except OSError as error:
            raise OSError(f"{url}: {error.strerror or error}") from None
    if answer.status == HTTPStatus.NOT_FOUND:
        raise FileNotFoundError(f"{url}: not found")
    if answer.status >= HTTPStatus.MULTIPLE_CHOICES:
        raise OSError(f"{url}: {answer.status} {answer.reason}")
    return body


def metadata(path: str) -> str | None:
    """Return the metadata of the instance at a path, or None; raises one of TROUBLE.

    Version 2 of the service requires a token.  Each request uses a new one, so that none has to be renewed.
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/") + "/latest"
    seconds = str(TOKEN_SECONDS)
    token = ask("PUT", f"{base}/api/token", METADATA_SECONDS, X_aws_ec2_metadata_token_ttl_seconds=seconds)
    try:
        return ask("GET", f"{base}/{path}", METADATA_SECONDS, X_aws_ec2_metadata_token=token)
    except FileNotFoundError:
        return None


def group() -> str | None:
    """Return the Auto Scaling group that user data name, or None; raises one of TROUBLE.

    The other lines may be wrong.  The name must also fit a log group.
    """
    try:
        text = metadata("user-data") or ""
    except UnicodeDecodeError:
        return None
    found = re.search(r"^\s*CHATD_GROUP=[ \t]*([A-Za-z0-9_.-]+)\s*$", text, re.MULTILINE)
    return found and found[1]


def act(action: Callable[..., object], **about: str) -> bool:
    """Act on a lifecycle hook of a group; returns False if the hook is not active.  Raises one of TROUBLE."""
    try:
        action(**about)
    except ClientError as error:
        if "no active lifecycle action" in error.response["Error"]["Message"].lower():
            return False
        raise
    return True


def service(name: str, region: str) -> Any:
    """Return a client of an AWS service with the credentials of the instance's role; raises one of TROUBLE."""
    session = botocore.session.Session()
    if session.get_credentials() is None:
        raise NoCredentialsError  # a client that was made without credentials never looks again
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    return session.create_client(name, region_name=region, config=config)


def words(error: BaseException) -> str:
    """Return an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
