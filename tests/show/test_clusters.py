"""The page of clusters: what is found, what is drawn, and what a browser makes of it."""

import json
import re
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
from helpers import assert_refused, run_here

import hpm
from hpm.show import clusters as drawing
from hpm.show.clustering import (
    agreement,
    centred_units,
    default_count,
    find_clusters,
    project,
)

pytest.importorskip("sklearn")


def three_groups():
    """Features [60 8] about three directions, of 30, 20 and 10 images; and the groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat([2, 0, 1], [30, 20, 10])
    centres = 5 * np.eye(8)[:3]
    return (centres[groups] + 0.1 * rng.normal(size=(60, 8)) + 50).astype(np.float32), groups


def test_groups_are_found_largest_first():
    features, groups = three_groups()
    units = centred_units(features)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-5)
    found = find_clusters(units, 3, seed=0)
    assert found.count == 3 and found.numbers.tolist() == [0] * 30 + [1] * 20 + [2] * 10
    members = found.members(1)
    assert set(members) == set(range(30, 50))
    assert (np.diff(found.closeness[members]) <= 0).all()
    names = np.array(["b", "c", "a"])[groups]
    assert agreement(found.numbers, names) == pytest.approx(1)
    names[40:] = ""  # not labelled
    assert agreement(found.numbers, names) == pytest.approx(1)
    assert find_clusters(units[:2], 9, seed=0).count == 2
    assert find_clusters(np.ones((5, 2), np.float32), 3, seed=0).count == 1  # all the same
    assert [default_count(n) for n in (1, 2, 250, 10**6)] == [1, 1, 11, 20]


def test_a_map_by_pca(monkeypatch):
    monkeypatch.setattr("hpm.show.clustering.find_spec", lambda name: None)
    features, groups = three_groups()
    places, how = project(centred_units(features), seed=0)
    assert how.startswith("PCA") and places.shape == (60, 2)
    assert places.min() == 0 and places.max() == 1
    spread = max(places[groups == g].std(0).max() for g in range(3))
    means = [places[groups == g].mean(0) for g in range(3)]
    apart = min(np.linalg.norm(means[a] - means[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert apart > 10 * spread
    assert np.isfinite(project(np.zeros((4, 1), np.float32), seed=0)[0]).all()


def test_a_map_by_umap(monkeypatch):
    """Where it is installed: here, something in its place."""
    umap = ModuleType("umap")
    umap.UMAP = lambda **options: type(
        "U", (), {"fit_transform": staticmethod(lambda rows: rows[:, :2] * 7)}
    )()
    monkeypatch.setitem(sys.modules, "umap", umap)
    monkeypatch.setattr("hpm.show.clustering.find_spec", lambda name: name == "umap")
    places, how = project(centred_units(three_groups()[0]), seed=0)
    assert how.startswith("UMAP") and places.min() == 0 and places.max() == 1


@pytest.fixture(scope="module")
def features(finished_run, image_folder, tmp_path_factory):
    images = tmp_path_factory.mktemp("clusters") / "images"
    shutil.copytree(image_folder, images)
    out = images.parent / "f.npy"
    hpm.embed(finished_run.folder, images, out, str, workers=0, device="cpu")
    return out


@pytest.fixture(scope="module")
def html(features):
    out = features.with_name("page.html")
    found = run_here("show", features, "--out", out, "--clusters", 4, "--images", 5)
    assert found.returncode == 0, found.stderr
    return out


def values(html):
    text = re.search(r'<script type="application/json" id="images">(.*?)</script>', html)[1]
    return json.loads(text)


def test_the_page_holds_all_images(html, image_folder):
    text = html.read_text()
    found = values(text)
    assert len(found["path"]) == len(found["x"]) == 48 and set(found["cluster"]) == {1, 2, 3, 4}
    assert found["label"] == [f"class_{i // 16}" for i in range(48)]
    assert len(re.findall(r"M\d+ \d+h0", text)) == 2 * 48  # by cluster and by label
    assert text.count('<section class="card">') == 4
    assert text.count('class="thumb s0"') <= 4 * 5
    assert "data:image/jpeg" in text and not re.search(r'(src|href)="(?!data:)', text)


def test_many_images_are_drawn_at_random(features, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "MOST", 20)
    run_here("show", features, "--out", tmp_path / "page.html", "--clusters", 3, "--images", 2)
    text = (tmp_path / "page.html").read_text()
    assert len(values(text)["path"]) == 20 and "20 of 48 images are shown" in text
    assert len(re.findall(r'class="thumb s0" style', text)) == 6


def test_a_browser_shows_what_is_pointed_at(screens, html):
    for shown in screens(html):
        found = values(html.read_text())
        world = shown.locator(".world")
        world.scroll_into_view_if_needed()
        box = world.bounding_box()
        place = (
            box["x"] + found["x"][7] * box["width"] / 1000,
            box["y"] + found["y"][7] * box["height"] / 1000,
        )
        shown.mouse.move(*place)
        path = shown.text_content(".pointed span")
        k = found["path"].index(path)
        assert abs(found["x"][k] - found["x"][7]) + abs(found["y"][k] - found["y"][7]) < 30
        assert f"{found['label'][k]}, cluster {found['cluster'][k]}" == shown.text_content(
            ".pointed b"
        )
        shown.locator("button.find").first.click()
        assert shown.locator('g[data-by="cluster"] path.dim').count() == 3
        shown.locator('button[data-by="label"]').click()
        assert shown.locator('g[data-by="label"]').is_visible()
        assert shown.locator("path.dim").count() == 0


def test_refusals(features, finished_run, image_folder, tmp_path):
    page = tmp_path / "page.html"
    for words, arguments in (
        ("name a .html file", (features, "--out", tmp_path / "page.png")),
        ("--panels is for a model", (features, "--out", page, "--panels", "image")),
        ("--num-masks is for a model", (features, "--out", page, "--num-masks", 3)),
        ("not the images that were embedded", (features, image_folder / "class_0", "--out", page)),
        ("no such folder", (features, tmp_path / "missing", "--out", page)),
        ("not features of hpm embed", (tmp_path / "no.npy", "--out", page)),
        ("DATA must be given", (finished_run.folder, "--out", page)),
        ("--clusters is for features", (finished_run.folder, image_folder, "--clusters", 3)),
    ):
        (tmp_path / "no.npy").write_bytes(b"nothing")
        assert_refused(run_here("show", *arguments), words)
    for file in features.parent.glob("f.*"):
        shutil.copy(file, tmp_path)
    about = tmp_path / "f.json"
    about.write_text(about.read_text().replace(str(features.parent / "images"), "/gone"))
    assert_refused(run_here("show", tmp_path / "f.npy", "--out", page), "pass DATA")
    moved = run_here("show", tmp_path / "f.npy", image_folder, "--out", page)
    assert moved.returncode == 0, moved.stderr
