"""Shapes are checked at run time in every test, and nothing takes more than its threads."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
import typecheck

# Before anything of hpm is imported; subprocesses of the tests run unchecked, as a user would.
typecheck.install()

import torch  # noqa: E402
from helpers import write_images  # noqa: E402

# Neither the clock nor chance may decide whether a test passes.
hypothesis.settings.register_profile("hpm", deadline=None, derandomize=True)
hypothesis.settings.load_profile("hpm")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A browser of a test talks to nobody.
BROWSER_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

SHARED_DATA = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture
def shared_data():
    if not SHARED_DATA.is_dir():
        pytest.skip("the real images (../shared/data) are not here")
    return SHARED_DATA


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """48 small images in three class folders."""
    return write_images(tmp_path_factory.mktemp("images"), classes=3, per_class=16)


@pytest.fixture(scope="session")
def finished_run(image_folder, tmp_path_factory):
    """A short finished run on `image_folder`."""
    from helpers import TINY

    import hpm

    out = tmp_path_factory.mktemp("runs") / "finished"
    return hpm.pretrain(data=str(image_folder), out=str(out), **TINY | {"holdout": 8})


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """24 and 6 small images with masks."""
    from segmentation import write_scenes

    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="session")
def linear_segmenter(finished_run, scenes, tmp_path_factory):
    """The folder and the result of an evaluation on `scenes`."""
    from segmentation import LINEAR

    import hpm

    out = tmp_path_factory.mktemp("linear")
    run = str(finished_run.folder)
    return out, hpm.evaluate("segment", run, str(scenes), out=str(out), **LINEAR)


@pytest.fixture(scope="session")
def upernet_segmenter(finished_run, scenes, tmp_path_factory):
    """The folder and the result of an evaluation on `scenes`."""
    from segmentation import UPERNET

    import hpm

    out = tmp_path_factory.mktemp("upernet")
    run = str(finished_run.folder)
    return out, hpm.evaluate("segment", run, str(scenes), out=str(out), **UPERNET)


@pytest.fixture
def another_user():
    """A context in which this process is a user who owns nothing here, as root may do."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")

    @contextlib.contextmanager
    def become():
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return become


@pytest.fixture
def open_folder():
    """A folder like tmp_path, but one that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# Not of the session: while it runs, nothing in this thread can call asyncio.run.
@pytest.fixture(scope="module")
def browser():
    """A headless Chromium of playwright: `browser.new_page(viewport=...)`."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed (one of {', '.join(BROWSERS)})")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGUMENTS))
        yield chromium
        chromium.close()


sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def screens(browser):
    """Open a page wide and light, then narrow and dark: it fits, and its script has no errors."""

    def each(html):
        errors = []
        for width, scheme in ((1280, "light"), (390, "dark")):
            context = browser.new_context(
                viewport={"width": width, "height": 800}, color_scheme=scheme
            )
            shown = context.new_page()
            shown.on("pageerror", lambda error: errors.append(str(error)))
            shown.goto(html.as_uri())
            assert shown.evaluate("document.documentElement.scrollWidth") <= width
            yield shown
            context.close()
        assert not errors

    return each
