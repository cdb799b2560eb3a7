"""`hpm view`: the server, and its page in a browser."""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, assert_refused, run_here
from PIL import Image

import hpm
from hpm.core.errors import UserError
from hpm.show import view, view_server
from hpm.show.options import ViewConfig
from hpm.show.view import Viewer
from hpm.show.view_server import MAX_BYTES, TIMEOUT, make_server
from hpm.weights.resolve import load


def png(seed=0, size=(30, 20)):
    """The bytes of an image."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@contextmanager
def serving(run, data=None, num_masks=2):
    trained = view.open_trained(str(run), "cpu")
    server = make_server(Viewer(trained, *view._examples(data, trained), num_masks), 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def server(finished_run):
    with serving(finished_run.folder) as found:
        yield found


def request(server, method, path, body=None, **headers):
    """(status, text)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.request(method, path, body, {n.replace("_", "-"): v for n, v in headers.items()})
    response = connection.getresponse()
    return response.status, response.read().decode()


def show(server, body=None, query="mask_ratio=0.5&hard_share=0.5&seed=0"):
    status, text = request(server, "POST", f"/show?{query}", body)
    assert status == 200
    return json.loads(text)


def sources(answer):
    return {panel["name"]: panel["src"] for panel in answer["panels"]}


ALL = ["image", "actual", "predicted", "mask", "reconstruction", "pca", "attention"]


def test_an_image_and_its_settings(server):
    first = sources(show(server, png()))
    assert list(first) == ALL
    assert sources(show(server, png())) == first
    changed = {
        # The predicted loss has the colours of the actual one.
        "mask_ratio=0.25&hard_share=0.5&seed=0": {"actual", "predicted", "mask", "reconstruction"},
        "mask_ratio=0.5&hard_share=1&seed=0": {"mask", "reconstruction"},
        "mask_ratio=0.5&hard_share=0.5&seed=5": {"actual", "predicted", "mask", "reconstruction"},
    }
    for query, expected in changed.items():
        other = sources(show(server, png(), query))
        assert {name for name in other if other[name] != first[name]} == expected
    assert len(show(server, png())["heads"]) == 3
    assert sources(show(server, png(1)))["image"] != first["image"]


def test_examples(server, image_folder):
    page = request(server, "GET", "/")[1]
    about = json.loads(re.search(r'id="about">(.*?)</script>', page)[1])
    assert len(about["examples"]) == 6 and str(image_folder) in about["examples"][0]["name"]
    answer = show(server, query="example=3")
    assert sources(answer)["image"] == about["examples"][3]["src"]
    for wrong in ("6", "-1", "1.5", "nan", "x"):
        assert "example" in show(server, query=f"example={wrong}")["error"]


@pytest.mark.parametrize(
    "body", [b"", b"no image at all", png()[:200], b"\x93NUMPY" + b"\0" * 50, b"GIF89a" + b"\1" * 9]
)
def test_what_is_no_image(server, body):
    assert "cannot be read as an image" in show(server, body)["error"]


@pytest.mark.parametrize(
    "query",
    [
        "mask_ratio=2",
        "mask_ratio=nan",
        "mask_ratio=0.99",
        "mask_ratio=x",
        "hard_share=-1",
        "hard_share=inf",
        "seed=-1",
        "seed=1e99",
    ],
)
def test_settings_that_make_no_mask(server, query):
    name = query.partition("=")[0]
    assert name in show(server, png(), query)["error"]


def test_who_may_ask(server):
    port = server.server_port
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", ""):
        status, text = request(server, "GET", "/", Host=host)
        assert status == 403 and "error" in json.loads(text)
        assert request(server, "POST", "/show", png(), Host=host)[0] == 403
    assert request(server, "GET", "/", Host=f"localhost:{port}")[0] == 200
    for origin, status in (("http://evil.example", 403), (f"http://127.0.0.1:{port}", 200)):
        assert request(server, "POST", "/show", png(), Origin=origin)[0] == status
    assert request(server, "GET", "/../../etc/passwd")[0] == 404
    assert request(server, "POST", "/", png())[0] == 404


