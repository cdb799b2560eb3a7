import csv
import dataclasses
import statistics

import pytest
from helpers import TINY, assert_refused, run_here, tiny_arguments

import hpm
from hpm.commands.ablate import ablate, losses_compare
from hpm.commands.ablation_plan import ARMS, combinations, make_plan, make_variants, read_arms
from hpm.commands.ablation_results import Results
from hpm.commands.options import AblateConfig
from hpm.core.config import PretrainConfig
from hpm.core.options import make_config


def config_of(image_folder, out, **options):
    return make_config(AblateConfig, TINY | {"data": str(image_folder), "out": str(out)} | options)


def test_combinations():
    found = combinations(("mask=random,hardest", "mask_ratio=0.5,0.75", "crop-scale=[0.2,1.0]"))
    assert len(found) == 4
    assert found[1] == {"mask": "random", "mask_ratio": 0.75, "crop_scale": [0.2, 1.0]}


def test_every_arm_with_every_combination():
    variants = make_variants(("mae", "hpm"), ("mask_ratio=0.5,0.75",))
    assert [str(variant) for variant in variants] == [
        "mae, mask_ratio=0.5",
        "hpm, mask_ratio=0.5",
        "mae, mask_ratio=0.75",
        "hpm, mask_ratio=0.75",
    ]
    assert variants[3].options == ARMS["hpm"] | {"mask_ratio": 0.75}
    own = read_arms(("half: teacher-scale=0.5 ema_horizon_end='8 %' betas=[0.9,0.95]", "mae"))
    assert own["half"] == {"teacher_scale": 0.5, "ema_horizon_end": "8 %", "betas": [0.9, 0.95]}
    assert own["mae"] == ARMS["mae"]


@pytest.mark.parametrize(
    "options",
    [{}, {"teacher_scale": 0.5}, {"teacher_view": "masked"}, {"mine_by": "memory"}],
    ids=str,
)
def test_the_arms_are_valid_whatever_else_is_asked_of_the_teacher(tmp_path, options):
    config = config_of("photos", tmp_path / "a", arm=tuple(ARMS), seeds=2, **options)
    runs = make_plan(config)[1]
    assert [str(run.variant) for run in runs] == 2 * list(ARMS)
    assert len({run.config.out for run in runs}) == 8
    how = {(c.mask, c.predictor_loss, c.mine_by) for c in (run.config for run in runs)}
    assert len(how) == 4
    assert ("random", "none", "teacher") in how  # MAE


def test_a_varied_length_replaces_the_other(tmp_path):
    config = config_of("photos", tmp_path / "a", vary=("epochs=2,3",), seeds=1)
    assert config.steps == TINY["steps"]
    assert [(r.config.steps, r.config.epochs) for r in make_plan(config)[1]] == [
        (None, 2),
        (None, 3),
    ]


def test_losses_compare_only_of_the_same_task():
    base = PretrainConfig("photos", "out")

    def compare(**options):
        return losses_compare([base, dataclasses.replace(base, **options)])

    assert compare(mask="random", predictor_loss="none", base_lr=1e-3, seed=1)
    assert not compare(target="pixels") and not compare(mask_ratio=0.5)
    assert not compare(patch_size=32) and not compare(model="vit_huge")  # patches of 14
    assert not losses_compare([dataclasses.replace(base, target="teacher")] * 2)


def test_losses_of_clips_compare_only_of_the_same_masks():
    """Held-out masks are of whole tubes where training hides whole tubes."""
    base = PretrainConfig("videos", "out", frames=8)
    tubes = dataclasses.replace(base, mine_tubes="mean")

    def compare(first, **options):
        return losses_compare([first, dataclasses.replace(first, **options)])

    assert compare(base, mask="random") and not compare(base, frame_stride=1)
    assert not compare(base, mine_tubes="mean") and not compare(base, mask="tube")
    assert compare(tubes, mine_tubes="max") and compare(tubes, mine_tubes="none", mask="tube")


