"""The command line as a person types it, and what it says to mistakes."""

import re
from pathlib import Path

import pytest
from helpers import assert_refused, full_disk, run_here, run_hpm, tiny_arguments, write_images

import hpm


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("empty")


def refused(image_folder, tmp_path, *words, data=None, extra=(), **changes):
    arguments = [*tiny_arguments(**changes), *extra]
    result = run_here("pretrain", data or image_folder, "--out", tmp_path / "run", *arguments)
    assert_refused(result, *words)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_help():
    result = run_here("--help")
    assert result.returncode == 0
    for verb in ("demo", "pretrain", "eval", "show"):
        assert re.search(rf"^  {verb} ", result.stdout, re.MULTILINE)
    result = run_here("pretrain", "--help")
    assert result.returncode == 0 and "--mask-ratio" in result.stdout
    assert "Fraction of the patches to hide" in result.stdout
    assert run_here("--version").stdout.strip() == hpm.__version__


@pytest.mark.parametrize("verb", ["eval", "bench"])
def test_help_of_a_verb_of_several_kinds(verb):
    from hpm.commands.cli import GROUPS

    result = run_here(verb, "--help")
    assert result.returncode == 0 and not result.stderr
    assert result.stdout.startswith(f"usage: hpm {verb} KIND ")
    words = " ".join(result.stdout.split())
    for kind, about in GROUPS[verb][1]().items():
        assert about.about and f"{kind} {about.about}" in words


@pytest.mark.parametrize("arguments", [["--help"], ["eval", "--help"], ["bench", "--help"]])
def test_help_fits_the_terminal(monkeypatch, arguments):
    from hpm.commands.cli import understand
    from hpm.core.parser import HelpWanted

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(HelpWanted) as wanted:
        understand(arguments)
    assert max(map(len, str(wanted.value).splitlines())) <= 80


@pytest.mark.parametrize("protocol", ["segment", "detect"])
def test_help_leaves_out_what_is_refused(protocol):
    shown = run_here("eval", protocol, "--help").stdout
    assert "--crop-share" not in shown and "--frames" not in shown
    assert "--crop-share" in run_here("eval", "linear", "--help").stdout
    result = run_here("eval", protocol, "run", "photos", "--crop-share=0.5")
    assert_refused(result, "reads whole images: leave --crop-share out")


def test_help_shows_that_a_switch_is_on():
    from hpm.commands.cli import understand
    from hpm.core.parser import HelpWanted

    with pytest.raises(HelpWanted) as wanted:
        understand(["eval", "knn", "--help"])
    words = " ".join(str(wanted.value).split())
    assert "and raw pixels (default: true)." in words
    assert "--baselines {true,false} Also measure" in words  # how to switch it off
    assert "(default: false)" not in words  # an option that is off needs no default


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["ablate"], ["--arm TEXT", "--vary TEXT", "--betas A,B"]),  # an arm each time
        (["show"], ["--panels A,B"]),
        (["eval", "segment"], ["--one-class {true,false}", "--flip {true,false}"]),
        (["compare"], ["RUNS Run folders"]),
    ],
)
def test_help_shows_what_an_option_takes(words, shown):
    from hpm.commands.cli import understand
    from hpm.core.parser import HelpWanted

    with pytest.raises(HelpWanted) as wanted:
        understand([*words, "--help"])
    text = " ".join(str(wanted.value).split())
    for each in shown:
        assert each in text


def test_a_switch_is_turned_off_with_false():
    from hpm.commands.cli import understand

    with pytest.raises(hpm.UserError, match="'--no-baselines': pass --baselines false"):
        understand(["eval", "knn", "run", "data", "--no-baselines"])
    assert understand(["eval", "knn", "run", "data", "--baselines", "false"])[1].baselines is False