@pytest.mark.parametrize(
    "header, status, words",
    [
        (("Content-Length", str(MAX_BYTES + 1)), 413, "more than 32 MB"),
        (("Content-Length", "-1"), 411, "Content-Length"),
        (("Transfer-Encoding", "chunked"), 411, "Content-Length"),
    ],
)
def test_sizes_that_are_refused(server, header, status, words):
    """Before anything of the body is read, or even sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest("POST", "/show")
    connection.putheader(*header)
    connection.endheaders()
    response = connection.getresponse()
    assert response.status == status and words in response.read().decode()


def test_a_reader_who_goes_away_is_no_error(server, capfd):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/show?seed=0", png())
    connection.close()
    assert list(sources(show(server, png()))) == ALL
    assert "Traceback" not in capfd.readouterr().err


def test_it_listens_to_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"


def test_nothing_is_written(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    show(server, png())
    show(server, b"no image")
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken(server):
    with pytest.raises(UserError, match=f"port {server.server_port} is not free.*--port"):
        make_server(server.viewer, server.server_port)
    with pytest.raises(UserError, match="between 0"):
        make_server(server.viewer, 70000)


def test_the_next_free_port(server, monkeypatch):
    monkeypatch.setattr(view_server, "PORT", server.server_port)
    other = make_server(server.viewer, None)
    assert server.server_port < other.server_port <= server.server_port + view_server.PORTS_TRIED
    other.server_close()


def test_seven_channels(tmp_path):
    """Images come as .npy; there are no built-in ones, and of the run's none are left."""
    folder = tmp_path / "bands"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(16):
        np.save(folder / f"{number}.npy", rng.normal(300, 50, (7, 18, 24)).astype(np.float32))
    options = TINY | {"channels": 7, "image_size": (16, 24), "steps": 2, "holdout": 0}
    run = hpm.pretrain(data=str(folder), out=str(tmp_path / "run"), **options)
    upload = (folder / "3.npy").read_bytes()
    with serving(run.folder) as server:
        assert len(server.viewer.examples) == 6
        answer = show(server, upload)
        assert list(sources(answer)) == ALL
        assert "3 channels instead of 7" in show(server, png())["error"]
    folder.rename(tmp_path / "elsewhere")
    with serving(run.folder) as server:
        assert not len(server.viewer.examples) and list(sources(show(server, upload))) == ALL


def test_the_examples_asked_for(finished_run, tmp_path):
    trained = load(finished_run.folder)
    assert view._examples("demo", trained)[1][0] == "demo/test/0"
    with pytest.raises(UserError, match="no such folder"):
        view._examples(str(tmp_path / "nowhere"), trained)
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(UserError, match="no image of"):
        view._examples(str(tmp_path), trained)
    with pytest.raises(UserError, match="num_masks"):
        view.view(ViewConfig(str(finished_run.folder), num_masks=0))


# In a browser -----------------------------------------------------------------------------------


class Driven:
    """The page, and all that its console said."""

    def __init__(self, browser, server, width=1280, scheme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.problems = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(f"http://127.0.0.1:{server.server_port}/")

    def pictures(self, name=None):
        """The panels as they are once nothing is being computed; `name` of the image, if given."""
        if name is not None:
            self.wait_for("#name", re.escape(name) + "$")
        self.page.wait_for_selector('#panels[aria-busy="false"] img')
        return self.page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('#panels figure')]"
            ".map(f => [f.dataset.panel, f.querySelector('img').src]))"
        )

    def slide(self, name, value):
        self.page.locator(f"#{name}").evaluate(
            "(input, value) => { input.value = value;"
            " input.dispatchEvent(new Event('input', {bubbles: true})); }",
            str(value),
        )

    def drop(self, name, content):
        self.page.evaluate(
            """([name, bytes]) => {
              const data = new DataTransfer();
              data.items.add(new File([new Uint8Array(bytes)], name));
              for (const type of ["dragover", "drop"])
                document.getElementById("drop").dispatchEvent(new DragEvent(
                  type, {dataTransfer: data, bubbles: true, cancelable: true}));
            }""",
            [name, list(content)],
        )

    def message(self):
        self.wait_for("#message", ".")
        return self.page.locator("#message").inner_text()

    def wait_for(self, selector, pattern):
        # Not by wait_for_function, which the page's own policy forbids.
        from playwright.sync_api import expect

        expect(self.page.locator(selector)).to_have_text(re.compile(pattern), timeout=30_000)


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (360, "dark"),
        (1280, "light"),
        pytest.param(360, "light", marks=pytest.mark.slow),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
    ],
)
def test_the_page(browser, server, width, scheme):
    driven = Driven(browser, server, width, scheme)
    example = driven.pictures("000.png")
    assert list(example) == ALL
    boxes = [f.bounding_box() for f in driven.page.locator("#panels figure").all()]
    if width == 1280:
        assert len({box["y"] for box in boxes}) == 1, "in one row"
        assert max(box["y"] + box["height"] for box in boxes) < 800, "captions in sight"
    assert driven.page.locator("#panels .bar").count() == 2, "of the actual and predicted loss"
    driven.drop("mine.png", png())
    mine = driven.pictures("mine.png")
    assert all(mine[name] != example[name] for name in ALL)
    driven.slide("mask_ratio", 0.25)
    fewer = driven.pictures()
    assert fewer["mask"] != mine["mask"] and fewer["pca"] == mine["pca"]
    assert "25 %" in driven.page.locator("#settings").inner_text()
    driven.slide("hard_share", 1)
    harder = driven.pictures()
    assert harder["mask"] != fewer["mask"] and harder["actual"] == fewer["actual"]
    driven.slide("hard_share", 0)
    driven.page.locator("#seed").fill("7")
    assert driven.pictures()["reconstruction"] != harder["reconstruction"]
    laid = driven.page.locator("#panels figure[data-panel=actual] img")
    opacity = [laid.evaluate("e => getComputedStyle(e).opacity")]
    driven.page.click("#overlay")
    opacity.append(laid.evaluate("e => getComputedStyle(e).opacity"))
    behind = laid.evaluate("e => getComputedStyle(e.parentElement).backgroundImage")
    assert opacity == ["1", "0.6"] and driven.pictures()["image"] in behind
    driven.page.get_by_text("attention, head by head").click()
    assert driven.page.get_by_text("head 3").is_visible()
    driven.page.locator("#examples button").nth(2).click()
    assert driven.pictures("2.png") != example
    assert driven.page.locator('#examples [aria-pressed="true"]').count() == 1
    assert driven.page.evaluate("document.documentElement.scrollWidth") <= width
    assert not driven.problems
    driven.page.close()


