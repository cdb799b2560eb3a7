"""The page of an evaluation."""

import json
import re
from html import escape

import pytest
from helpers import assert_refused, run_here

from hpm.evals.result import Result
from hpm.show.evaluation_report import write_evaluation_report


@pytest.fixture(scope="module")
def finetuned(finished_run, image_folder, tmp_path_factory):
    """Fine-tuned on the command line: (its output, folder of the results)."""
    out = tmp_path_factory.mktemp("finetuned")
    options = ["--epochs=4", "--batch-size=12", "--workers=0", "--rand-augment=none"]
    result = run_here("eval", "finetune", finished_run.folder, image_folder, "--out", out, *options)
    assert result.returncode == 0, result.stderr
    return result.stdout, out


def test_a_fine_tuning_leaves_its_page(finetuned):
    printed, out = finetuned
    (page,) = out.glob("*/report.html")
    assert f"report: {page}" in printed.replace("\n", "")
    text = page.read_text()
    (file,) = out.glob("*.json")
    numbers = json.loads(file.read_text())["values"]["trained"]["finetune"]
    interval = f"{numbers['top1']:.1f} ({numbers['top1_low']:.1f} to {numbers['top1_high']:.1f})"
    assert interval in text and "http" not in re.sub(r"http-equiv", "", text)
    data = re.search(r'id="curves">(.*?)</script>', text)
    charts = json.loads(data[1])
    assert text.count('class="card chart"') == len(charts) >= 4
    losses = [json.loads(line)["loss"] for line in (page.parent / "trained/metrics.jsonl").open()]
    assert charts[0]["curves"][0]["values"] == pytest.approx(losses, rel=1e-5)


def test_it_is_rewritten_from_the_json_file(finetuned):
    _, out = finetuned
    (page,), (file,) = out.glob("*/report.html"), out.glob("*.json")
    page.unlink()
    assert run_here("report", file).returncode == 0 and page.exists()
    assert run_here("report", file, "--out", out / "other.html").returncode == 0
    assert (out / "other.html").read_text().count("<h1>") == 1


def test_classes_differences_and_strange_names(tmp_path):
    numbers = {"mean_iou": 41.26, "mean_iou_low": 40.1, "mean_iou_high": 42.0}
    result = {
        "protocol": "segment",
        "about": {"run": "<runs>", "data": "a & b", "classes": 2},
        "values": {"trained": {"segment": numbers}},
        "differences": {"trained": {"segment": {"mean_iou": -1.5}}},
        "per_class": {"trained": {"segment": {"<sky>": {"iou": 90.0}, "road": {"iou": 80.0}}}},
        "figures": ["missing.png"],
    }
    file = tmp_path / "segment.json"
    file.write_text(json.dumps(result))
    page = write_evaluation_report(file)
    text = page.read_text()
    assert page == tmp_path / "segment.html"
    assert "41.3 (40.1 to 42.0)" in text and "-1.5" in text and "<th>mean IoU, %</th>" in text
    assert escape("<sky>") in text and "<sky>" not in text and escape("a & b") in text
    assert "Curves" not in text and "Figures" not in text


def test_features_with_one_and_with_several_settings(tmp_path):
    values = {"a": {"k = 1": {"top1": 10.0}}, "b": {"k = 1": {"top1": 20.0}, "k = 2": {"top1": 30}}}
    file = tmp_path / "knn.json"
    result = {"protocol": "knn", "about": {"run": "r", "data": "d"}, "values": values}
    file.write_text(json.dumps(result))
    text = write_evaluation_report(file).read_text()
    assert "<th>features</th><th>setting</th><th>top-1, %</th>" in text
    assert "<td>a</td><td>k = 1</td><td>10.0</td>" in text
    shown = str(Result("knn", result["about"] | {"weights": "student", "seconds": 1}, values))
    assert re.search(r"^ *b +20 +30 *$", shown, re.M)


def test_small_numbers_have_their_interval(tmp_path):
    """Where a difference is small, the interval says whether it is one."""
    result = {
        "protocol": "knn",
        "about": {"run": "r", "data": "d"},
        "values": {"trained": {"knn": {"top1": 40.0}}},
        "differences": {
            "trained": {
                "k = 10": {"top1": -0.293, "top1_low": -1.2695, "top1_high": 0.683},
                "k = 20": {"top1": 1.06, "top1_low": 0.0, "top1_high": 2.1},
                "k = 50": {"top1": 0.0, "top1_low": -0.04, "top1_high": 0.04},
            }
        },
    }
    (tmp_path / "knn.json").write_text(json.dumps(result))
    text = write_evaluation_report(tmp_path / "knn.json").read_text()
    assert "<td>-0.293 (-1.27 to 0.683)</td>" in text and "<td>0 (-0.04 to 0.04)</td>" in text
    assert "<td>1.1 (0.0 to 2.1)</td>" in text


@pytest.mark.parametrize("protocol", ["hardness", "knn"])
def test_numbers_of_predictor_and_teacher_are_shown(protocol, tmp_path):
    """Those of `hpm eval hardness`, and those that other evaluations measure beside their own."""
    result = {
        "protocol": protocol,
        "about": {"run": "r", "data": "d"},
        "values": {} if protocol == "hardness" else {"trained": {"knn": {"top1": 40.0}}},
        "hardness": {"ranking_accuracy": 0.61234, "mining_correlation": -0.25},
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    text = write_evaluation_report(tmp_path / "result.json").read_text()
    assert "Predictor and teacher" in text and "<td>0.612</td>" in text and "<td>-0.25</td>" in text
    assert "<p>On d.</p>" in text
    tile = "<b>40.0</b>" if result["values"] else "<b>0.612</b><span>ranking accuracy</span>"
    assert tile in text and ("<th>features</th>" in text) == bool(result["values"])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"about": {}, "values": {}}'])
def test_files_of_something_else(content, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(content)
    assert_refused(run_here("report", file), "not the JSON file of an evaluation")
    assert_refused(run_here("report", tmp_path / "missing.json"), "not the JSON file")


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_top5_of_few_classes_is_left_out(tmp_path, classes, shown):
    numbers = {"top1": 40.0, "top1_low": 38.0, "top1_high": 42.0, "top5": 100.0}
    result = {
        "protocol": "knn",
        "about": {"run": "r", "data": "d", "classes": classes},
        "values": {"trained": {"knn": numbers}},
    }
    (tmp_path / "knn.json").write_text(json.dumps(result))
    text = write_evaluation_report(tmp_path / "knn.json").read_text()
    assert ("top-5" in text) == shown and "40.0 (38.0 to 42.0)" in text