def test_no_line_of_the_help_breaks_off():
    lines = run_here("--help").stdout.splitlines()[1:]
    assert not [line for line in lines if line.rstrip().endswith(("...", ",", " of", " and"))]


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (["--image-size", "96,64"], "image_size", (96, 64)),
        (["--image-size=96, 64"], "image_size", (96, 64)),
        (["--image-size", "[96,64]"], "image_size", (96, 64)),
        (["--image-size", "96"], "image_size", 96),
        (["--crop-scale", "0.5,1"], "crop_scale", (0.5, 1.0)),
    ],
)
def test_a_list_needs_no_brackets(words, option, value):
    from hpm.commands.cli import understand

    config = understand(["pretrain", "photos", "--out", "run", *words])[1]
    assert getattr(config, option) == value


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("pretrain photos --out", "out"),
        ("demo --out", "out"),
        ("ablate photos --out", "out"),
        ("methods photos --out", "out"),
        ("tokenize photos --out", "out"),
        ("prepare photos --out", "out"),
        ("plan photos --out", "out"),
        ("plan photos --json", "json"),
        ("doctor --json", "json"),
        ("bench step --json", "json"),
        ("bench data photos --json", "json"),
        ("eval knn run photos --out", "out"),
        ("show run photos --out", "out"),
        ("report run --out", "out"),
        ("compare one two --out", "out"),
        ("embed run photos --out", "out"),
        ("similar features --out", "out"),
        ("export run --to timm --out", "out"),
        ("predict model photos --out", "out"),
    ],
)
def test_a_path_to_write_may_begin_with_the_home_folder(words, option, monkeypatch):
    """Shells do not expand `--out=~/run`, and Python and YAML files expand nothing."""
    from hpm.commands.cli import understand

    monkeypatch.setenv("HOME", "/home/me")
    config = understand(f"{words}=~/new".split())[1]
    assert getattr(config, option) == "/home/me/new"


def test_what_bench_data_reads_is_named_as_elsewhere():
    from hpm.commands.cli import understand

    assert understand(["bench", "data", "photos"])[1].data == "photos"
    assert understand(["bench", "data", "--data", "photos"])[1].data == "photos"
    assert_refused(run_here("bench", "step", "photos"), "unexpected argument 'photos'")
    assert_refused(run_here("pretrain", "my", "photos", "--out", "x"), "spaces in quotes")


def test_a_pattern_that_the_shell_has_expanded(tmp_path):
    files = [tmp_path / name for name in ("0.tar", "1.tar")]
    for file in files:
        file.touch()
    refused = run_here("pretrain", *files, "--out", tmp_path / "run")
    assert_refused(refused, f"unexpected argument '{files[1]}': put a pattern", "in quotes")
    missing = run_here("pretrain", files[0], "elsewhere", "--out", tmp_path / "run")
    assert_refused(missing, "unexpected argument 'elsewhere': put a path with spaces")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 32}, ["image_size 16 is smaller than patch_size 32"]),
        ({"patch_size": 5}, ["patch_size 5 does not divide image_size 16", "--image-size 15"]),
        ({"patch_size": 0}, ["--patch-size is 0; it must be at least 1"]),
        ({"patch_size": "4,0"}, ["--patch-size is 0; it must be at least 1"]),
        ({"seed": 10**20}, [f"--seed is {10**20}; it must lie between 0 and 1e+18"]),
        ({"mask_ratio": 1.0}, ["--mask-ratio is 1;", "between 0 and 1"]),
        ({"mask_ratio": -0.5}, ["--mask-ratio is -0.5", "between 0 and 1"]),
        ({"mask_ratio": 0.99}, ["leaves no visible patch of 16", "smaller --mask-ratio"]),
        ({"mask_ratio": "high"}, ["--mask-ratio cannot be 'high'", "a number"]),
        ({"model": "vit_smal"}, ["model is 'vit_smal'", "did you mean 'vit_small'"]),
        ({"predictor_loss": "none"}, ["mask easy_to_hard", "predictor_loss is none"]),
        ({"warmup": "soon"}, ["warmup: 'soon' is not a duration"]),
        ({"batch_size": 1000}, ["a batch of 1000", "48 images", "--batch-size"]),
        ({"decoder_dim": 30, "decoder_heads": 4}, ["decoder_dim 30 must be a multiple"]),
        ({"accumulate": 3}, ["accumulate 3 does not divide batch_size 8"]),
        ({"init": "nowhere.pt"}, ["nowhere.pt: no such file"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_cannot_work(image_folder, tmp_path, monkeypatch, capsys, changes, words):
    """In this process, for speed: what `hpm` prints and returns is the same."""
    from hpm.commands.cli import main

    code = main(
        ["pretrain", str(image_folder), "--out", str(tmp_path / "run"), *tiny_arguments(**changes)]
    )
    errors = capsys.readouterr().err
    assert code == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("hpm: error: ")]
    for word in words:
        assert word in line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_unknown_option_verb_and_preset(image_folder, tmp_path):
    refused(
        image_folder,
        tmp_path,
        "unknown option '--mask-rato'; did you mean '--mask-ratio'",
        extra=["--mask-rato", "0.5"],
    )
    assert_refused(run_here("pretrian", image_folder), "no verb 'pretrian'", "'pretrain'")
    refused(
        image_folder,
        tmp_path,
        "no preset or file 'vit_base_in1'",
        "'vit_base_in1k'",
        extra=["--config", "vit_base_in1"],
    )
    (tmp_path / "mine.yaml").write_text("mask_rato: 0.5\n")
    refused(image_folder, tmp_path, "mask_rato", extra=["--config", tmp_path / "mine.yaml"])
    assert_refused(run_here("pretrain", image_folder), "--out must be given")
    assert_refused(run_here("eval", "kn", "run", "data"), "no evaluation 'kn'", "knn")


def test_steps_or_epochs(tmp_path):
    """Either gives the length: of two that are typed none is preferred; one that is typed replaces
    whatever a preset has."""
    from hpm.commands.cli import understand

    both = run_here("pretrain", "photos", "--out", tmp_path / "run", "--steps=5", "--epochs=2")
    assert_refused(both, "steps is 5 and epochs is 2: pass only one of them")
    with pytest.raises(hpm.UserError, match="steps is 5 and epochs is 2"):
        hpm.pretrain(data="photos", out=str(tmp_path / "run"), steps=5, epochs=2)

    def length(*words):
        config = understand(["pretrain", "photos", "--out", "run", *words])[1]
        return config.steps or f"{config.epochs} epochs"

    assert length("--config", "demo") == 1000
    assert length("--config", "demo", "--epochs", "3") == "3 epochs"
    assert length("--epochs", "3", "--config", "demo") == "3 epochs"
    assert length("--config", "vit_base_in1k", "--steps", "7") == 7
    # A run's config.yaml has both; it trained for the steps.
    (tmp_path / "old.yaml").write_text("epochs: 100\nsteps: 9\n")
    assert length("--config", str(tmp_path / "old.yaml")) == 9


@pytest.mark.parametrize("place", [0, 1, 3, 5])
def test_a_config_never_overrides_what_is_typed(place, tmp_path):
    """Wherever it stands: neither the data nor the folder of an old run."""
    from hpm.commands.cli import understand

    old = tmp_path / "config.yaml"
    old.write_text("data: old\nout: runs/old\nseed: 3\nepochs: 7\nmask_ratio: 0.5\n")
    words = ["new", "--out", "runs/new", "--seed", "4"]
    words[place:place] = ["--config", str(old)]
    config = understand(["pretrain", *words])[1]
    assert (config.data, config.out, config.seed) == ("new", "runs/new", 4)
    assert (config.epochs, config.mask_ratio) == (7, 0.5)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("vary: mask=random,hardest", ("mask=random,hardest",)),
        ("vary: [mask=random, steps=3]", ("mask=random", "steps=3")),
        ("vary:\n- mask=random,hardest\n- steps=2,3", ("mask=random,hardest", "steps=2,3")),
    ],
)
def test_repeated_options_in_a_file(text, values, tmp_path):
    from hpm.commands.cli import understand

    file = tmp_path / "options.yaml"
    file.write_text(text)
    words = ["ablate", "photos", "--out", "out", "--config", str(file)]
    assert understand(words)[1].vary == values
    assert understand([*words, "--vary", "target=hog"])[1].vary == ("target=hog",)


