"""What an EC2 instance knows of itself, and how it asks AWS: for chatd-boot and chatd-lifecycle.

Both endpoints can be moved by botocore's own variables, AWS_EC2_METADATA_SERVICE_ENDPOINT and AWS_ENDPOINT_URL.
"""
# ruff: noqa: INP001 -- installed beside the two programs

import os
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
"""Where every instance finds its metadata."""
METADATA_SECONDS: Final = 2
"""How long the metadata service may take; it is on the same machine."""
TOKEN_SECONDS: Final = 60
"""How long a token for it is good."""
CONNECT_SECONDS: Final = 3
READ_SECONDS: Final = 10
"""How long a service of AWS may take."""
ATTEMPTS: Final = 4
"""How often botocore tries: throttling, 5xx and time-outs, with its own backoff."""
ROOM: Final = "launch"
"""Where chatd-lifecycle posts, so that nobody is disturbed; chatd-boot lets it."""
TROUBLE: Final = (OSError, HTTPException, BotoCoreError, ClientError, ResponseParserError)
"""What asking may end in; another time it may go well."""


def ask(method: str, url: str, seconds: float, **headers: str) -> str:
    """Ask by plain HTTP; answers the body, or fails with one of TROUBLE, FileNotFoundError for 404."""
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
        raise FileNotFoundError(f"{url}: there is nothing")
    if answer.status >= HTTPStatus.MULTIPLE_CHOICES:
        raise OSError(f"{url}: {answer.status} {answer.reason}")
    return body


def metadata(path: str) -> str | None:
    """What the instance's metadata have at a path, None if nothing; or one of TROUBLE.

    Version 2 of the service wants a token.  It gets a new one for each question, so that there is none to renew.
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/") + "/latest"
    seconds = str(TOKEN_SECONDS)
    token = ask("PUT", f"{base}/api/token", METADATA_SECONDS, X_aws_ec2_metadata_token_ttl_seconds=seconds)
    try:
        return ask("GET", f"{base}/{path}", METADATA_SECONDS, X_aws_ec2_metadata_token=token)
    except FileNotFoundError:
        return None


def service(name: str, region: str) -> Any:
    """A client of a service of AWS, with the credentials of the instance's role; one of TROUBLE without any."""
    session = botocore.session.Session()
    if session.get_credentials() is None:
        raise NoCredentialsError  # once made, a client never looks for any again
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    return session.create_client(name, region_name=region, config=config)


def words(error: BaseException) -> str:
    """What went wrong, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