def test_differences_are_paired_over_the_seeds(tmp_path):
    results = Results(tmp_path, make_variants(("mae", "hpm"), ("mask_ratio=0.5,0.75",)))
    knn = {
        "mae, mask_ratio=0.5": (10, 30),
        "hpm, mask_ratio=0.5": (11, 33),
        "mae, mask_ratio=0.75": (50, 60),
        "hpm, mask_ratio=0.75": (40, 45),
    }
    for variant in results.variants:
        for seed in (0, 1):
            values = {"knn": knn[str(variant)][seed], "minutes": 1.0}
            results.add(variant, seed, values)
    means, less = results.tables()
    assert means.head == ["arm", "mask_ratio", "seeds", "kNN", "minutes"]
    assert means.rows[0] == [
        "mae",
        "0.5",
        "2",
        f"20.0 ± {statistics.stdev((10, 30)):.1f}",
        "1.0 ± 0.0",
    ]
    # Within a mask ratio, and with the deviation of the differences: 1 and 3, -10 and -15.
    assert less.title.startswith("minus mae") and less.head == ["arm", "mask_ratio", "kNN"]
    assert less.rows == [["hpm", "0.5", "+2.0 ± 1.4"], ["hpm", "0.75", "-12.5 ± 3.5"]]
    # A seed that only one of them has is in neither difference.
    results.add(results.variants[0], 2, {"knn": 99.0})
    assert results.tables()[1].rows[0] == ["hpm", "0.5", "+2.0 ± 1.4"]


def test_a_grid_over_seeds(image_folder, tmp_path):
    options = {"vary": ("mask=random,easy_to_hard", "target=hog"), "seeds": 2, "steps": 4}
    options |= {"holdout": 8}
    results = ablate(config_of(image_folder, tmp_path / "ablation", **options))
    table = results.file.read_text()
    lines = table.splitlines()
    assert lines[2].startswith("| mask | target | seeds | kNN | linear probe | ranking accuracy")
    assert lines[4].startswith("| random | hog | 2 |")
    assert lines[5].startswith("| easy_to_hard | hog | 2 |") and "±" in lines[5]
    assert "Minus mask=random, target=hog, seed by seed" in table
    rows = list(csv.DictReader((tmp_path / "ablation" / "ablation.csv").open()))
    assert len(rows) == 4 and {row["seed"] for row in rows} == {"0", "1"}
    mean = sum(float(r["knn"]) for r in rows if (r["mask"], r["target"]) == ("random", "hog")) / 2
    assert f"| random | hog | 2 | {mean:.1f} ±" in table
    assert (tmp_path / "ablation" / "ablation.png").stat().st_size > 5000
    # Again: nothing is trained or measured anew, and the table is the same.
    backbones = list((tmp_path / "ablation").rglob("backbone.safetensors"))
    times = [path.stat().st_mtime_ns for path in backbones]
    again = ablate(config_of(image_folder, tmp_path / "ablation", **options)).file.read_text()
    assert again == table and len(backbones) == 4
    assert times == [path.stat().st_mtime_ns for path in backbones]
    with pytest.raises(hpm.UserError, match="holds another run: there base_lr"):
        ablate(config_of(image_folder, tmp_path / "ablation", **options, base_lr=1e-4))


def test_changed_labels_are_measured_anew(image_folder, tmp_path):
    names = [(path, path.parent.name) for path in sorted(image_folder.glob("*/*.png"))]
    listed = tmp_path / "labels.txt"

    def measured():
        listed.write_text("".join(f"{path} {name}\n" for path, name in names))
        options = {"arm": ("mae",), "seeds": 1, "steps": 2, "labels": str(listed)}
        ablate(config_of(image_folder, tmp_path / "ablation", **options))
        files = sorted((tmp_path / "ablation").rglob("ablation/*.json"))
        assert [file.name.split("_")[0] for file in files] == ["knn", "linear"]
        return [file.stat().st_mtime_ns for file in files]

    first = measured()
    assert measured() == first
    names[0], names[-1] = (names[0][0], names[-1][1]), (names[-1][0], names[0][1])
    assert all(now > before for now, before in zip(measured(), first, strict=True))


