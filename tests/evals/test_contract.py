"""An evaluation is one file, found by its name; the command line and the results follow from it."""

import json
import subprocess
import sys

import pytest
from helpers import assert_refused, run_here

import hpm
from hpm.evals.contract import Evaluation, Measured, find, installed
from hpm.evals.options import EvalOptions
from hpm.evals.running import make_result
from hpm.evals.saved import saved_evaluations

BUILT_IN = [
    "attentive",
    "detect",
    "finetune",
    "hardness",
    "knn",
    "linear",
    "segment",
    "stats",
]

NEAREST_MEAN = '''
"""Which class mean is nearest?"""

from __future__ import annotations

from dataclasses import dataclass

from hpm.core.options import option
from hpm.evals.contract import Measured
from hpm.evals.options import FrozenEvalOptions, LabelledEvalOptions


@dataclass
class Options(FrozenEvalOptions, LabelledEvalOptions):
    """Nearest class mean of frozen features."""

    power: float = option(2.0, above=0)
    """Power of the differences."""


def run(task, options):
    import torch

    from hpm.core import distributed
    from hpm.evals.metrics import rank

    data = task.labelled(options.train_share)
    train, test = task.pooled(data)
    task.count_images(train, test)

    def classify():
        for name, known in train.items():
            x, y = known.features, known.labels
            means = torch.stack([x[y == c].mean(0) for c in range(len(data.classes))])
            scores = -torch.cdist(test[name].features, means, p=options.power)
            right = scores.argmax(1) == test[name].labels
            per_class = {
                label: {"top1": 100 * right[test[name].labels == c].double().mean().item()}
                for c, label in enumerate(data.classes)
            }
            figures = {}
            if name == "trained, patch mean":
                figures["scores.txt"] = lambda file: file.write_text(f"{len(right)} images")
            yield Measured(
                name, scores=rank(scores, test[name].labels), per_class=per_class, figures=figures
            )

    yield from distributed.main_first(lambda: list(classify()))
'''


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The working directory, with an evaluation of the reader's own in it."""
    (tmp_path / "nearest_mean.py").write_text(NEAREST_MEAN)
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_eval.py").write_text(NEAREST_MEAN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in ("nearest_mean", "my_package", "my_package.my_eval"):
        sys.modules.pop(name, None)


def test_the_built_in_evaluations_are_found_by_their_modules():
    assert [
        name for name, module in installed().items() if module == f"hpm.evals.{name}"
    ] == BUILT_IN
    for name in BUILT_IN:
        evaluation = find(name)
        assert evaluation.name == name and evaluation.about.endswith(".")
        assert issubclass(evaluation.options, EvalOptions)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in BUILT_IN)])
