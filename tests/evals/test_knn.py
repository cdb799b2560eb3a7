import json

import numpy as np
import pytest
import torch
from helpers import write_images

import hpm
from hpm.core.files import read_tensors, write_tensors
from hpm.data.sources import Splits, open_source
from hpm.evals import neighbours
from hpm.evals.features import (
    EvaluatedBackbone,
    Features,
    ImageReader,
    extract,
    labelled_splits,
    raw_pixels,
)
from hpm.evals.neighbours import nearest_neighbours
from hpm.weights.resolve import load


def naive_knn(train, test, num_classes, k, temperature):
    """One query at a time, in float64."""
    right = 0
    bank = train.features.double().numpy()
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    for query, label in zip(test.features.double().numpy(), test.labels.tolist()):
        similarity = bank @ (query / np.linalg.norm(query))
        votes = np.zeros(num_classes)
        for i in np.argsort(-similarity)[:k]:
            votes[train.labels[i]] += np.exp(similarity[i] / temperature)
        right += int(votes.argmax() == label)
    return right / len(test.labels)


def top1(ranked):
    return (ranked.ranks == 0).double().mean().item()


def random_features(count, dim=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    features = torch.randn(count, dim, generator=generator)
    features[:, 0] += labels
    return Features(features, labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_knn_equals_a_naive_version(temperature):
    train, test = random_features(150), random_features(60, seed=1)
    ours = dict(nearest_neighbours(train, test, 4, (1, 10, 20, 100, 200), temperature))
    assert list(ours) == [1, 10, 20, 100]  # 200 is more than there are
    for k in (1, 10, 20, 100):
        assert top1(ours[k]) == pytest.approx(naive_knn(train, test, 4, k, temperature))


def test_features_stay_as_they_are():
    train, test = random_features(50), random_features(10, seed=1)
    before = train.features.clone(), test.features.clone()
    list(nearest_neighbours(train, test, 4, (5,)))
    assert torch.equal(train.features, before[0]) and torch.equal(test.features, before[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_gpu_holds_the_features_once():
    train, test = random_features(200_000, dim=128), random_features(4, dim=128)
    device = torch.device("cuda")
    list(nearest_neighbours(train, test, 4, (5,), device=device))  # the library's own memory
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    list(nearest_neighbours(train, test, 4, (5,), device=device))
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.5 * train.features.numel() * 4


def test_known_answers():
    corners = torch.eye(3)
    train = Features(corners.repeat(5, 1), torch.arange(3).repeat(5))
    test = Features(corners + 0.01, torch.tensor([0, 1, 0]))
    found = dict(nearest_neighbours(train, test, 3, (5,)))
    assert found[5].ranks[:2].tolist() == [0, 0] and found[5].ranks[2] > 0


def test_each_image_once_with_its_own_label(tmp_path):
    """Broken images take their labels with them; a mean grey value tells which image is which."""
    images = write_images(tmp_path, classes=2, per_class=7)
    (images / "class_0" / "002.png").write_bytes(b"broken")
    source = open_source(str(images)).train
    reported = []
    found = extract(
        lambda views: {"mean": views.float().mean((2, 3))},
        source,
        source.labels,
        (20, 20),
        3,
        ImageReader(4, 0, reported.append),
    )["mean"]
    assert len(found.features) == len(found.labels) == 13 and len(reported) == 1
    expected, labels = [], []
    for index in range(len(source)):
        if "class_0/002" not in source.path(index):
            pixels = np.asarray(source.open(index)).astype(np.float32)
            expected.append(pixels.mean((0, 1)))
            labels.append(int(f"class_{1}" in source.path(index)))
    np.testing.assert_allclose(found.features.numpy(), np.array(expected), rtol=1e-5)
    assert found.labels.tolist() == labels


def test_raw_pixels_are_small_and_centred():
    features = raw_pixels(torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8))
    assert features.shape == (2, 3 * 32 * 43)
    assert features.mean(1).abs().max() < 1e-3


def test_a_split_is_held_out_by_class(image_folder):
    data = labelled_splits(Splits(open_source(str(image_folder)).train), seed=0)
    assert np.bincount(data.test_labels).tolist() == [3, 3, 3]
    paths = [s.path(i) for s in (data.train, data.test) for i in range(len(s))]
    assert len(set(paths)) == len(paths) == 48


def test_labels_of_two_splits_are_numbered_alike(tmp_path):
    write_images(tmp_path / "one", per_class=2)
    (tmp_path / "list.txt").write_text(
        "one/class_2/000.png class_2\none/class_0/000.png class_0\none/class_1/000.png class_1\n"
    )
    splits = Splits(
        open_source(str(tmp_path / "one")).train, open_source(str(tmp_path / "list.txt")).train
    )
    data = labelled_splits(splits, seed=0)
    assert data.test_labels.tolist() == [2, 0, 1]


def test_a_test_split_with_a_class_of_no_image(tmp_path):
    """Such as a list of classes in a table, of which some do not occur."""
    train = open_source(str(write_images(tmp_path / "train", classes=2, per_class=2))).train
    test = open_source(str(write_images(tmp_path / "test", classes=2, per_class=2))).train
    test.classes = ["none", *test.classes]
    test.labels = test.labels + 1
    data = labelled_splits(Splits(train, test), seed=0)
    assert data.test_labels.tolist() == [0, 0, 1, 1] and data.classes == train.classes


def splits_of(tmp_path, train, test):
    write_images(tmp_path / "train", classes=train, per_class=2)
    write_images(tmp_path / "val", classes=test, per_class=2)
    return open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        (2, 3, "has 1 class that .*train has not, the first 'class_2'"),
        (3, 2, "has 1 class that .*val has not, the first 'class_2'"),
    ],
)
def test_more_classes_in_one_split(tmp_path, train, test, words):
    with pytest.raises(hpm.UserError, match=words):
        labelled_splits(splits_of(tmp_path, train, test), seed=0)


def test_a_class_of_one_image_cannot_be_held_out(tmp_path):
    write_images(tmp_path, classes=2, per_class=1)
    with pytest.raises(hpm.UserError, match="class 'class_0' has one image only"):
        labelled_splits(open_source(str(tmp_path)), seed=0)


def test_evaluate(finished_run, image_folder):
    result = hpm.evaluate("knn", str(finished_run.folder), str(image_folder), k=(1, 5))
    assert set(result.values) == {
        "trained, class token",
        "trained, patch mean",
        "random weights, class token",
        "random weights, patch mean",
        "raw pixels",
    }
    for numbers in result.values.values():
        assert set(numbers) == {"k = 1", "k = 5"}
        for measured in numbers.values():
            low, top1, high = (measured[n] for n in ("top1_low", "top1", "top1_high"))
            assert 0 <= low <= top1 <= high <= 100
            assert measured["top5"] == 100  # of three classes
    assert result.values["raw pixels"]["k = 5"]["top1"] > 80  # the colours tell the classes
    assert {"ranking_accuracy", "rank_correlation", "mining_accuracy"} <= set(result.hardness)
    saved = json.loads(result.file.read_text())
    assert saved["values"] == result.values and saved["about"]["seconds"] > 0
    assert "random weights" in str(result)
    again = hpm.evaluate("knn", str(finished_run.folder), str(image_folder), k=(1, 5))
    assert again.values == result.values
    alone = hpm.evaluate("knn", str(finished_run.backbone), str(image_folder), k=(1, 5))
    assert alone.values == result.values and not alone.hardness and alone.file is None


@pytest.mark.parametrize(("splits", "tested"), [({"train": 4, "val": 2}, 6), ({"all": 4}, 12)])
def test_other_test_images_are_those_of_their_test_split(
    finished_run, image_folder, tmp_path, splits, tested
):
    for split, per_class in splits.items():
        write_images(tmp_path / "other" / split, per_class=per_class)
    other = tmp_path / "other" / ("all" if "all" in splits else "")
    options = {"k": (5,), "baselines": False, "workers": 0, "out": str(tmp_path / "out")}
    run, data = str(finished_run.folder), str(image_folder)
    about = hpm.evaluate("knn", run, data, test=str(other), **options).about
    assert (about["train_images"], about["test_images"]) == (48, tested)


def test_bad_evaluations(finished_run, image_folder, tmp_path):
    run, data = str(finished_run.folder), str(image_folder)
    with pytest.raises(hpm.UserError, match="no evaluation 'kn'; did you mean 'knn'"):
        hpm.evaluate("kn", run, data)
    with pytest.raises(hpm.UserError, match="k 100 is more than 39 training images"):
        hpm.evaluate("knn", run, data, k=(100,))
    with pytest.raises(hpm.UserError, match="no labels"):
        hpm.evaluate("knn", run, str(image_folder / "class_0"))
    with pytest.raises(hpm.UserError, match="no such run folder"):
        hpm.evaluate("knn", str(tmp_path / "none"), data)
    with pytest.raises(hpm.UserError, match="holds no checkpoint"):
        hpm.evaluate("knn", str(tmp_path), data)
    with pytest.raises(hpm.UserError, match="a backbone only, no teacher"):
        hpm.evaluate("knn", str(finished_run.backbone), data, teacher=True)
    with pytest.raises(hpm.UserError, match="a backbone only: without decoders"):
        hpm.evaluate("hardness", str(finished_run.backbone), data)


def test_features_that_are_not_finite(finished_run, image_folder, tmp_path):
    tensors, meta = read_tensors(finished_run.backbone)
    tensors["norm.weight"] = tensors["norm.weight"] * float("nan")
    write_tensors(tmp_path / "backbone.safetensors", tensors, meta)
    for protocol in ("knn", "linear", "attentive", "stats"):
        with pytest.raises(hpm.UserError, match="not finite: the run has diverged"):
            hpm.evaluate(protocol, str(tmp_path), str(image_folder), workers=0)


@pytest.mark.parametrize(
    ("name", "value"), [("channels", 1), ("patch_size", [8, 8]), ("embed_dim", 48)]
)
def test_a_backbone_that_is_not_what_it_says(finished_run, image_folder, tmp_path, name, value):
    """Other channels, patches or width than its own description."""
    tensors, meta = read_tensors(finished_run.backbone)
    write_tensors(tmp_path / "backbone.safetensors", tensors, meta | {name: value})
    with pytest.raises(hpm.UserError, match="of another architecture"):
        hpm.evaluate("knn", str(tmp_path), str(image_folder))


def test_few_labels(image_folder):
    data = labelled_splits(open_source(str(image_folder)), seed=0, train_share=0.25)
    assert np.bincount(data.train_labels).tolist() == [3, 3, 3]  # of 13
    assert len(data.test) == 9
    least = labelled_splits(open_source(str(image_folder)), seed=0, train_share=0.001)
    assert np.bincount(least.train_labels).tolist() == [1, 1, 1]


def test_evaluations_with_other_options_keep_their_own_files(finished_run, image_folder, tmp_path):
    run, data = str(finished_run.folder), str(image_folder)
    options = {"workers": 0, "k": (1, 5), "out": str(tmp_path), "baselines": False}
    first = hpm.evaluate("knn", run, data, **options)
    cropped = hpm.evaluate("knn", run, data, crop_share=0.5, **options)
    warmer = hpm.evaluate("knn", run, data, temperature=0.5, **options)
    backbone = hpm.evaluate("knn", str(finished_run.backbone), data, **options)
    again = hpm.evaluate("knn", run, data, **(options | {"batch_size": 7}))
    assert again.file == first.file
    files = {result.file for result in (first, cropped, warmer, backbone)}
    assert len(files) == 4 == len(list(tmp_path.glob("*.json")))
    assert "crop_share_0.5" in cropped.file.name and "temperature_0.5" in warmer.file.name
    assert json.loads(cropped.file.read_text())["about"]["crop_share"] == 0.5
    assert cropped.hardness != first.hardness  # of other pixels
    assert json.loads(backbone.file.read_text())["about"]["run"] == str(finished_run.backbone)
    long = hpm.evaluate("knn", run, data, **(options | {"k": tuple(range(1, 30))}))
    assert len(long.file.name) < 200 and long.file not in files


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("knn", {"k": (1,)}),
        ("linear", {"epochs": 1}),
        ("linear", {"epochs": 1, "augment": True}),
        ("attentive", {"epochs": 1, "cache_gb": 1e-9}),
        ("stats", {}),
        ("hardness", {}),
        ("finetune", {"epochs": 1, "batch_size": 12}),
    ],
)
def test_every_evaluation_sees_that_share(
    finished_run, image_folder, tmp_path, monkeypatch, protocol, options
):
    from hpm.data import loader, transforms

    seen = set()

    def view(image, size, channels, min_side=1, crop_share=1.0):
        seen.add(crop_share)
        return transforms.evaluation_view(image, size, channels, min_side, crop_share)

    monkeypatch.setattr(loader, "evaluation_view", view)
    result = hpm.evaluate(
        protocol,
        str(finished_run.folder),
        str(image_folder),
        crop_share=0.5,
        baselines=False,
        workers=0,
        out=str(tmp_path),
        **options,
    )
    assert seen == {0.5} and result.about["crop_share"] == 0.5


