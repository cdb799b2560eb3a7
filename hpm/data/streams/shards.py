"""The shards that a name with braces, `*` or `?` stands for."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections import Counter
from itertools import islice

from hpm.core.errors import UserError, counted, one_line
from hpm.core.extras import need
from hpm.data.streams.transport import Permanent, is_remote, s3_client, s3_errors, split_s3

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MOST_SHARDS = 1_000_000
WILD = re.compile(r"[*?\[]")


def names_archives(data: str) -> bool:
    """Whether DATA names archives of images: by its suffix, or because it is an address."""
    path = data.partition("?")[0] if is_remote(data) else data
    return is_remote(data) or path.lower().endswith(ARCHIVES)


def find_shards(data: str) -> list[str]:
    """Paths or addresses of the shards: braces are expanded first, then `*`, `?` and `[...]`.

    Raises UserError if there are none, if one is missing, or if a server cannot list them.
    """
    shards: list[str] = []
    for pattern in _expanded(data):
        shards += _matching(pattern)
    if not shards:
        raise UserError(f"{data}: no shard matches")
    if len(set(shards)) < len(shards):
        twice, _ = Counter(shards).most_common(1)[0]
        raise UserError(f"{data}: {twice} is named twice")
    return shards


def _expanded(data: str) -> list[str]:
    if "{" not in data or os.path.exists(data):
        return [os.path.expanduser(data)]
    braces = need("braceexpand", "stream", "braces in a name")
    try:
        patterns = list(islice(braces.braceexpand(data), MOST_SHARDS + 1))
    except ValueError as error:
        raise UserError(f"{data}: {one_line(error)}") from None
    if len(patterns) > MOST_SHARDS:
        raise UserError(f"{data}: more than {counted(MOST_SHARDS, 'shard')}")
    return [os.path.expanduser(pattern) for pattern in patterns]


def _matching(pattern: str) -> list[str]:
    if pattern.startswith("s3://"):
        return _in_bucket(pattern) if WILD.search(pattern) else [pattern]
    if is_remote(pattern):
        if "*" in pattern.partition("?")[0]:
            raise UserError(
                f"{pattern}: a web server does not list its files: write the shards with braces, "
                "such as shard-{000..099}.tar"
            )
        return [pattern]
    if os.path.exists(pattern):
        return [pattern]
    if WILD.search(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    raise UserError(f"{pattern}: no such file")


def _in_bucket(pattern: str) -> list[str]:
    """The objects that a pattern matches. Unlike in paths, `*` also matches `/`."""
    bucket, wanted = split_s3(pattern)
    start = WILD.search(wanted)
    prefix = wanted[: start.start()] if start else wanted
    try:
        with s3_errors():
            pages = s3_client().get_paginator("list_objects_v2")
            keys = [
                entry["Key"]
                for page in pages.paginate(Bucket=bucket, Prefix=prefix)
                for entry in page.get("Contents", [])
            ]
    except (Permanent, OSError) as error:
        raise UserError(f"{pattern}: {one_line(error)}") from None
    except Exception as error:  # botocore's, of a connection
        raise UserError(f"{pattern}: no connection: {one_line(error, 200)}") from None
    return [f"s3://{bucket}/{key}" for key in sorted(keys) if fnmatch.fnmatchcase(key, wanted)]
