"""Linear heads on frozen patch tokens, trained for a whole grid of learning rates at once.

The training samples of a linear layer on upsampled tokens are pixels, each with the bilinear
interpolation of the tokens around it as features. This is the same as interpolating the layer's
outputs, so the heads of the linear probe can be trained on pixels from random crops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from hpm.core import distributed
from hpm.core.errors import UserError
from hpm.core.progress import track
from hpm.data.dense import DenseBatch, dense_batches, dense_loader
from hpm.data.loader import StepSampler, normalize
from hpm.data.mask_files import IGNORED
from hpm.data.sources import Source, Subset
from hpm.evals.features import EvaluatedBackbone, Features, check_finite
from hpm.evals.linear_heads import LinearHeads
from hpm.evals.probing import CHOOSING, TESTED, grid
from hpm.evals.segmentation_metrics import confusion_matrices, count_pixels, mean_iou
from hpm.models.build import resized_encoder
from hpm.models.segmenter import LinearSegmenter, sliding_window
from hpm.training.loop import autocast
from hpm.training.optim import learning_rate
from hpm.training.supervised import full_batch
from hpm.weights.segmentation import SegmentationModel

if TYPE_CHECKING:
    from hpm.evals.segment.job import SegmentationJob

PIXELS = 512  # drawn from each crop
MAX_HELD_OUT = 200  # images that choose
SCORES_AT_ONCE = 256  # heads times classes
SCALE = 256  # batch size for which a rate of the heads is the rate of a step


@dataclass
class Probe:
    """The heads trained on one backbone."""

    backbone: EvaluatedBackbone
    segmenter: LinearSegmenter  # its encoder is the backbone's; its head becomes the chosen one
    heads: LinearHeads


def train_linear_heads(
    job: SegmentationJob,
) -> dict[str, tuple[SegmentationModel, dict[str, float]]]:
    """Returns, for each backbone, the model with the chosen head, and the chosen
    hyper-parameters."""
    found = {}
    for channels in dict.fromkeys(each.backbone.encoder.channels for each in job.task.backbones):
        # Backbones that see the same images are trained side by side.
        probes = [
            _new_probe(job, each)
            for each in job.task.backbones
            if each.backbone.encoder.channels == channels
        ]
        _train(job, probes)
        for probe in probes:
            found[probe.backbone.name] = _chosen(job, probe)
    order = [each.name for each in job.task.backbones]
    return {name: found[name] for name in order}


def _new_probe(job: SegmentationJob, backbone: EvaluatedBackbone) -> Probe:
    encoder = resized_encoder(
        backbone.architecture,
        backbone.backbone.encoder.state_dict(),
        (job.image_size, job.image_size),
    )
    segmenter = LinearSegmenter(encoder, len(job.classes)).to(job.task.device).eval()
    points = grid(job.options.lr, (0.0,))
    heads = LinearHeads(torch.Size([encoder.embed_dim]), len(job.classes), points, SCALE)
    return Probe(backbone, segmenter, heads.to(job.task.device))


def _train(job: SegmentationJob, probes: list[Probe]) -> None:
    """Train all heads of all backbones on the same crops and pixels."""
    options, device = job.options, job.task.device
    world_size = distributed.world_size()
    batch_size = full_batch(options.batch_size, len(job.train))
    steps = StepSampler(
        len(job.train), batch_size, job.steps, options.seed, 0, distributed.rank(), world_size
    )
    views = job.training_views(probes[0].backbone, job.train)
    unreadable = job.task.unreadable(job.train)
    held = torch.zeros(len(job.train), dtype=torch.bool)
    held[torch.from_numpy(job.held_out)] = True
    loader = dense_loader(job.train, views, steps, job.task.workers)
    for step, batch in enumerate(track(loader, "linear heads", total=job.steps)):
        unreadable.add(batch.unreadable)
        rate = learning_rate(step, job.steps, 0, 1.0)
        places = random_places(batch, job.image_size, (options.seed, step))
        labels, seen = _labels(batch, places, ~held)
        kept = labels != IGNORED
        labels, seen = (distributed.rows_of_all(x[kept]) for x in (labels, seen))
        for probe in probes:
            backbone = probe.backbone.backbone
            with torch.no_grad(), autocast(device, options.precision):
                images = normalize(_stacked(batch).to(device), backbone.mean, backbone.std)
                maps = probe.segmenter.features(images)
            features = pixel_features(maps.float(), places.to(device), job.image_size)
            features = distributed.rows_of_all(features.flatten(0, 1)[kept.to(device)])
            if step == 0:
                check_finite({probe.backbone.name: Features(features, labels)})
            if len(features) > 1:
                probe.heads.learn(features, labels.to(device), seen.to(device), rate)
    unreadable.check(job.task.reader.report)


def random_places(
    batch: DenseBatch, side: int, seeds: tuple[int, ...]
) -> Int[Tensor, "batch pixels 2"]:
    """Rows and columns of random pixels of square crops, a function of the seeds and the sample."""
    draws = [
        np.random.default_rng([*seeds, int(index)]).integers(0, side, (PIXELS, 2))
        for index in batch.indices
    ]
    return torch.from_numpy(np.stack(draws))


def pixel_features(
    maps: Float[Tensor, "batch dim rows columns"], places: Int[Tensor, "batch pixels 2"], side: int
) -> Float[Tensor, "batch pixels dim"]:
    """Features of single pixels of the maps, enlarged bilinearly to `side` x `side` pixels."""
    at = (2 * places.flip(2).to(maps.dtype) + 1) / side - 1  # x, y from -1 to 1
    found = F.grid_sample(
        maps, at[:, None], mode="bilinear", padding_mode="border", align_corners=False
    )
    return found[:, :, 0].transpose(1, 2)


def _stacked(batch: DenseBatch) -> Tensor:
    assert isinstance(batch.images, Tensor)
    return batch.images


def _labels(
    batch: DenseBatch, places: Int[Tensor, "batch pixels 2"], seen: Bool[Tensor, " images"]
) -> tuple[Int[Tensor, " drawn"], Bool[Tensor, " drawn"]]:
    """The class of each pixel, and whether the heads that choose may be trained on it."""
    assert isinstance(batch.targets, Tensor)
    sample = torch.arange(len(batch))[:, None]
    labels = batch.targets[sample, places[..., 0], places[..., 1]].long()
    return labels.flatten(), seen[batch.indices][:, None].expand_as(labels).flatten()


def _chosen(job: SegmentationJob, probe: Probe) -> tuple[SegmentationModel, dict[str, float]]:
    """The head whose copy had the highest mean IoU on the held-out images. Raises UserError if all
    have diverged."""
    held = job.held_out
    if len(held) > MAX_HELD_OUT:
        held = held[np.linspace(0, len(held) - 1, MAX_HELD_OUT).astype(int)]
    scores = _held_out_scores(job, probe, Subset(job.train, held))
    lrs = job.options.lr
    segmenter, heads = probe.segmenter, probe.heads
    best = int(scores.nan_to_num(nan=-1.0, neginf=-torch.inf).argmax())
    if scores[best] == -torch.inf:
        name = probe.backbone.name
        raise UserError(f"the linear head on {name} diverges at every learning rate: lower --lr")
    segmenter.norm.load_state_dict(heads.norm.state_dict())
    weight, bias = _head(heads, TESTED)
    segmenter.head.load_state_dict({"weight": weight[best][..., None, None], "bias": bias[best]})
    backbone = probe.backbone.backbone
    model = SegmentationModel(
        segmenter,
        probe.backbone.architecture,
        job.classes,
        backbone.mean.tolist(),
        backbone.std.tolist(),
        job.stride,
    )
    chosen = {"lr": lrs[best], "held_out_mean_iou": float(scores[best])}
    return model.to(job.task.device).eval(), chosen


@torch.inference_mode()
def _held_out_scores(job: SegmentationJob, probe: Probe, source: Source) -> Float[Tensor, " grid"]:
    """Mean IoU of each head in percent on the held-out images, at the encoder's image size; -inf
    if it has diverged."""
    backbone, segmenter = probe.backbone.backbone, probe.segmenter
    segmenter.norm.load_state_dict(probe.heads.norm.state_dict())
    weight, bias = _head(probe.heads, CHOOSING)
    count, classes = weight.shape[:2]
    device, world_size = job.task.device, distributed.world_size()
    matrices = torch.zeros(count, classes, classes, dtype=torch.int64)
    views = job.testing_views(probe.backbone, source)
    batches = dense_batches(source, views, 1, job.task.workers, distributed.rank(), world_size)
    for batch in track(batches, "choosing", total=len(source) // world_size):
        for image, labels in zip(batch.images, batch.targets, strict=True):
            pixels = normalize(image[None].to(device), backbone.mean, backbone.std)
            small = F.interpolate(labels[None, None].float(), image.shape[1:], mode="nearest")
            for heads in torch.arange(count).split(max(1, SCORES_AT_ONCE // classes)):
                flat = weight[heads].flatten(0, 1)[..., None, None], bias[heads].flatten()

                def scores(windows: Tensor, flat: tuple[Tensor, Tensor] = flat) -> Tensor:
                    with autocast(device, job.options.precision):
                        maps = segmenter.features(windows).float()
                    return F.interpolate(
                        F.conv2d(segmenter.norm(maps), *flat), windows.shape[2:], mode="bilinear"
                    )

                found = sliding_window(
                    scores, pixels, job.image_size, job.stride, len(heads) * classes
                )
                predicted = found.unflatten(1, (len(heads), classes))[0].argmax(1).cpu()
                truth = small[0].long().expand(len(heads), -1, -1)
                matrices[heads] += confusion_matrices(predicted, truth, classes)
    total = torch.stack(distributed.gather(matrices)).sum(0)
    # A head that is NaN predicts the first class, which has an IoU.
    finite = (weight.isfinite().all(2) & bias.isfinite()).all(1).cpu()
    return torch.from_numpy(mean_iou(count_pixels(total))).masked_fill(~finite, -torch.inf)


def _head(
    heads: LinearHeads, copy: int
) -> tuple[Float[Tensor, "grid classes dim"], Float[Tensor, "grid classes"]]:
    """Weights and biases of one of the two copies of all heads."""
    return heads.weight.unflatten(0, heads.shape)[copy], heads.bias.view(heads.shape)[copy]
