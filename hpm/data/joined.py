"""Several sources of images named together: `photos/,scans/`."""

from __future__ import annotations

import re
from pathlib import Path

from hpm.core.errors import UserError
from hpm.data.chain import Chain
from hpm.data.contract import Splits
from hpm.data.streams.stream import Stream
from hpm.data.video.sources import holds_videos


def several(data: str) -> list[str]:
    """The names that DATA holds, separated by commas outside of braces; one if there is a file or
    folder of that name."""
    if "," not in data or Path(data).expanduser().exists():
        return [data]
    return [name for name in re.split(r",(?![^{]*\})", data) if name]


def join(opened: dict[str, Splits | Stream]) -> Splits:
    """The images of several sources as one. They have labels if all of them have.

    Raises UserError for streams, and for images with videos.
    """
    found: list[Splits] = []
    for name, each in opened.items():
        if not isinstance(each, Splits):
            raise UserError(f"{name} is a stream: name streams by one pattern, such as 'a/*.tar'")
        found.append(each)
    if len({holds_videos(each.train) for each in found}) > 1:
        raise UserError(f"{' and '.join(opened)} hold images and videos: name them one at a time")
    tests = [each.test for each in found if each.test is not None]
    return Splits(
        Chain([each.train for each in found], partly_labelled=False),
        Chain(tests, partly_labelled=False) if tests else None,
    )
