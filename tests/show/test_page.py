import base64
import io
import re

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image

from hpm.show.page import colours, data_block, image_uri, page


def test_a_page_escapes_its_title_and_forbids_the_network():
    text = page("a <b> & c", "<p>body</p>", "let x = 1")
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    assert "default-src 'none'" in text and "<script>let x = 1</script>" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http:" not in text
    assert "<script" not in page("t", "<p>body</p>")


def test_data_cannot_end_its_block():
    assert data_block("d", ["</script>"]).count("</script>") == 1
    with pytest.raises(ValueError):
        data_block("d", [float("nan")])


def test_an_image_survives():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    kind, _, text = image_uri(image).partition(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))), image)


def test_the_colours_are_those_of_the_figures():
    magma = (np.array(colormaps["magma"]([0.0, 0.5, 1.0])) * 255).round()[:, :3]
    shown = colours(np.array([[2.0, 3.0, 4.0, np.nan]]))[0]
    assert np.abs(shown[:3] - magma).max() <= 1 and shown[3].tolist() == [128] * 3
    assert colours(np.array([[3.0, 9.0]]), low=1, high=5)[0].tolist() == shown[[1, 2]].tolist()
    assert colours(np.full((2, 2), np.nan)).tolist() == [[[128] * 3] * 2] * 2
    assert np.ptp(colours(np.full((2, 2), 7.0)), axis=(0, 1)).tolist() == [0, 0, 0]


def test_a_browser_keeps_to_the_policy(browser, tmp_path):
    file = tmp_path / "page.html"
    injected = '<script>document.title = "injected"</script><img src="https://example.org/a.png">'
    ours = 'document.querySelector("p").textContent = JSON.parse(document.getElementById("d").text)'
    file.write_text(page("title", data_block("d", "<b>text") + "<p></p>" + injected, ours))
    shown, requests = browser.new_page(), []
    shown.on("requestfinished", lambda request: requests.append(request.url))
    shown.goto(file.as_uri())
    assert shown.text_content("p") == "<b>text"
    assert shown.title() == "title"
    assert not [url for url in requests if url.startswith("http")]
    shown.close()
