"""Figures, pages and the report of runs on clips: film strips and animations."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import TINY, assert_refused, run_here
from PIL import Image
from videos import write_video

import hpm
from hpm.show.command import check_shares
from hpm.show.figures import Picture, pixels
from hpm.show.moments import keep_animations, read_animations
from hpm.show.page import FRAME_DURATION
from hpm.show.strips import all_frames, as_strips, cut, frames_text
from hpm.show.view import Viewer, _examples
from hpm.weights.resolve import load

FRAMES = 4
URI = re.compile(r"data:image/webp;base64,([A-Za-z0-9+/=]+)")


@pytest.fixture(scope="module")
def clip_run(tmp_path_factory):
    options = {"frames": FRAMES, "patch_size": (2, 4, 4), "normalize": "imagenet", "holdout": 2}
    out = tmp_path_factory.mktemp("runs") / "clips"
    return hpm.pretrain(data="demo-video", out=str(out), **TINY | {"steps": 2} | options)


def animation(uri):
    """uint8 [T H W 3]; equal frames are stored as a longer one."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri)))
    frames = []
    for number in range(picture.n_frames):
        picture.seek(number)
        frame = np.asarray(picture.convert("RGB"))  # which also reads its duration
        frames += [frame] * round(picture.info["duration"] / FRAME_DURATION)
    assert picture.info["loop"] == 0
    return np.stack(frames)


@pytest.fixture
def shown():
    """Two clips of 4 frames in tubes of 2, each with a mask and a predicted loss."""
    chance = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (2, 3, FRAMES, 8, 12), generator=chance, dtype=torch.uint8)
    predicted, noise = torch.rand(2, 2, 12, generator=chance)
    return Picture(clips, (2, 2, 3), predicted=predicted, mask=noise < 0.5)


def test_frames_of_panels(shown):
    """Each frame has the map of its tube, in the colours of the whole clip."""
    found = {n: cut(p, FRAMES) for n, p in pixels(all_frames(shown), 1).items()}
    assert np.array_equal(found["image"], shown.images[1].permute(1, 2, 3, 0).numpy())
    predicted = found["predicted"]
    assert predicted.shape == (FRAMES, 2, 3, 3)
    assert np.array_equal(predicted[0], predicted[1]) and not np.array_equal(*predicted[1:3])
    brightest = predicted.sum(-1)[::2].reshape(-1).argmax()
    assert brightest == shown.predicted[1].argmax()
    hidden = shown.mask[1].view(2, 2, 3).repeat_interleave(2, 0)
    covered = hidden.repeat_interleave(4, 1).repeat_interleave(4, 2).numpy()
    assert (found["mask"][covered] == 128).all()
    assert np.array_equal(found["mask"][~covered], found["image"][~covered])
    # A strip has the first frame of each tube.
    strip = pixels(as_strips(shown), 1)["image"]
    assert np.array_equal(strip, np.concatenate(found["image"][::2], axis=1))


def test_pages_and_figures(clip_run, tmp_path):
    for name in ("a.html", "a.png"):
        result = run_here(
            "show",
            clip_run.folder,
            "demo-video",
            "--images=2",
            "--num-masks=2",
            "--out",
            tmp_path / name,
        )
        assert result.returncode == 0, result.stderr
    width, height = Image.open(tmp_path / "a.png").size
    assert width > 4 * height  # two strips beneath each other, seven panels side by side
    page = (tmp_path / "a.html").read_text()
    assert page.count("<figcaption>clip<") == 2 * 2  # as an animation and as a strip
    assert "<figcaption>image<" not in page and "from clip to clip" in page
    found = [animation(uri) for uri in URI.findall(page)]
    panels = 7 + 3  # each head's attention as well
    assert len(found) == 2 * panels
    assert found[0].shape == (FRAMES, 16, 16, 3) and found[1].shape == (FRAMES, 4, 4, 3)
    assert (found[0][0] != found[0][-1]).any()
    too_many = run_here(
        "show", clip_run.folder, "demo-video", "--images=11", "--out", tmp_path / "b.png"
    )
    assert_refused(too_many, "images is 11, but a .png file holds at most 10 clips: a page")


def test_a_backbone_alone(clip_run, tmp_path):
    """Without a config: the frames are those of its clips."""
    out = tmp_path / "x.html"
    result = run_here("show", clip_run.backbone, "demo-video", "--images=1", "--out", out)
    assert result.returncode == 0, result.stderr
    assert len(URI.findall(out.read_text())) == 3 + 3