def test_the_share_of_the_centre_is_checked(finished_run, image_folder):
    for share in (0.0, 1.5):
        with pytest.raises(hpm.UserError, match=f"crop_share is {share:g}"):
            hpm.evaluate("knn", str(finished_run.folder), str(image_folder), crop_share=share)


@pytest.mark.parametrize(("classes", "printed"), [(3, False), (6, True)])
def test_top_5_of_few_classes_is_not_printed(finished_run, tmp_path, classes, printed):
    images = write_images(tmp_path, classes=classes, per_class=6)
    result = hpm.evaluate(
        "linear",
        str(finished_run.folder),
        str(images),
        epochs=2,
        baselines=False,
        workers=0,
        out=str(tmp_path / "out"),
    )
    assert ("top-5" in str(result)) == printed
    assert result.about["classes"] == classes


@pytest.mark.parametrize("protocol", ["knn", "linear", "attentive", "stats"])
def test_bfloat16_features_are_nearly_the_same(finished_run, image_folder, tmp_path, protocol):
    options = {"workers": 0, "baselines": False, "out": str(tmp_path)}
    options |= {"epochs": 2} if protocol in ("linear", "attentive") else {}
    run, data = str(finished_run.folder), str(image_folder)
    exact = hpm.evaluate(protocol, run, data, **options)
    rounded = hpm.evaluate(protocol, run, data, precision="bfloat16", **options)
    assert rounded.about["precision"] == "bfloat16" and rounded.file != exact.file
    for name, settings in exact.values.items():
        for setting, numbers in settings.items():
            first = next(iter(numbers))
            assert rounded.values[name][setting][first] == pytest.approx(numbers[first], rel=0.2)


def test_precision_of_the_backbone(finished_run):
    trained = load(finished_run.folder)
    images = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        exact, rounded = (
            EvaluatedBackbone(
                "trained", trained.backbone().eval(), trained.architecture, precision
            ).parts(images)[1]
            for precision in ("float32", "bfloat16")
        )
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=-1).min() > 0.99


def test_the_similarities_at_once_do_not_grow_with_the_training_images(monkeypatch):
    train, test = random_features(200), random_features(60, seed=1)
    expected = dict(nearest_neighbours(train, test, 4, (5,)))[5]
    seen = []

    def noted(queries, bank, *args):
        seen.append(len(queries) * len(bank))
        return votes(queries, bank, *args)

    votes = neighbours.neighbour_votes
    monkeypatch.setattr(neighbours, "neighbour_votes", noted)
    monkeypatch.setattr(neighbours, "MOST_SIMILARITIES", 2000)
    assert torch.equal(dict(nearest_neighbours(train, test, 4, (5,)))[5].ranks, expected.ranks)
    assert max(seen) <= 2000 and len(seen) == 6