def test_bad_data(empty, tmp_path, image_folder):
    refused(image_folder, tmp_path, "no images in this folder", data=empty)
    refused(image_folder, tmp_path, "no such folder or file", data=empty / "nowhere")
    unreadable = tmp_path / "unreadable"
    unreadable.mkdir()
    for number in range(9):
        (unreadable / f"{number}.jpg").write_bytes(b"no image")
    refused(image_folder, tmp_path, "no readable image among 9", data=unreadable, holdout=0)
    tiny = write_images(tmp_path / "tiny", size=3)
    refused(image_folder, tmp_path, "no readable image", data=tiny, holdout=0)
    listed = tmp_path / "list.txt"
    listed.write_text("missing.png 1\n")
    refused(image_folder, tmp_path, "list.txt, line 1: no such image", data=listed)


def test_bad_output_folders(image_folder, tmp_path, finished_run):
    result = run_here(
        "pretrain",
        image_folder,
        "--out",
        finished_run.folder,
        *tiny_arguments(mask_ratio=0.5, holdout=8),
    )
    assert_refused(result, "holds another run: there mask_ratio is 0.75, here 0.5", "--init")
    (tmp_path / "notes.txt").write_text("mine")
    result = run_here("pretrain", image_folder, "--out", tmp_path, *tiny_arguments())
    assert_refused(result, "exists and is no run folder")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_checkpoint_stops_the_run_and_is_kept(image_folder, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", image_folder, "--out", out, *tiny_arguments()]
    assert run_here(*arguments).returncode == 0
    latest = sorted((out / "checkpoints").iterdir())[-1]
    latest.write_bytes(latest.read_bytes()[:1000])
    assert_refused(run_here(*arguments), latest.name, "truncated")
    assert latest.stat().st_size == 1000
    latest.unlink()  # the checkpoint before it is still there
    again = run_here(*arguments)
    assert again.returncode == 0 and "resuming from" in again.stderr and "step 4" in again.stderr


def test_a_disk_that_fills_up_while_training(image_folder, tmp_path):
    out = tmp_path / "run"
    arguments = ["pretrain", image_folder, "--out", out, *tiny_arguments(steps=4)]
    with full_disk(100_000):
        result = run_here(*arguments)
    assert_refused(result, "no space left; make room, then run the same command again")
    assert not list((out / "checkpoints").iterdir())
    assert run_here(*arguments).returncode == 0


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    import torch

    from hpm.commands import cli

    def too_much(arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")

    monkeypatch.setattr("hpm.pretraining.run_pretraining", too_much)
    assert cli.main(["pretrain", "photos", "--out", "run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hpm: error: the GPU's memory is full (2.50 GiB more")
    assert "--accumulate 2" in line


def test_eval_and_show(finished_run, image_folder, tmp_path):
    result = run_here("eval", "knn", finished_run.folder, image_folder, "--k", "[1,5]")
    assert result.returncode == 0, result.stderr
    for words in (
        "trained",
        "random weights",
        "raw pixels",
        "k = 5",
        "ranking accuracy",
        "rank correlation",
    ):
        assert words in result.stdout
    figure = tmp_path / "fig.png"
    result = run_here("show", finished_run.folder, image_folder, "--out", figure)
    assert result.returncode == 0 and figure.stat().st_size > 10_000
    result = run_here("show", finished_run.backbone, image_folder, "--out", figure)
    assert result.returncode == 0 and "not shown: actual loss" in result.stdout
    assert_refused(
        run_here("show", finished_run.folder, image_folder, "--out", tmp_path / "a.txt"), ".png"
    )


@pytest.mark.slow
def test_demo(tmp_path):
    result = run_hpm("demo", "--out", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    best = {}
    for line in result.stdout.splitlines():
        for name in ("trained", "random weights", "raw pixels"):
            if name in line:
                numbers = [float(n) for n in re.findall(r"\d+\.\d", line)]
                best[name] = max([*numbers, best.get(name, 0)])
    assert best["trained"] > best["random weights"] + 5
    hard, chance = map(
        int,
        re.search(r"(\d+) % lies on objects \((\d+) %", result.stdout.replace("\n", " ")).groups(),
    )
    assert hard > 1.5 * chance
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 50_000
    assert "your images: hpm pretrain FOLDER_OF_IMAGES --out" in result.stdout


@pytest.mark.slow
def test_demo_of_videos(tmp_path, monkeypatch):
    """Two steps on few videos, which cannot be above anything: the output says so."""
    from hpm.data.video import demo

    monkeypatch.setattr(demo, "SIZES", {"train": 120, "test": 40})
    result = run_here("demo", "--video", "--steps", 2, "--out", tmp_path / "demo")
    assert result.returncode == 0, result.stderr
    words = " ".join(result.stdout.split())
    assert re.search(
        r"motion: by a linear probe, trained, class token tells .* not above: .*raw pix", words
    )
    assert "one frame, repeated" in words and re.search(r"% lies on objects \(\d+ % by", words)
    assert "your videos: hpm pretrain FOLDER_OF_VIDEOS --frames 16" in words
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 20_000
    assert "linear probe on demo-video" in (tmp_path / "demo" / "report.html").read_text()


def test_the_verdict_of_the_demo():
    from hpm.commands.demo import verdict
    from hpm.evals.result import Result

    def numbers(top1):
        return {"linear": {"top1": top1, "top1_low": top1 - 2, "top1_high": top1 + 2}}

    def result(**names):
        values = {name.replace("_", " "): numbers(top1) for name, top1 in names.items()}
        values["trained, class token"] = numbers(30.0 if "raw_pixels" in names else 12.0)
        values["random weights, class token"] = numbers(29.0)
        return Result("linear", {"classes": 10}, values)

    frame = {"one frame": result().values["trained, class token"]["linear"]}
    text = verdict("motion", "videos", result(raw_pixels=15.0), ", class token", frame)
    assert "tells 30.0 % of the videos (28.0 to 32.0)" in text
    above, _, below = text.partition("; not above: ")
    assert all(f"({n} %)" in above for n in ("10.0", "15.0", "12.0")) and "29.0" in below


def test_counts_have_their_number():
    from hpm.core.errors import counted

    assert counted(1, "image") == "1 image" and counted(0, "image") == "0 images"
    assert counted(1, "class", "classes") == "1 class"
    assert counted(2, "class", "classes") == "2 classes"
    sources = [path.read_text() for path in Path(hpm.__file__).parent.rglob("*.py")]
    assert not [text for text in sources if "(es)" in text or "image(s)" in text]