def test_the_viewer(clip_run, tmp_path):
    trained = load(clip_run.folder)
    trained.model.eval()
    viewer = Viewer(trained, *_examples(None, trained), 2)
    page = viewer.page()
    assert "<dt>clip</dt>" in page and "from the whole clip" in page
    assert "clips of 4 x 16 x 16 pixels" in page and "Drop a video here" in page
    answers = [viewer.answer({"example": "1"}, b"")]
    answers.append(viewer.answer({}, write_video(tmp_path / "a.mp4").read_bytes()))
    for answer in answers:
        assert "error" not in answer, answer
        assert answer["panels"][0]["title"] == "clip"
        for panel in answer["panels"]:
            (uri,) = URI.findall(panel["src"])
            assert len(animation(uri)) == FRAMES
    for body in (b"nothing", b""):
        assert set(viewer.answer({}, body)) == {"error"}


def test_a_share_that_hides_all_tubes(clip_run):
    """It leaves one of 32 patches visible, but none of 16 tubes."""
    trained = load(str(clip_run.folder))
    check_shares(trained, None, 0.95)
    trained.config.mine_tubes = "mean"
    with pytest.raises(hpm.UserError, match="mask_ratio 0.95 leaves no visible patch"):
        check_shares(trained, None, 0.95)


def words_of(page):
    """The text of a page, without scripts, options and their values."""
    page = re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]+>", " ", page)


def test_a_comparison(clip_run, image_folder, tmp_path):
    """Nothing on the page calls the clips images; beside a run on images, they are."""
    other, out = tmp_path / "other", tmp_path / "compared.html"
    shutil.copytree(clip_run.folder, other)
    row = {"trained, patch mean": {"k = 5": {"top1": 60.0, "top1_low": 50.0, "top1_high": 70.0}}}
    about = {"data": "demo-video", "weights": "student", "step": 2, "run": "r"}
    result = {"protocol": "knn", "values": row, "hardness": {}, "about": about}
    (other / "evals").mkdir(exist_ok=True)
    (other / "evals" / "knn.json").write_text(json.dumps(result))
    found = run_here("compare", clip_run.folder, other, "--images", 2, "--out", out)
    assert found.returncode == 0, found.stderr
    words = words_of(out.read_text())
    assert "The same clips" in words and "Clips of demo-video" in words
    assert "over the test clips" in words and "Clips per second." in words
    assert not re.findall(r".*\bimages?\b.*", words, flags=re.IGNORECASE)
    images = hpm.pretrain(str(image_folder), str(tmp_path / "i"), **TINY | {"steps": 1})
    found = run_here("compare", clip_run.folder, images.folder, "--images", 0, "--out", out)
    assert found.returncode == 0, found.stderr
    words = words_of(out.read_text())
    assert "held-out images" in words and "the runs differ in frames" in " ".join(words.split())


def test_the_log(clip_run):
    text = (clip_run.folder / "train.log").read_text()
    for words in (" videos of demo-video", " steps of 8 clips", " clips/s", "held-out clips"):
        assert words in text, text
    assert not re.findall(r".*\bimages?\b.*", text)


def test_the_summary_in_a_notebook(clip_run):
    html = clip_run._repr_html_()
    assert "held-out clips" in html and not re.search(r"\bimages?\b", words_of(html))


def test_the_report(clip_run, shown, tmp_path):
    text = (clip_run.folder / "report.html").read_text()
    assert not re.findall(r".*\bimages?\b.*", words_of(text), flags=re.IGNORECASE)
    assert "Each row is a held-out clip" in text and '<th scope="col">clip</th>' in text
    assert "<figcaption>clip<" in text and "<figcaption>image<" not in text
    assert "Held-out clips at step 2" in text and "held-out clip 2" in text
    assert len(URI.findall(text)) == 2 * 5
    assert "# uint8 [B C T H W]" in text
    keep_animations(shown, tmp_path, 7)
    kept = read_animations(tmp_path, 7)
    step, clips, scale = kept.step, kept.clips, kept.scale
    assert scale == all_frames(shown).scale
    assert step == 7 and [sorted(clip) for clip in clips] == [["image", "mask", "predicted"]] * 2
    assert np.array_equal(clips[1]["image"], shown.images[1].permute(1, 2, 3, 0).numpy())
    assert read_animations(tmp_path, 6) is None  # of a training taken back
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:50])
    assert read_animations(tmp_path, 7) is None


def test_a_strip_says_which_frames_it_shows():
    assert frames_text(16, 8) == "frames 1, 5, 11 and 15 of 16"
    assert frames_text(8, 1) == "frame 1 of 8"