def test_help_does_not_import_torch(arguments):
    program = (
        "import sys; from hpm.commands import cli; code = cli.main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "eval", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = BUILT_IN if arguments == ["--help"] else ["--train-share"]
    if arguments[0] in ("stats", "hardness"):
        expected = ["--images"]
    if arguments[0] == "detect":
        expected = ["--max-test-images"]
    assert all(word in result.stdout for word in expected)


@pytest.mark.parametrize("name", ["nearest_mean", "my_package.my_eval"])
def test_an_evaluation_of_ones_own(own_folder, finished_run, image_folder, name):
    """Its options are in the help, its numbers in the table and in the JSON."""
    helped = run_here("eval", name, "--help")
    assert helped.returncode == 0 and "Nearest class mean" in helped.stdout
    assert "--power" in helped.stdout and "--train-share" in helped.stdout

    data = ["eval", name, finished_run.folder, image_folder, "--workers=0", "--out=evals"]
    assert_refused(run_here(*data, "--power=0"), "--power is 0; it must be above 0")
    compared = run_here(*data, "--power=1", f"--compare={finished_run.backbone}")
    assert compared.returncode == 0, compared.stderr
    (file,) = (own_folder / "evals").glob("*.json")
    assert file.stem.startswith(name.replace(".", "_")) and file.stem.endswith("power_1")
    written = json.loads(file.read_text())
    assert written["protocol"] == name and written["about"]["power"] == 1.0
    assert written["about"]["test_images"] == 9 and written["about"]["classes"] == 3
    numbers = written["values"]["trained, patch mean"][name]
    assert list(numbers) == ["top1", "top1_low", "top1_high", "top5", "mean_per_class"]
    # Of the same weights the differences are none.
    assert written["differences"]["trained, patch mean"][name]["top1"] == 0
    classes = written["per_class"]["trained, patch mean"][name]
    assert list(classes) == ["class_0", "class_1", "class_2"]
    mean = sum(each["top1"] for each in classes.values()) / 3
    assert mean == pytest.approx(numbers["mean_per_class"])
    assert f"top-1 of {name} in %" in compared.stdout and "9 test images" in compared.stdout
    (row,) = [
        line
        for line in compared.stdout.splitlines()
        if line.strip().startswith("trained, patch mean") and " to " in line
    ]
    assert f"{numbers['top1']:.1f}" in row and f"{numbers['top1_low']:.1f} to" in row
    assert "+0.0 points (95 % interval +0.0 to +0.0)" in compared.stdout
    assert written["figures"] == [f"{file.stem}_scores.txt"]
    assert (file.parent / written["figures"][0]).read_text() == "9 images"


def test_from_python_and_by_an_entry_point(own_folder, finished_run, image_folder, monkeypatch):
    from importlib.metadata import EntryPoint

    from hpm.core import plugins
    from hpm.evals import contract

    mine = EntryPoint("nearest", "my_package.my_eval", contract.ENTRY_POINTS)
    for module in (contract, plugins):
        monkeypatch.setattr(module, "installed_plugins", lambda group: {mine.name: mine})
    monkeypatch.syspath_prepend(own_folder)
    listed = run_here("eval", "--help").stdout
    assert "\n  nearest " in listed and "Nearest class mean of frozen features." in listed
    options = {"workers": 0, "baselines": False}
    run, data = str(finished_run.backbone), str(image_folder)
    by_entry_point = hpm.evaluate("nearest", run, data, **options)
    by_name = hpm.evaluate("nearest_mean", run, data, **options)
    assert (
        by_entry_point.values["trained, patch mean"]["nearest"]
        == (by_name.values["trained, patch mean"]["nearest_mean"])
    )


def test_what_is_no_evaluation(own_folder):
    (own_folder / "empty.py").write_text("")
    (own_folder / "forgotten.py").write_text(NEAREST_MEAN.replace("@dataclass\n", ""))
    (own_folder / "broken.py").write_text("import nothing_of_that_name")
    for name in ("empty", "forgotten"):
        assert_refused(run_here("eval", name, "run", "data"), f"{name} is no evaluation", "Options")
    assert_refused(
        run_here("eval", "broken", "run", "data"), "'broken': importing it failed", "nothing"
    )
    assert_refused(run_here("eval", "kn", "run", "data"), "no evaluation 'kn'; did you mean 'knn'")
    assert_refused(run_here("eval", "no.such", "run", "data"), "no evaluation 'no.such'")
    with pytest.raises(hpm.UserError, match="no evaluation 'kn'; did you mean 'knn'.*finetune, "):
        hpm.evaluate("kn", "run", "data")


def test_an_accuracy_without_an_interval_is_read_again(tmp_path):
    evaluation = Evaluation("mine", EvalOptions, lambda task, options: [], {})
    about = {"run": "r", "data": "d", "weights": "student", "seconds": 1.0, "seed": 0}
    result = make_result(evaluation, about, [Measured("trained", numbers={"top1": 50.0})])
    result.save(tmp_path / "evals" / "mine.json")
    (saved,) = saved_evaluations(tmp_path)
    assert saved.words == [["mine", "d", "trained", "top-1 50.0"]]
    assert "50.0" in str(result)


def test_numbers_of_another_kind():
    """Not of a classification: the columns are the numbers' names, or those of the evaluation."""

    def printed(columns):
        evaluation = Evaluation("mine", EvalOptions, lambda task, options: [], columns)
        about = {"run": "r", "data": "d", "weights": "student", "seconds": 1.0, "seed": 0}
        rows = [Measured("trained", numbers={"miou": 41.25, "accuracy": 80.0}), Measured("other")]
        return str(make_result(evaluation, about, rows))

    assert "mine of r (student) on d" in printed({})
    assert "miou" in printed({}) and "41.25" in printed({}) and "80" in printed({})
    own = printed({"mean IoU": "{miou:.1f} %"})
    assert "mean IoU" in own and "41.2 %" in own and "accuracy" not in own
