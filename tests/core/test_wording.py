"""Texts written for images, as they read for clips."""

import pytest

from hpm.core.wording import worded


@pytest.mark.parametrize(
    ("text", "of_clips"),
    [
        ("Images per second.", "Clips per second."),
        ("losses of an image's patches", "losses of a clip's patches"),
        ("An image of whole images", "A clip of whole clips"),
        ("images_per_second", "images_per_second"),  # a name
    ],
)
def test_words(text, of_clips):
    assert worded(text, True) == of_clips
    assert worded(text, False) == text
