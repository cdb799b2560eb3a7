"""The miner of the training step is that of the figures and of the hardness measures."""

import pytest
import torch
from helpers import TINY

import hpm
from hpm.data.loader import evaluation_batches, normalize
from hpm.data.sources import open_source
from hpm.evals.loss_maps import loss_maps
from hpm.mining.draw import Draw
from hpm.show.figures import picture
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
