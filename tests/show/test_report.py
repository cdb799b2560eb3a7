import html
import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, stop_after
from safetensors.torch import save_file

import hpm
from hpm.commands.cli import main
from hpm.show import moments_table
from hpm.show import monitor as watch
from hpm.show.options import ReportConfig
from hpm.show.report import run_report, write_report
from hpm.training.sessions import read_sessions


@pytest.fixture
def run_folder(finished_run, tmp_path):
    """A copy of a finished run, to be changed."""
    return Path(shutil.copytree(finished_run.folder, tmp_path / "copy"))


def pretrain(folder, out, **changes):
    return hpm.pretrain(data=str(folder), out=str(out), **TINY | changes)


def test_a_finished_run_has_one(finished_run):
    text = finished_run.report.read_text()
    assert '<span class="state finished">finished</span>' in text and "Problems" not in text
    assert re.search(r"Step 8 of 8(; took \d+ (s|min))?\.", text)
    assert "its features are not evaluated yet" in text
    for reference in ("1.0 is predicting the mean", "0.5 is chance", "0.693 is chance"):
        assert reference in text
    for title in ("Reconstruction loss", "Ranking accuracy", "Hard share", "Memory", "Data wait"):
        assert f"<h3>{title}" in text
    assert [int(n) for n in re.findall(r'<th scope="col">step (\d+)<', text)] == [0, 8]
    assert len(re.findall(r'class="view map predicted"', text)) == 8
    assert f"hpm.load_encoder(&quot;{finished_run.folder}&quot;)" in text
    (session,) = read_sessions(finished_run.folder)
    assert (session.first_step, session.last_step, session.reason) == (0, 8, "finished")
    assert session.environment["torch"] == torch.__version__
    assert session.environment["torch"] in text


def test_it_tells_options_that_were_given_from_those_that_follow(finished_run):
    text = finished_run.report.read_text().partition("<h2>Configuration</h2>")[2]
    chosen, rest = text.partition("<h2>")[0].split("<details>")
    for name in ("hard_share_start", "decoder_dim", "patch_size", "base_lr"):  # see TINY
        assert f">{name}<" in chosen and f">{name}<" not in rest
    for name in ("hard_share_end", "decoder_heads", "normalize", "precision"):
        assert f">{name}<" in rest and f">{name}<" not in chosen