def test_a_file_that_is_no_image(browser, server, tmp_path):
    driven = Driven(browser, server)
    example = driven.pictures()
    (tmp_path / "notes.txt").write_text("no image")
    driven.page.locator("#file").set_input_files(tmp_path / "notes.txt")
    assert driven.message().startswith("notes.txt: this file cannot be read as an image")
    assert driven.page.locator("#panels img").count() == 0
    driven.page.evaluate("about.limit = 10")
    driven.drop("large.png", png())
    driven.wait_for("#message", "^large.png: this file has more")
    driven.page.locator("#examples button").first.click()
    assert driven.pictures() == example and not driven.page.locator("#message").inner_text()
    assert not driven.problems
    driven.page.close()


def test_a_stale_answer_never_replaces_a_newer_one(browser, server, monkeypatch):
    """The first answer is held back until two newer requests have been made."""
    driven = Driven(browser, server)
    driven.pictures()
    held, answered, answer = threading.Event(), [], server.viewer.answer

    def slow(settings, body):
        answered.append(settings["seed"])
        if settings["seed"] == "1":
            assert held.wait(60)
        return answer(settings, body)

    monkeypatch.setattr(server.viewer, "answer", slow)
    for seed in (1, 2, 3):
        driven.slide("seed", seed)
    driven.drop("newest.png", png(5))
    held.set()
    newest = driven.pictures("newest.png")
    expected = sources(answer({"seed": "3", "mask_ratio": "0.75", "hard_share": "0.5"}, png(5)))
    assert newest == expected
    assert answered == ["1", "3"]  # what was overtaken is not even computed
    driven.page.close()


def test_a_backbone_says_that_it_shows_features_only(browser, finished_run):
    with serving(finished_run.backbone) as server:
        driven = Driven(browser, server)
        assert list(driven.pictures()) == ["image", "pca", "attention"]
        assert driven.page.get_by_text("These weights show features only.").is_visible()
        assert driven.page.get_by_text("it has a backbone only").is_visible()
        assert not driven.page.locator("#mask_ratio").count()
        driven.drop("mine.png", png())
        assert list(driven.pictures("mine.png")) == ["image", "pca", "attention"]
        assert not driven.problems
        driven.page.close()


def test_a_server_that_is_gone(browser, finished_run):
    with serving(finished_run.folder) as server:
        driven = Driven(browser, server)
        driven.pictures()
    driven.slide("seed", 1)
    assert "is hpm view still running" in driven.message()
    driven.page.close()


# As a command -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_stops_it(finished_run):
    command = [sys.executable, "-m", "hpm", "view", str(finished_run.folder), "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        # Of a shell's background jobs it is ignored, and so of these tests where they are one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    line = process.stdout.readline()
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/show?example=0")
    assert "panels" in json.loads(connection.getresponse().read())
    # A connection on which nothing is sent, as browsers keep them, is not waited for.
    with socket.create_connection(("127.0.0.1", port)):
        connection.request("POST", "/show?example=0")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT / 2)
    assert (process.returncode, errors) == (0, "")


def test_on_the_command_line(finished_run, server):
    assert_refused(run_here("view", "nowhere"), "nowhere", "no such run folder")
    taken = str(server.server_port)
    assert_refused(run_here("view", finished_run.folder, "--port", taken), "not free")


def test_answers_come_one_after_another(server, monkeypatch):
    """However many ask at once, the model runs for one."""
    running, most = [], []
    picture = view.picture

    def counted(*arguments, **options):
        running.append(1)
        most.append(len(running))
        shown = picture(*arguments, **options)
        running.pop()
        return shown

    monkeypatch.setattr(view, "picture", counted)
    threads = [threading.Thread(target=show, args=(server, png(i))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
