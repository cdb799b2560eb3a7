import numpy as np
import pytest
import torch
from helpers import write_images

import hpm
from hpm.data.sources import open_source
from hpm.data.unreadable import UnreadableImages
from hpm.evals.attentive_heads import AttentiveHeads
from hpm.evals.features import EvaluatedBackbone, Features, ImageReader
from hpm.evals.linear_heads import LinearHeads
from hpm.evals.metrics import accuracies
from hpm.evals.probing import (
    CHOOSING,
    TESTED,
    Cached,
    Computed,
    HyperParameters,
    Recipe,
    grid,
    probe,
)

CPU = torch.device("cpu")


def recipe(heads=LinearHeads, settings=None, epochs=20, seed=0, heads_gb=1.0):
    settings = settings or grid((1e-4, 1e-2, 0.1, 1.0), (0.0, 1e-2))
    return Recipe(heads, settings, epochs, 64, seed, CPU, heads_gb)


def blobs(count, seed, noise=0.3, classes=4, dim=8):
    """Separable where there is little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    features = torch.nn.functional.one_hot(labels, dim).float()
    return Features(features + noise * torch.randn(count, dim, generator=generator), labels)


def probed(train, test, heads=LinearHeads, **options):
    held = np.arange(0, len(train.labels), 5)
    bank = Cached({"x": train})
    return probe(bank, bank, Cached({"x": test}), held, 4, recipe(heads, **options))["x"]


def test_separable_features_are_learned():
    found = probed(blobs(400, 0), blobs(200, 1))
    assert accuracies(found.ranks)["top1"] > 95
    assert found.held_out_top1 > 95


@pytest.mark.parametrize("heads_gb", [1.0, 1e-9])
def test_heads_that_diverge_are_not_chosen(heads_gb):
    train, test = blobs(400, 0), blobs(200, 1)
    found = probed(train, test, settings=grid((1e4, 0.1), (1.0,)), heads_gb=heads_gb)
    assert found.hyper_parameters.lr == 0.1
    with pytest.raises(hpm.UserError, match="probe of x diverges at every learning rate: lower --"):
        probed(train, test, settings=grid((1e4, 1e5), (1.0,)), heads_gb=heads_gb)


def test_random_labels_give_chance():
    train, test = blobs(400, 0), blobs(400, 1)
    shuffled = Features(train.features, train.labels[torch.randperm(400)])
    test = Features(test.features, torch.randint(0, 4, (400,)))
    assert 15 < accuracies(probed(shuffled, test).ranks)["top1"] < 35


def test_the_test_set_chooses_nothing():
    """Its labels may be anything: the chosen setting and what is held out stay the same."""
    train, test = blobs(300, 0, noise=1.0), blobs(200, 1, noise=1.0)
    shuffled = Features(test.features, test.labels[torch.randperm(200)])
    honest, blind = probed(train, test), probed(train, shuffled)
    assert honest.hyper_parameters == blind.hyper_parameters
    assert honest.held_out_top1 == blind.held_out_top1
    assert accuracies(honest.ranks)["top1"] > accuracies(blind.ranks)["top1"] + 20


@pytest.mark.parametrize("heads", [LinearHeads, AttentiveHeads])
def test_a_grid_gives_what_each_setting_gives_alone(heads):
    """The heads of a grid share one pass over the features and nothing else."""
    train, test = blobs(200, 0, noise=1.0), blobs(100, 1, noise=1.0)
    if heads is AttentiveHeads:
        train = Features(train.features[:, None].repeat(1, 3, 1), train.labels)
        test = Features(test.features[:, None].repeat(1, 3, 1), test.labels)
    settings = [HyperParameters(1e-3, 0.0), HyperParameters(0.3, 0.0), HyperParameters(0.05, 0.1)]
    whole = probed(train, test, heads, settings=settings)
    alone = [probed(train, test, heads, settings=[setting]) for setting in settings]
    if heads is LinearHeads:  # attentive heads start at random: each at another place in the grid
        best = alone[settings.index(whole.hyper_parameters)]
        assert whole.held_out_top1 == pytest.approx(max(a.held_out_top1 for a in alone))
        assert torch.equal(best.ranks.ranks, whole.ranks.ranks)
    assert whole.held_out_top1 >= 25


@pytest.mark.parametrize("at_once", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("heads", [LinearHeads, AttentiveHeads])
def test_a_grid_without_enough_memory_is_trained_in_passes(heads, at_once):
    train, test = blobs(200, 0, noise=1.0), blobs(100, 1, noise=1.0)
    if heads is AttentiveHeads:
        train = Features(train.features[:, None].repeat(1, 3, 1), train.labels)
        test = Features(test.features[:, None].repeat(1, 3, 1), test.labels)
    train_bank, test_bank = (
        Cached({"x": side, "half": Features(side.features[..., :4], side.labels)})
        for side in (train, test)
    )
    sizes = []

    class Counted(heads):
        def __init__(self, shape, num_classes, points, batch_size):
            sizes.append(len(points))
            super().__init__(shape, num_classes, points, batch_size)

    settings = [HyperParameters(lr, 0.0) for lr in (1e-5, 1e-2, 1e-1, 1e-6, 3e-2)]
    shapes = [features.features.shape[1:] for features in train_bank.found.values()]
    room = sum(heads.memory(shape, 4, 32) for shape in shapes) * at_once / 1e9
    whole, parts = (
        probe(
            train_bank,
            train_bank,
            test_bank,
            np.arange(0, 200, 5),
            4,
            recipe(Counted, settings, heads_gb=heads_gb),
        )
        for heads_gb in (1, room)
    )
    assert sizes[:2] == [5, 5]
    assert max(sizes[2:]) == at_once and sum(sizes[2:]) == 10
    for name in ("x", "half"):
        assert parts[name].hyper_parameters == whole[name].hyper_parameters
        assert parts[name].held_out_top1 == whole[name].held_out_top1
        assert torch.equal(parts[name].ranks.ranks, whole[name].ranks.ranks)


@pytest.mark.parametrize("heads", [LinearHeads, AttentiveHeads])
def test_held_out_images_teach_nothing_to_the_heads_that_choose(heads):
    """Held-out labels that contradict all others: seen by the tested copy alone."""
    train = blobs(400, 0, noise=0.1)
    if heads is AttentiveHeads:
        train = Features(train.features[:, None].repeat(1, 3, 1), train.labels)
    held = np.arange(0, 400, 5)
    wrong = train.labels.clone()
    wrong[held] = (wrong[held] + 1) % 4
    bank = Cached({"x": Features(train.features, wrong)})
    rate = 0.1 if heads is LinearHeads else 1e-2
    found = probe(bank, bank, bank, held, 4, recipe(heads, grid((rate,), (0.0,))))["x"]
    assert found.held_out_top1 < 5
    assert (TESTED, CHOOSING) == (1, 0)


def test_attentive_heads_equal_plain_cross_attention():
    """The cheap form against keys and values computed for every patch, in float64."""
    torch.manual_seed(0)
    heads = AttentiveHeads(torch.Size([5, 128]), 3, grid((0.1, 0.2), (0.0,)), 6).double().train()
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.5)
    x = torch.randn(6, 5, 128, dtype=torch.float64)
    logits = heads(x)
    normed = (x - x.mean((0, 1))) / (x.var((0, 1), unbiased=False) + 1e-6).sqrt()
    for setting, part in enumerate(heads.parts):
        for copy in (CHOOSING, TESTED):
            pooled = []
            for head in range(2):
                k = normed @ part["key"][copy, head].T
                v = normed @ part["value"][copy, head].T + part["value_bias"][copy, head]
                scores = k @ part["query"][copy, head] / 64**0.5
                pooled.append((scores.softmax(1)[..., None] * v).sum(1))
            expected = torch.cat(pooled, 1) @ part["output"][copy].T + part["output_bias"][copy]
            torch.testing.assert_close(logits[setting, copy], expected)


def test_attention_finds_the_one_patch_that_tells():
    """The mean of the patches drowns it; attention does not."""
    generator = torch.Generator().manual_seed(0)

    def images(count):
        labels = torch.arange(count) % 2
        patches = torch.randn(count, 16, 8, generator=generator)
        place = torch.randint(0, 16, (count,), generator=generator)
        patches[torch.arange(count), place, 0] = 6  # "look here"
        patches[torch.arange(count), place, 1] = 3.0 * (2 * labels - 1)
        return Features(patches, labels)

    train, test = images(600), images(300)
    attentive = probed(train, test, AttentiveHeads, settings=grid((3e-2,), (0.0,)), epochs=30)
    mean = probed(
        Features(train.features.mean(1), train.labels), Features(test.features.mean(1), test.labels)
    )
    assert accuracies(attentive.ranks)["top1"] > 95
    assert accuracies(mean.ranks)["top1"] < 90


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("linear", {}),
        ("linear", {"augment": True}),
        ("attentive", {}),
        ("attentive", {"cache_gb": 1e-9}),
    ],
)
def test_probes_from_end_to_end(finished_run, image_folder, protocol, options):
    """The colours of `image_folder` tell its classes, so a probe learns them."""
    run, data = str(finished_run.folder), str(image_folder)
    epochs = 12 if options else 30
    result = hpm.evaluate(protocol, run, data, epochs=epochs, workers=0, **options)
    names = {name.split(",")[0] for name in result.values}
    assert names == {"trained", "random weights", "raw pixels"}
    assert list(result.values)[-1] == "raw pixels"
    for name, values in result.values.items():
        assert values[protocol]["top1"] >= 60, (name, values)
        assert set(result.chosen[name]) == {"lr", "weight_decay", "held_out_top1"}
    assert result.about["train_images"] == 39 and result.about["test_images"] == 9


@pytest.mark.parametrize(
    ("protocol", "options"), [("linear", {"augment": True}), ("attentive", {"cache_gb": 1e-9})]
)
def test_images_per_forward_pass(finished_run, image_folder, monkeypatch, protocol, options):
    sizes = []
    parts = EvaluatedBackbone.parts

    def counted(self, images):
        sizes.append(len(images))
        return parts(self, images)

    monkeypatch.setattr(EvaluatedBackbone, "parts", counted)
    options = options | {"epochs": 1, "workers": 0, "batch_size": 4, "baselines": False}
    hpm.evaluate(protocol, str(finished_run.folder), str(image_folder), **options)
    assert set(sizes) <= {1, 2, 3, 4} and sizes.count(4) > len(sizes) / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_computed_in_pieces_are_the_same(tmp_path, workers):
    images = write_images(tmp_path, classes=2, per_class=10)
    for number in (2, 3, 4):
        (images / "class_0" / f"{number:03d}.png").write_bytes(b"broken")
    source = open_source(str(images)).train
    steps = torch.tensor([2, 3, 19, 0, 4, 7, 1]), torch.tensor([11, 5]), torch.tensor([6])

    def embed(views):
        return {"mean": views.float().mean((2, 3)), "first": views[:, :1, 0, 0]}

    def computed(batch_size):
        reader = ImageReader(batch_size, workers, lambda text: None)
        unreadable = UnreadableImages(source, 1.0)
        bank = Computed(source, source.labels, (20, 20), 3, embed, reader, unreadable)
        found = list(bank.batches(steps))
        assert unreadable.indices == {2, 3, 4}
        return found

    whole = computed(100)
    assert [ids.tolist() for _, _, ids in whole] == [[19, 0, 7, 1], [11, 5], [6]]
    for batch_size in (1, 2, 3):
        for one, other in zip(computed(batch_size), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_compare_gives_the_difference(finished_run, image_folder):
    run = str(finished_run.folder)
    result = hpm.evaluate("linear", run, str(image_folder), compare=run, epochs=5, workers=0)
    for name in ("trained, class token", "trained, patch mean"):
        assert result.differences[name]["linear"] == {"top1": 0, "top1_low": 0, "top1_high": 0}
        assert result.values[name] == result.values[name.replace("trained", "compared")]
    assert "+0.0 points" in str(result)


def test_augmented_views_of_broken_images(finished_run, tmp_path):
    images = write_images(tmp_path, classes=2, per_class=10)
    (images / "class_0" / "002.png").write_bytes(b"broken")
    result = hpm.evaluate(
        "linear", str(finished_run.folder), str(images), augment=True, epochs=3, workers=0
    )
    assert result.values["trained, patch mean"]["linear"]["top1"] >= 0


def test_of_equal_accuracies_the_likelier_wins():
    """Easy data, where nearly every rate gets all right: the smallest must not win for that."""
    train = blobs(400, 0, noise=0.1)
    found = probed(train, blobs(100, 1, noise=0.1), settings=grid((1e-3, 1e-2, 0.1), (0.0,)))
    assert found.held_out_top1 == 100 and found.hyper_parameters.lr > 1e-3


def test_linear_heads_descend_as_sgd_does():
    """Against autograd and torch.optim.SGD with Nesterov momentum, in float64."""
    torch.manual_seed(0)
    settings = grid((0.1, 0.5), (0.0, 0.1))
    heads = LinearHeads(torch.Size([6]), 3, settings, 128).double()
    weights = [torch.zeros(2, 3, 6).double().requires_grad_() for _ in settings]
    biases = [torch.zeros(2, 3).double().requires_grad_() for _ in settings]
    groups = [
        {"params": [w, b], "lr": s.lr * 128 / 256, "weight_decay": s.weight_decay}
        for w, b, s in zip(weights, biases, settings)
    ]
    sgd = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    for step in range(5):
        features, labels = torch.randn(20, 6).double(), torch.randint(0, 3, (20,))
        seen = torch.rand(20) < 0.8
        rate = 1 - step / 5
        for group, setting in zip(sgd.param_groups, settings):
            group["lr"] = rate * setting.lr * 128 / 256
        centred = features - features.mean(0)
        normed = centred / (centred.square().mean(0) + 1e-6).sqrt()
        loss = torch.zeros(()).double()
        for w, b in zip(weights, biases):
            logits = torch.einsum("nd,kcd->knc", normed, w) + b[:, None]
            entropy = torch.nn.functional.cross_entropy
            loss = loss + entropy(logits[CHOOSING][seen], labels[seen])
            loss = loss + entropy(logits[TESTED], labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        heads.learn(features, labels, seen, rate)
    found = heads.weight.view(2, len(settings), 3, 6)
    expected = torch.stack([w.detach() for w in weights], 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    expected = torch.stack([b.detach() for b in biases], 1)
    torch.testing.assert_close(heads.bias.view(2, 4, 3), expected, rtol=1e-6, atol=1e-9)
