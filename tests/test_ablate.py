import csv

import pytest
from helpers import TINY, assert_refused, run_hpm, tiny_arguments

import hpm
from hpm.ablate import ablate, combinations
from hpm.config import AblateConfig, make_config


def config_of(image_folder, out, **options):
    return make_config(AblateConfig, TINY | {"data": str(image_folder), "out": str(out)} | options)


def test_combinations():
    found = combinations(("mask=random,hardest", "mask_ratio=0.5,0.75", "crop-scale=[0.2,1.0]"))
    assert len(found) == 4
    assert found[1] == {"mask": "random", "mask_ratio": 0.75, "crop_scale": [0.2, 1.0]}


@pytest.mark.slow
def test_a_grid_over_seeds(image_folder, tmp_path, capsys):
    options = {"vary": ("mask=random,easy_to_hard", "target=hog"), "seeds": 2, "steps": 4}
    table = ablate(config_of(image_folder, tmp_path / "ablation", **options)).read_text()
    lines = table.splitlines()
    assert lines[0].startswith("| mask | target | seeds | kNN | linear probe | ranking accuracy")
    assert len(lines) == 2 + 2 and all("±" in line for line in lines[2:])
    assert lines[2].startswith("| random | hog | 2 |")
    rows = list(csv.DictReader((tmp_path / "ablation" / "ablation.csv").open()))
    assert len(rows) == 4 and {row["seed"] for row in rows} == {"0", "1"}
    mean = sum(float(r["knn"]) for r in rows if (r["mask"], r["target"]) == ("random", "hog")) / 2
    assert f"| random | hog | 2 | {mean:.1f} ±" in table
    assert (tmp_path / "ablation" / "ablation.png").stat().st_size > 5000
    # Again: nothing is trained or measured anew, and the table is the same.
    backbones = list((tmp_path / "ablation").rglob("backbone.safetensors"))
    times = [path.stat().st_mtime_ns for path in backbones]
    again = ablate(config_of(image_folder, tmp_path / "ablation", **options)).read_text()
    assert again == table and len(backbones) == 4
    assert times == [path.stat().st_mtime_ns for path in backbones]
    with pytest.raises(hpm.UserError, match="holds another run: there base_lr"):
        ablate(config_of(image_folder, tmp_path / "ablation", **options, base_lr=1e-4))


def test_without_labels_there_are_losses(image_folder, tmp_path):
    result = run_hpm(
        "ablate", image_folder / "class_0", "--vary", "mask=random",
        "--vary", "mask_ratio=0.5,0.75", "--seeds=1", "--out", tmp_path / "a",
        *tiny_arguments(steps=2, eval_every="100%"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "has no labels" in result.stderr and "kNN" not in result.stdout
    assert "| random | 0.5 | 1 |" in result.stdout


def test_bad_grids(image_folder, tmp_path):
    def refused(words, *vary, **options):
        with pytest.raises(hpm.UserError, match=words):
            ablate(config_of(image_folder, tmp_path / "a", vary=vary, **options))

    refused("name what to vary")
    refused("write an option and its values", "mask")
    refused("mask is named twice", "mask=random", "mask=hardest")
    refused("seed cannot be varied", "seed=1,2")
    refused("mask=hardes: mask is 'hardes'; did you mean 'hardest'", "mask=random,hardes")
    refused("mask=random, predictor_loss=non: ", "mask=random", "predictor_loss=non")
    refused("mask=hardest, predictor_loss=none: mask hardest needs", "mask=hardest",
            "predictor_loss=none")  # fmt: skip
    refused("seeds is 0", "mask=random", seeds=0)
    assert not (tmp_path / "a").exists()  # all of it before anything runs
    assert_refused(
        run_hpm("ablate", image_folder, "--out", tmp_path / "a", "--vary"), "needs a value"
    )