def test_arms_without_labels(image_folder, tmp_path):
    result = run_here(
        "ablate",
        image_folder / "class_0",
        "--arm",
        "mae",
        "--arm",
        "hpm",
        "--seeds=1",
        "--out",
        tmp_path / "a",
        *tiny_arguments(steps=2, eval_every="100%", holdout=4),
    )
    assert result.returncode == 0, result.stderr
    assert "has no labels" in result.stderr and "kNN" not in result.stdout
    # A table for the terminal, not the Markdown of the file.
    assert "|" not in result.stdout
    assert {"effective", "rank"} <= set(result.stdout.split())  # headings wrap
    assert "minus mae, seed by seed" in result.stdout
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "a" / "ablation.csv").open())}
    assert set(rows) == {"mae", "hpm"}
    for row in rows.values():
        assert float(row["rank"]) >= 1 and -1 <= float(row["patch_similarity"]) <= 1
        assert float(row["held_out_loss"]) > 0  # of MAE too, which has no predictor
    assert "loss" not in rows["mae"]  # that of the training depends on what is hidden
    assert "- mae: `mask=random predictor_loss=none" in (tmp_path / "a/ablation.md").read_text()
    assert (tmp_path / "a" / "ablation.png").stat().st_size > 5000


def test_bad_comparisons(image_folder, tmp_path):
    def refused(words, *vary, **options):
        with pytest.raises(hpm.UserError, match=words):
            ablate(config_of(image_folder, tmp_path / "a", vary=vary, **options))

    refused("name what to compare: --arm mae --arm hpm, or --vary")
    refused("write an option and its values", "mask")
    refused("mask is named twice", "mask=random", "mask=hardest")
    refused("random is there twice", "mask=random,random")
    refused("seed cannot be varied", "seed=1,2")
    refused("vary: unknown option 'mask-ration'; did you mean 'mask-ratio'", "mask-ration=0.5")
    refused("vary: unknown option 'mask_ration'; did you mean 'mask_ratio'", "mask_ration=0.5")
    refused("steps is 3 and epochs is 2: pass only one", "steps=3", "epochs=2")
    refused("mask=hardes: mask is 'hardes'; did you mean 'hardest'", "mask=random,hardes")
    refused("mask=random, predictor_loss=non: ", "mask=random", "predictor_loss=non")
    # Every invalid pair of a grid is named, and what to do instead.
    refused(
        "2 of 6 combinations cannot be run: mask=hardest, predictor_loss=none: mask hardest "
        "needs .*; mask=easiest, predictor_loss=none: .*; options that belong together are an "
        "arm",
        "mask=random,hardest,easiest",
        "predictor_loss=relative,none",
    )
    refused("seeds is 0", "mask=random", seeds=0)
    refused("no arm 'hmp'; did you mean 'hpm'", arm=("hmp",))
    refused("arm mae is given twice", arm=("mae", "mae"))
    refused("the name 'mae' is built in", arm=("mae: mask=block",))
    refused("the name 'two words' is not one word", arm=("two words: mask=block",))
    refused("write its options", arm=("mine:",))
    refused("unknown option 'mask_ration'", arm=("mine: mask_ration=0.5",))
    refused("an option is there twice", arm=("mine: mask=block mask=random",))
    refused("No closing quotation", arm=("mine: mask='block",))
    refused(
        "bad: mask hardest needs a loss predictor", arm=("bad: mask=hardest predictor_loss=none",)
    )
    refused("mask is set by arm hpm", "mask=random,block", arm=("hpm",))
    assert not (tmp_path / "a").exists()  # all of it before anything runs
    assert_refused(
        run_here("ablate", image_folder, "--out", tmp_path / "a", "--vary"), "needs a value"
    )