def test_it_says_where_and_why_a_run_stopped(image_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            pretrain(image_folder, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert '<span class="state stopped">stopped</span>' in text and "Step 4 of 8" in text
    assert "Stopped at step 4: at once, by Ctrl-C." in text
    run = pretrain(image_folder, tmp_path / "run")
    text = run.report.read_text()
    assert re.search(r"Step 8 of 8(; took \d+ (s|min))?\.", text)
    assert "at once, by Ctrl-C; resumed from step 4." in text
    assert [s.first_step for s in read_sessions(run.folder)] == [0, 4]


def test_it_is_written_while_the_run_trains(image_folder, tmp_path, monkeypatch):
    steps = []
    real = watch.refresh_report
    monkeypatch.setattr(
        import_module("hpm.pretraining"),
        "refresh_report",
        lambda run: (steps.append(run.step), real(run)),
    )
    pretrain(image_folder, tmp_path / "run", eval_every="3 steps", checkpoint_every="4 steps")
    assert steps == [3, 4, 6, 8]


def test_a_report_that_fails_never_stops_training(image_folder, tmp_path, monkeypatch, capfd):
    def fail(*arguments, **options):
        raise OSError("no space")

    monkeypatch.setattr(watch, "write_report", fail)
    monkeypatch.setattr(watch, "keep_moment", fail)
    monkeypatch.setattr(watch.sessions, "begin", fail)
    run = pretrain(image_folder, tmp_path / "run", holdout=8)
    assert run.latest_checkpoint().name == "step_00000008.safetensors"
    errors = capfd.readouterr().err
    assert errors.count("warning: writing the report failed (no space)") == 1
    assert len(re.findall("warning: .* failed", errors)) == 3


def test_what_could_not_be_read_is_named(run_folder):
    with open(run_folder / "train.log", "a") as file:
        for number in range(30):
            problem = f"cannot read a<b>{number:02d}.png (broken), passed over"
            file.write(f"2026-01-01 00:00:00 {problem}\n")
    text = write_report(run_folder).read_text()
    assert "30 images could not be read" in text and "a&lt;b&gt;00.png (broken)" in text
    assert "and 10 more" in text and "<b>00" not in text


def test_a_killed_run_leaves_half_a_line(run_folder):
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "reconstr')
    sessions = (run_folder / "sessions.jsonl").read_text().splitlines()
    begin = json.loads(sessions[0]) | {"step": 8}
    (run_folder / "sessions.jsonl").write_text("\n".join([sessions[0], json.dumps(begin), ""]))
    text = write_report(run_folder).read_text()
    assert re.search(r"The session that began [^<]* was killed\.", text)


def test_the_command_writes_it_again(run_folder, tmp_path, capsys):
    # As a run of before there were reports, pictures and sessions.
    shutil.rmtree(run_folder / "moments")
    for name in ("sessions.jsonl", "report.html"):
        (run_folder / name).unlink()
    assert main(["report", str(run_folder)]) == 0
    assert f"written to {run_folder / 'report.html'}" in capsys.readouterr().out
    text = (run_folder / "report.html").read_text()
    assert "none were kept" in text and f"torch {torch.__version__}" in text
    (run_folder / "metrics.jsonl").unlink()
    other = tmp_path / "other.html"
    assert main(["report", str(run_folder), "--out", str(other)]) == 0
    assert "No measurements yet" in other.read_text()


def test_what_is_no_run_is_refused(run_folder, tmp_path):
    with pytest.raises(hpm.UserError, match=r"no run folder of hpm pretrain \(it has no config"):
        run_report(ReportConfig(str(tmp_path)))
    below_a_file = str(run_folder / "train.log" / "report.html")
    with pytest.raises(hpm.UserError, match="could not be written"):
        run_report(ReportConfig(str(run_folder), below_a_file))
    (run_folder / "config.yaml").write_text("a: [")
    with pytest.raises(hpm.UserError, match=r"config\.yaml is damaged"):
        run_report(ReportConfig(str(run_folder)))


def test_names_and_metrics_of_others(run_folder):
    """Metrics that nobody foresaw get a curve; nothing from outside becomes HTML."""
    folder = run_folder.rename(run_folder.with_name('a"<script>alert(1)<'))
    with open(folder / "metrics.jsonl", "a") as file:
        for step in (2, 4):
            file.write(json.dumps({"step": step, "new/<i>": step, "text": "x"}) + "\n")
    text = write_report(folder).read_text()
    assert "new/&lt;i&gt;" in text and "<i>" not in text.replace("new/&lt;i&gt;", "")
    assert "<script>alert" not in text


def test_its_commands_can_be_pasted(run_folder):
    folder = run_folder.rename(run_folder.with_name("my first run"))
    text = html.unescape(write_report(folder).read_text())
    commands = [line for line in text.splitlines() if "hpm export" in line]
    assert shlex.split(commands[0])[2] == str(folder)


@pytest.fixture
def long_run(run_folder):
    """What a long run of a large model leaves behind: 125,000 steps, 25 pictures of 224 pixels."""
    with open(run_folder / "metrics.jsonl", "w") as file:
        for step in range(10, 125_001, 10):
            values = {"reconstruction_loss": 1 / step, "predictor_loss": 0.3, "grad_norm": 1.0}
            values |= {"ranking_accuracy": 0.8, "learning_rate": 1e-4, "ema_decay": 0.999}
            values |= {"images_per_second": 900.0 + step % 7, "memory_gb": 12.0, "hard_share": 0.3}
            file.write(json.dumps({"step": step} | values) + "\n")
    shutil.rmtree(run_folder / "moments")
    (run_folder / "moments").mkdir()
    rng = np.random.default_rng(0)
    # Soft shapes with some noise, which is harder to pack than a photograph.
    coarse = rng.integers(0, 200, (8, 16, 16, 3)).repeat(8, 1).repeat(8, 2)
    images = torch.from_numpy((coarse + rng.integers(0, 40, coarse.shape)).astype(np.uint8))
    for step in range(5000, 125_001, 5000):
        maps = torch.rand(8, 14, 14)
        moment = {
            "images": images,
            "reconstruction": images.clone(),
            "mask": maps > 0.75,
            "actual": maps,
            "predicted": maps.clone(),
        }
        file = run_folder / "moments" / f"step_{step:08d}.safetensors"
        save_file(moment, file, {"hpm": "{}"})
    return run_folder


def test_a_long_run_of_a_large_model_stays_small(long_run):
    path = write_report(long_run)
    text = path.read_text()
    assert path.stat().st_size < 3e6
    assert text.count('<th scope="col">step ') == 10
    gaps = [int(number) for number in re.findall(r'<th class="gap" title="(\d+) not shown">', text)]
    assert sum(gaps) == 15 and "10 of 25 measurements are shown (⋯ is" in text
    assert text.count('<td class="gap"></td>') == 8 * len(gaps)
    assert max(len(d.split("L")) for d in re.findall(r'class="curve c0" d="([^"]*)"', text)) < 400


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_in_a_browser(browser, finished_run, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, requests = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(finished_run.report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    red, *_ = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    )
    assert (red < 60) == (scheme == "dark")

    # Each view shows its own pictures, and they are there.
    for name in ("predicted", "actual", "mask", "reconstruction"):
        page.click(f"label[for=view-{name}]")
        shown = page.locator(".view:visible")
        assert shown.count() == 8
        assert all(name in shown.nth(i).get_attribute("class") for i in range(8))
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")

    page.click("label[for=view-actual]")
    page.click("label[for=overlay]")
    laid = page.locator(".view.actual").first
    assert laid.evaluate("e => getComputedStyle(e).opacity") == "0.6"
    assert "data:image" in laid.evaluate(
        "e => getComputedStyle(e.parentElement).backgroundImage"
    ), "over the image"
    page.click("label[for=view-mask]")
    assert not page.locator("label[for=overlay]").is_visible()
    assert page.locator(".moments .bar:visible").count() == 0

    # Pointing at the second reading of the loss: 4 of 8 steps.
    losses = {
        m["step"]: m["reconstruction_loss"]
        for m in finished_run.metrics()
        if "reconstruction_loss" in m
    }
    chart = page.locator(".chart").first
    value, step, line = chart.locator("b").first, chart.locator(".at"), chart.locator(".cursor")
    assert (value.text_content(), step.text_content()) == (f"{losses[8]:.3g}", "step 8")
    plot = chart.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 0.5 * box["height"])
    assert (value.text_content(), step.text_content()) == (f"{losses[4]:.3g}", "step 4")
    assert line.get_attribute("d") == "M500 0V1000"
    assert page.locator(".chart .at").nth(3).text_content().startswith("step ")
    page.mouse.move(5, 5)
    assert step.text_content() == "step 8" and line.get_attribute("d") == ""
    plot.focus()
    page.keyboard.press("ArrowLeft")
    assert step.text_content() == "step 6"
    # The script writes numbers as the page had them before.
    page.reload()
    whole = page.locator(".key b").all_text_contents()
    plot.hover()
    page.mouse.move(5, 5)
    assert page.locator(".key b").all_text_contents() == whole
    assert not problems and set(requests) == {finished_run.report.as_uri()}
    page.close()


def test_without_javascript(browser, finished_run):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(finished_run.report.as_uri())
    page.click("label[for=view-mask]")
    assert page.locator(".mask:visible").count() == 8
    assert page.locator(".curve").first.bounding_box()["width"] > 100
    assert page.locator(".plot .y:visible").count() > 10
    context.close()


def test_by_finger(browser, finished_run):
    context = browser.new_context(viewport={"width": 360, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(finished_run.report.as_uri())
    plot = page.locator(".plot").first
    plot.tap(position={"x": 0.5 * plot.bounding_box()["width"], "y": 20})
    assert page.locator(".at").first.text_content() == "step 4", "it stays after the finger left"
    hint = page.get_by_text("Steps from left to right").inner_text()
    assert "Touch a curve" in hint and "Point at" not in hint
    table = page.locator(".moments .scroll")
    first = page.locator(".moments tbody th").first
    page.add_style_tag(content=".moments table { min-width: 60rem !important; }")
    left = first.bounding_box()["x"]
    assert table.evaluate("e => (e.scrollLeft = 300, e.scrollLeft)") == 300
    assert first.bounding_box()["x"] == left, "the image stays in sight"
    context.close()


def test_every_view_is_a_part_of_a_moment():
    from hpm.show.moments import Moment

    assert set(moments_table.VIEWS) <= set(Moment.__dataclass_fields__)


def test_it_lists_all_evaluations(run_folder, image_folder):
    shutil.rmtree(run_folder / "evals", ignore_errors=True)
    assert "<h2>Evaluations" not in write_report(run_folder).read_text()
    options = {"k": (1,), "workers": 0, "baselines": False}
    for changes in ({}, {"crop_share": 0.5}, {"teacher": True}):
        hpm.evaluate("knn", str(run_folder), str(image_folder), **options, **changes)
    (run_folder / "evals" / "odd<.json").write_text("{")
    text = write_report(run_folder).read_text().partition("<h2>Evaluations")[2]
    assert text.count("<h3>kNN, k = 1 on ") == 3
    assert text.count("<td>trained, class token</td>") == text.count("patch mean</td>") == 3
    assert "crop_share 0.5; student, step 8" in text and text.count("teacher, step 8") == 2
    assert "odd&lt;.json cannot be read" in text


def test_the_ends_of_many_sessions_do_not_fill_the_page(run_folder):
    lines = (run_folder / "sessions.jsonl").read_text().splitlines()
    begin = json.loads(lines[0])
    killed = [json.dumps(begin | {"step": step}) for step in range(200)]
    (run_folder / "sessions.jsonl").write_text("\n".join([*killed, *lines, ""]))
    text = write_report(run_folder).read_text()
    assert text.count(" was killed.") == 20
    assert "180 earlier sessions ended early, listed below." in text
