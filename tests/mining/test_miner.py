"""The miner of the training step is that of the figures and of the hardness measures."""

import pytest
import torch
from helpers import TINY

import hpm
from hpm.core.config import PretrainConfig
from hpm.data.loader import evaluation_batches, normalize
from hpm.data.sources import open_source
from hpm.evals.loss_maps import loss_maps
from hpm.mining.draw import Draw
from hpm.mining.miner import Seen
from hpm.show.figures import picture
from hpm.training.build import build_run
from hpm.weights.resolve import load

WAYS = [{}, {"teacher_view": "masked"}, {"teacher_scale": 0.5}]


@pytest.mark.parametrize("way", WAYS)
def test_figures_and_measures_show_what_is_mined_by(way, image_folder, tmp_path):
    hpm.pretrain(data=str(image_folder), out=str(tmp_path / "run"), **TINY | way)
    trained = load(tmp_path / "run")
    for module in (trained.model, trained.teacher):
        module.eval()
    (batch,) = evaluation_batches(open_source(str(image_folder)).train, (16, 16), 3, 64)
    images = normalize(batch.images, torch.tensor(trained.mean), torch.tensor(trained.std))
    draw = Draw(0, 1, batch.indices)
    miner = trained.find_miner()
    with torch.no_grad():
        mined = miner.mine(images, draw, num_hard=3)
        whole = trained.teacher.predict_loss(images)[1]
    assert torch.allclose(mined.signal, whole, rtol=1e-4) == (way == {})

    shown = picture(trained, batch.images, batch.indices, 3 / 12, panels=("predicted", "mask"))
    torch.testing.assert_close(shown.predicted, mined.signal)
    hidden = shown.mask.nonzero()[:, 1].view(len(images), -1)
    assert torch.equal(hidden, mined.hidden_ids)

    maps = loss_maps(
        trained.model, miner, images, draw, trained.find_target(torch.device("cpu")), 0.75
    )
    torch.testing.assert_close(maps.predicted, mined.signal)


@pytest.mark.parametrize("way", [{"mask": "green_noise"}, {"mine_by": "memory"}])
def test_masks_are_the_same_in_each_precision(way, tmp_path):
    options = TINY | {"image_size": 64, "normalize": "imagenet"} | way
    config = PretrainConfig(data="demo", out=str(tmp_path), **options)
    run = build_run(config, torch.device("cpu"), quiet=True)
    ids, images = torch.arange(256), torch.zeros(256, 3, 64, 64)
    seen = None
    if run.memory is not None:
        generator = torch.Generator().manual_seed(0)
        run.memory.found.copy_(torch.rand(run.memory.found.shape, generator=generator))
        seen = Seen(ids, torch.tensor([0.1, 0.9, 0.2, 0.7]).expand(256, 4))
    exact, rounded = (
        autocast_and_mine(run.miner, images, Draw(0, 1, ids), seen, enabled)
        for enabled in (False, True)
    )
    assert torch.equal(rounded.hidden_ids, exact.hidden_ids)


def autocast_and_mine(miner, images, draw, seen, enabled):
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        return miner.mine(images, draw, num_hard=0 if seen is None else 90, seen=seen)
