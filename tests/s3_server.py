"""An object store for tests: moto's server, which speaks S3, on this machine."""

from __future__ import annotations

import contextlib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer


@contextlib.contextmanager
def bucket() -> Iterator[Any]:
    """A client of a server with an empty bucket of the name ``bucket``, to which the environment points."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    values = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (values | {"DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(f"AWS_{key}", value)
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()


def objects(client: Any) -> dict[str, tuple]:
    """Time and ETag of all objects by their keys."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket")
    return {o["Key"]: (o["LastModified"], o["ETag"]) for page in pages for o in page.get("Contents", [])}


def upload(client: Any, folder: Path, prefix: str) -> None:
    """Copy all files of a folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            client.put_object(Bucket="bucket", Key=f"{prefix}/{file.relative_to(folder)}", Body=file.read_bytes())


def content(client: Any, key: str) -> bytes:
    """Content of an object."""
    return client.get_object(Bucket="bucket", Key=key)["Body"].read()
