import json
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import hpm
from hpm.evals.feature_stats import effective_rank, patch_similarity
from hpm.evals.result import Result, print_result
from hpm.evals.stats import COLUMNS
from hpm.show.evaluation_report import write_evaluation_report


def naive_rank(features):
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum() + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).item()


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1000))
def test_effective_rank_is_that_of_the_definition(images, dim, seed):
    features = torch.randn(images, dim, generator=torch.Generator().manual_seed(seed))
    found = effective_rank(features)
    assert found == pytest.approx(naive_rank(features), rel=1e-4)
    assert 1 - 1e-3 <= found <= min(images, dim) * (1 + 1e-3)
    # The scale of features does not matter, nor does a rotation of them.
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0].float()
    assert effective_rank(7 * features @ turn) == pytest.approx(found, rel=1e-3)


def test_known_effective_ranks():
    assert effective_rank(torch.eye(6)) == pytest.approx(6, rel=1e-4)
    assert effective_rank(torch.outer(torch.arange(1.0, 9), torch.randn(5))) == pytest.approx(
        1, rel=1e-3
    )


@given(st.integers(2, 9), st.integers(0, 1000))
def test_patch_similarity_equals_a_naive_version(count, seed):
    patches = torch.randn(2, count, 5, generator=torch.Generator().manual_seed(seed))
    expected = [
        torch.stack(
            [
                torch.cosine_similarity(image[i].double(), image[j].double(), dim=0)
                for i in range(count)
                for j in range(count)
                if i != j
            ]
        ).mean()
        for image in patches
    ]
    torch.testing.assert_close(
        patch_similarity(patches).double(), torch.stack(expected), atol=1e-5, rtol=1e-4
    )


def test_collapsed_patches_are_all_alike():
    assert patch_similarity(torch.ones(1, 4, 3)).item() == pytest.approx(1)


def test_images_that_cannot_be_read_do_not_count(finished_run, image_folder, tmp_path):
    folder = shutil.copytree(image_folder / "class_0", tmp_path / "damaged")
    (folder / "000.png").write_bytes(b"nothing")
    result = hpm.evaluate("stats", finished_run.folder, folder)
    assert result.about["measured_images"] == len(list(folder.iterdir())) - 1


@pytest.mark.parametrize("protocol", ["stats", "hardness"])
def test_the_same_evaluation_again_has_the_same_file(
    protocol, finished_run, image_folder, tmp_path
):
    """Also where there are fewer images than --images asks for."""
    options = {"out": tmp_path, "workers": 0, "device": "cpu"}
    files = {
        hpm.evaluate(protocol, finished_run.folder, image_folder, **options).file for _ in range(2)
    }
    assert len(files) == 1
    (count,) = (json.loads(file.read_text())["about"]["measured_images"] for file in files)
    assert count == 48
    page = write_evaluation_report(files.pop()).read_text()
    assert f"{image_folder}: 48 images.</p>" in page


def test_stats_needs_no_labels(finished_run, image_folder):
    run, data = str(finished_run.folder), str(image_folder / "class_0")
    result = hpm.evaluate("stats", run, data)
    trained = result.values["trained, patch mean"]["stats"]
    assert 1 <= trained["rank"] <= trained["of"] == 16
    assert -1 <= trained["patch_similarity"] <= 1
    assert "random weights, patch mean" in result.values and "raw pixels" in result.values
    assert 0 <= result.hardness["ranking_accuracy"] <= 1
    assert "effective rank" in str(result)


def test_long_titles_of_the_table_take_several_lines():
    values = {"random weights, class token": {"stats": {"rank": 25.0, "of": 96.0}}}
    about = {"run": "r", "weights": "student", "data": "d", "images": 1, "seconds": 1.0}
    console = Console(width=70, no_color=True)
    with console.capture() as capture:
        print_result(Result("stats", about, values, columns=COLUMNS), console)
    assert "…" not in capture.get() and "random weights, class token" in capture.get()


def test_brackets_in_names_are_no_markup():
    numbers = {"top1": 40.0, "top1_low": 38.0, "top1_high": 42.0}
    about = {"run": "runs/[a]", "compare": "runs/[b]", "weights": "student", "data": "data[/x]"}
    result = Result(
        "knn",
        about | {"seconds": 1.0},
        {"trained [c]": {"k = 10": numbers}},
        {"trained [c]": {"k = 10": {"top1": 1.0}}},
    )
    printed = str(result)
    assert "runs/[a] (student) on data[/x]" in printed
    assert "runs/[a] minus runs/[b], trained [c] at k = 10" in printed
    assert re.search(r"^ *trained \[c\] +40.0 ± 2.0 *$", printed, re.M)
