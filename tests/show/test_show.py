"""`hpm show`: on each kind of file, as a figure and as a page."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from helpers import architecture_of, assert_refused, run_here
from PIL import Image
from published import SHAPE, published
from safetensors.torch import save_file

import hpm
from hpm.core.config import PretrainConfig
from hpm.core.errors import UserError
from hpm.data.sources import open_source
from hpm.models.build import build_model
from hpm.show.command import describe_mask, show
from hpm.show.options import ShowConfig


def shown(run, data, out, **options):
    return show(ShowConfig(str(run), str(data), str(out), **options))


def test_show(finished_run, image_folder, tmp_path):
    out = tmp_path / "show.png"
    assert shown(finished_run.folder, image_folder, out, images=3) == out
    assert Image.open(out).height > 500
    one = open_source(str(image_folder)).train.path(0)
    shown(finished_run.folder, one, tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").height < 400


def test_the_panels_asked_for(finished_run, image_folder, tmp_path):
    widths = []
    for panels in (("image", "pca", "attention"), None):
        out = shown(finished_run.folder, image_folder, tmp_path / "x.png", panels=panels, images=1)
        widths.append(Image.open(out).width)
    assert widths[1] == pytest.approx(widths[0] * 7 / 3, rel=0.05)


@pytest.mark.parametrize("kind", ["checkpoint", "backbone", "export", "mae", "mae_encoder", "hpm"])
def test_every_kind_of_file(finished_run, image_folder, tmp_path, capsys, kind):
    no_decoders = "not shown: actual loss, predicted loss, mask, reconstruction (it has a backbone"
    expected = ""
    if kind == "checkpoint":
        file, panels = finished_run.latest_checkpoint(), 7
    elif kind == "backbone":
        file, panels, expected = finished_run.backbone, 3, no_decoders
    elif kind == "export":
        file, panels, expected = tmp_path / "timm.safetensors", 3, no_decoders
        hpm.export(finished_run.folder, to="safetensors", out=file)
    else:
        model = build_model(architecture_of(SHAPE | {"with_predictor": kind == "hpm"}), 1)
        state = published(model)
        if kind == "mae_encoder":
            state = {n: t for n, t in state.items() if not n.startswith(("decoder", "mask_token"))}
            expected = no_decoders
        elif kind == "mae":
            expected = "not shown: predicted loss (it has no loss predictor)"
        file = tmp_path / "weights.pth"
        torch.save({"model": state}, file)
        panels = {"mae": 6, "mae_encoder": 3, "hpm": 7}[kind]
    out = shown(file, image_folder, tmp_path / "x.html", images=2)
    printed, text = capsys.readouterr().out, out.read_text()
    assert len(re.findall(r"<section>", text)) == 2
    heads = text.count(">head 1<") and text.count(">head ") // 2
    assert text.count("<figure>") == 2 * (panels + heads)
    if expected:
        assert expected in printed and expected in text
    else:
        assert "not shown" not in printed


def test_what_is_refused(finished_run, image_folder, tmp_path):
    run = finished_run.folder

    def refused(*words, file=run, out="x.png", **options):
        with pytest.raises(UserError) as caught:
            shown(file, image_folder, tmp_path / out, **options)
        for word in words:
            assert word in str(caught.value), caught.value
        assert not (tmp_path / out).exists()

    backbone = finished_run.backbone
    refused(
        "cannot show mask",
        "backbone only",
        "available: image, pca, attention",
        file=backbone,
        panels=("image", "mask"),
    )
    refused("hard_share", "no loss predictor", file=backbone, hard_share=0.5)
    refused("mask_ratio", "backbone only", file=backbone, mask_ratio=0.5)
    refused("panels is empty", panels=())
    refused("hard_share is 1.5", hard_share=1.5)
    refused("mask_ratio is 0;", mask_ratio=0.0)
    refused("no visible patch of 16", mask_ratio=0.99)
    refused("at least 1", images=0)
    refused("name a .png", out="x.gif")


def test_on_the_command_line(finished_run, image_folder, tmp_path):
    run = finished_run.folder
    result = run_here(
        "show", run, image_folder, "--out", tmp_path / "x.png", "--panels", "image,pca"
    )
    assert result.returncode == 0 and (tmp_path / "x.png").exists()
    result = run_here(
        "show", run, image_folder, "--out", tmp_path / "y.png", "--panels", "image,pac"
    )
    assert_refused(result, "panels", "pac", "attention")


def test_more_images_than_a_file_holds(finished_run, image_folder, tmp_path):
    for name, most, hint in (("fig.png", 100, "a page"), ("fig.html", 2000, "show fewer")):
        config = ShowConfig(
            str(finished_run.folder), str(image_folder), str(tmp_path / name), images=most + 1
        )
        with pytest.raises(UserError, match=f"images is {most + 1}.*at most {most}: {hint}"):
            show(config)


def test_progress_is_shown_while_reading_and_computing(
    finished_run, image_folder, tmp_path, monkeypatch
):
    tracked = []

    def track(steps, description, total):
        tracked.append((description, total))
        return steps

    for module in ("hpm.show.command", "hpm.show.figures"):
        monkeypatch.setattr(f"{module}.track", track)
    show(
        ShowConfig(
            str(finished_run.folder),
            str(image_folder),
            str(tmp_path / "a.html"),
            images=40,
            num_masks=1,
            device="cpu",
        )
    )
    assert tracked == [("reading", 1), ("computing", 3)]


def test_unreadable_images_are_named(finished_run, image_folder, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "good.png")
    (folder / "bad.png").write_text("no image")
    shown(finished_run.folder, folder, tmp_path / "x.png")
    assert "passed over: " in (printed := capsys.readouterr().out) and "bad.png" in printed
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match="no image of 1 can be read .*bad.png"):
        shown(finished_run.folder, folder, tmp_path / "y.png")


@pytest.fixture(scope="module")
def gallery(finished_run, tmp_path_factory):
    """The page of three images, one of whose names is nasty."""
    folder = tmp_path_factory.mktemp("named")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b <b>&amp; 'c'.png", "d.png"):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name)
    out = folder / "page.html"
    return shown(finished_run.folder, folder, out)


def test_the_page_holds_the_pictures(gallery):
    text = gallery.read_text()
    assert "b &lt;b&gt;&amp;amp; &#x27;c&#x27;.png" in text and "://" not in text
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    sizes = [Image.open(io.BytesIO(base64.b64decode(uri))).size for uri in uris]
    maps = [(4, 4)] * 3
    assert sizes == [(16, 16), (4, 4), (4, 4), (16, 16), (16, 16), (4, 4), (4, 4), *maps] * 3


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(browser, gallery, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(gallery.as_uri())
    large, caption = page.locator("dialog img"), page.locator("dialog p")
    assert not large.is_visible()
    page.locator("section img").nth(1).click()
    assert large.is_visible() and caption.inner_text().startswith("actual loss")
    box = large.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] < 800
    first = large.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert caption.inner_text().startswith("predicted loss")
    page.keyboard.press("ArrowDown")
    assert "b <b>&amp; 'c'" in caption.inner_text() and large.get_attribute("src") != first
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    assert large.get_attribute("src") == first
    page.get_by_role("button", name="← panel").click()
    page.get_by_role("button", name="← panel").click()
    assert caption.inner_text().startswith("head 3")  # behind the last panel come the heads
    page.keyboard.press("Escape")
    assert not large.is_visible()
    page.locator("section img").first.press("Enter")
    assert large.is_visible() and caption.inner_text().startswith("image")
    page.get_by_role("button", name="close").click()
    page.locator("section summary").first.click()
    assert page.get_by_text("head 2").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not problems
    page.close()


def test_the_page_without_javascript(browser, gallery):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(gallery.as_uri())
    assert page.locator("section img").first.is_visible()
    assert page.locator("section figcaption", has_text="reconstruction").first.is_visible()
    assert not page.get_by_text("Click a picture").is_visible()
    context.close()


@pytest.mark.parametrize(
    ("mask", "mined"),
    [
        ("hardest", "the hardest"),
        ("easiest", "the easiest"),
        ("attention", "those with the most attention"),
    ],
)
def test_the_page_says_which_patches_are_mined(mask, mined):
    words = describe_mask(PretrainConfig("data", "out", mask=mask), ShowConfig("run"), 0.5)
    assert words.startswith(f"mask {mask}: 75 % of the patches hidden, 50 % of these {mined};")


def test_a_file_of_unknown_tensors(tmp_path, image_folder):
    save_file({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="not a checkpoint"):
        shown(tmp_path / "x.safetensors", image_folder, tmp_path / "x.png")
