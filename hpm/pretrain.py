"""Hard Patches Mining: the algorithm, top to bottom (CVPR 2023, arXiv 2304.05919, section 3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpm import distributed
from hpm.checks import check_pretrain
from hpm.config import PretrainConfig, make_config, read_preset, secondary_mask_ratio
from hpm.data.loader import Batch
from hpm.losses import absolute_loss, ranking_accuracy, relative_loss
from hpm.masking import (
    HARD_SHARES,
    TEACHER_VIEW,
    TIES,
    choose_covered,
    hard_share,
    make_mask,
    noise,
)
from hpm.models.patches import gather_patches
from hpm.run import Run
from hpm.state import State
from hpm.stop import Interrupted, Stop, stop_signals
from hpm.teacher import attention, predicted_losses, predicted_losses_masked
from hpm.watch import (
    Step,
    Window,
    evaluate,
    look,
    probe,
    read,
    recorded,
    refresh_report,
)

Mark = Callable[[str], None]


def no_mark(phase: str) -> None:
    """Nobody measures."""


def pretrain(config: str | None = None, **options: Any) -> Run:
    """Pre-train a backbone: `hpm.pretrain(data="photos/", out="runs/first", model="vit_small")`.

    Args:
        config: name of a preset, or a YAML file, that the options are laid over.
        options: those of `config.PretrainConfig`.

    Returns the run. Raises UserError on bad input, Interrupted when told to stop.
    """
    preset = read_preset(config) if config else {}
    return run_pretraining(make_config(PretrainConfig, preset | options))


def run_pretraining(config: PretrainConfig) -> Run:
    """Train as configured, or go on with an interrupted run of the same config."""
    check_pretrain(config)
    device = distributed.pick_device(config.device)
    with distributed.process_group(device), stop_signals() as stop:
        state = State(config, device)
        try:
            if state.step == state.schedule.total:
                state.log.info(f"{config.out} is finished already: nothing is changed")
            else:
                with recorded(state):
                    _train(state, stop)
            if distributed.is_main():
                state.save_backbone()
            if state.best_probe:
                best = state.best_probe
                state.log.info(
                    f"best probe: linear {best['linear']:.1f} %, kNN {best['knn']:.1f} % at step "
                    f"{best['step']} ({state.run.best_checkpoint}); probing took "
                    f"{state.probe_seconds:.1f} s in all"
                )
            state.log.info(
                f"done: {state.run.backbone}\n  import hpm\n"
                f'  encoder = hpm.load_encoder("{config.out}")\n'
                "  pooled, patches = encoder(images)  # uint8 [B C H W] -> [B D], [B N D]"
            )
        finally:
            state.log.close()
    return state.run


def _train(state: State, stop: Stop) -> None:
    """All steps that are left."""
    config, schedule = state.config, state.schedule
    if state.step == 0:
        look(state, _num_hard(state, 0))  # what it was before it learned anything
        distributed.wait_for_main()
    batches, window = state.batches(), Window()
    for step in range(state.step, schedule.total):
        batch = window.next_batch(batches)
        num_hard = _num_hard(state, step)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)

        done = train_step(state, batch, step, num_hard)
        state.step = step + 1
        window.steps.append(done)
        evaluating, saving = schedule.evaluates(state.step), schedule.saves(state.step)
        probing = state.probe is not None and schedule.probes(state.step)
        stopping = stop.received > 0 and distributed.world_size() == 1
        if evaluating or probing or saving or stopping or state.step % config.log_every == 0:
            read(state, window, num_hard)
            # Several processes agree here, where they all wait for each other anyway.
            stopping = distributed.any_process(stop.received > 0, state.device)
            if evaluating:
                evaluate(state, num_hard)
            if probing:
                probe(state)
            if saving or stopping:
                state.save()
            if evaluating or probing or saving:
                refresh_report(state)
                distributed.wait_for_main()
            if stopping and state.step < schedule.total:
                raise Interrupted(stop.received)
            window = Window()


def train_step(state: State, batch: Batch, step: int, num_hard: int, mark: Mark = no_mark) -> Step:
    """One step of the algorithm: mine, reconstruct and predict, update student and teacher.

    Nothing here waits for the device. `mark` is told each phase that ends, for measuring.
    """
    config, schedule = state.config, state.schedule
    parts = []
    for number, part in enumerate(batch.parts(config.accumulate)):
        images = state.to_device(part.images)
        mined = _mine(state, images, part, step, num_hard, mark)
        last = number == config.accumulate - 1
        with distributed.no_gradient_sync(state.parallel, last):
            learned = _learn(state, images, mined, mark)
        parts.append((mined, learned))
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad()
    mark("optimiser")
    state.teacher.update(state.model, schedule.ema_decay(step))
    mark("EMA")
    _remember(state, batch, parts)
    mark("mining")
    visible = torch.cat([mined.visible_ids for mined, _ in parts])
    hidden = torch.cat([mined.hidden_ids for mined, _ in parts])
    losses = torch.stack([learned.losses for _, learned in parts]).mean(0)
    return Step(torch.stack([*losses, grad_norm.detach()]), batch, visible, hidden)


def _num_hard(state: State, step: int) -> int:
    """How many of the hidden patches are mined: int(M alpha)."""
    config, schedule = state.config, state.schedule
    if config.mask not in HARD_SHARES:
        return 0
    alpha = hard_share(
        schedule.hard_share_progress(step), *config.hard_shares, config.hard_share_schedule
    )
    return int(state.num_hidden * alpha)


class Mined(NamedTuple):
    """What the student is shown and asked, and what the teacher made of the whole images."""

    visible_ids: Int[Tensor, "batch visible"]
    hidden_ids: Int[Tensor, "batch hidden"]
    covered_ids: Int[Tensor, "batch covered"] | None
    features: Float[Tensor, "batch tokens dim"] | None
    signal: Float[Tensor, "batch patches"] | None


class Learned(NamedTuple):
    """What a forward and backward pass tell; nothing of it has been waited for."""

    losses: Float[Tensor, " 3"]  # reconstruction, predictor, ranking accuracy
    patch_loss: Float[Tensor, "batch hidden"]  # of what the predictor ranks


def _mine(
    state: State, images: Tensor, batch: Batch, step: int, num_hard: int, mark: Mark
) -> Mined:
    """The hardest patches are hidden, the rest at random."""
    config, encoder = state.config, state.model.encoder
    sample_ids = batch.view_ids.to(state.device, non_blocking=True)
    epoch = state.schedule.epoch(step)
    asked = num_hard > 0 and config.mine_by == "teacher" and step % config.mine_every == 0
    features, told = _ask_teacher(state, images, sample_ids, epoch, asked)
    mark("teacher")
    signal = told
    if state.memory is not None and num_hard > 0 and not asked:
        images_seen = batch.indices.to(state.device, non_blocking=True)
        signal = state.memory.read(images_seen, state.crops(batch))
        # Of places that nothing is known about, none comes before another.
        signal = signal + 1e-3 * noise(sample_ids, encoder.num_patches, config.seed, epoch, TIES)
    visible_ids, hidden_ids = make_mask(
        config.mask, sample_ids, encoder.grid, state.num_hidden, config.seed, epoch, signal,
        num_hard,
    )  # fmt: skip
    covered_ids = None
    if ratio := secondary_mask_ratio(config):
        covered_ids = choose_covered(
            sample_ids, visible_ids, ratio, encoder.num_patches, config.seed, epoch
        )
    mark("mining")
    return Mined(visible_ids, hidden_ids, covered_ids, features, told)


def _ask_teacher(
    state: State, images: Tensor, sample_ids: Tensor, epoch: int, asked: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(features, what is mined by if that is asked for), as far as they are needed: nothing is run
    in vain."""
    config, teacher = state.config, state.teacher.model
    features = signal = None
    with state.autocast():
        if asked and config.mask == "attention":
            features, signal = attention(teacher, images)
        elif asked and state.small_teacher is not None:
            signal = state.small_teacher.predicted_losses(images, state.predict_loss)
        elif asked and config.teacher_view == "masked":
            priority = noise(
                sample_ids, teacher.encoder.num_patches, config.seed, epoch, TEACHER_VIEW
            )
            signal = predicted_losses_masked(state.predict_loss, images, priority, state.num_hidden)
        elif asked:
            features, signal = predicted_losses(state.predict_loss, images)
        if features is None and state.target.needs_teacher:
            with torch.no_grad():
                features = teacher.encoder(images)
    return features, signal


def _learn(state: State, images: Tensor, mined: Mined, mark: Mark) -> Learned:
    """Reconstruct the hidden patches, predict how well, and take both losses backward."""
    config, hidden_ids = state.config, mined.hidden_ids
    with state.autocast():
        with torch.no_grad():
            target = gather_patches(state.target(images, mined.features), hidden_ids)
        prediction, predicted_loss = state.parallel(
            images, mined.visible_ids, hidden_ids, mined.covered_ids
        )
    patch_loss = state.target.patch_loss(prediction, target)
    reconstruction_loss = patch_loss.mean()
    predictor_loss = torch.zeros_like(reconstruction_loss)
    accuracy = torch.full_like(reconstruction_loss, math.nan)
    patch_loss = patch_loss.detach()
    if predicted_loss is not None or config.mine_by == "memory":
        patch_loss = state.target.ranked_by(patch_loss, images, hidden_ids)
    if predicted_loss is not None:
        if config.predictor_loss == "relative":
            total, pairs = relative_loss(predicted_loss, patch_loss)
            # Pairs are counted over all processes, as if they were one.
            predictor_loss = total / distributed.mean(pairs).clamp(min=1)
        else:
            predictor_loss = absolute_loss(predicted_loss, patch_loss)
        accuracy = ranking_accuracy(predicted_loss.detach().float(), patch_loss)
    loss = reconstruction_loss + config.predictor_weight * predictor_loss
    mark("forward")
    (loss / config.accumulate).backward()
    mark("backward")
    losses = torch.stack([reconstruction_loss.detach(), predictor_loss.detach(), accuracy])
    return Learned(losses, patch_loss)


def _remember(state: State, batch: Batch, parts: list[tuple[Mined, Learned]]) -> None:
    """Keep for the next visit to these images what was found out about them, if that is used."""
    if state.memory is None:
        return
    sample_ids = batch.indices.to(state.device, non_blocking=True)
    told = [mined.signal for mined, _ in parts if mined.signal is not None]
    if told:
        hardness = torch.cat(told)
        patch_ids = torch.arange(hardness.shape[1], device=state.device).expand_as(hardness)
        # Predicted losses are learned from the order within images alone.
        state.memory.write(sample_ids, state.crops(batch), patch_ids, hardness, per_image=True)
    elif state.config.mine_by == "memory":
        hidden_ids = torch.cat([mined.hidden_ids for mined, _ in parts])
        patch_loss = torch.cat([learned.patch_loss for _, learned in parts])
        state.memory.write(sample_ids, state.crops(batch), hidden_ids, patch_loss)


__all__ = ["Interrupted", "pretrain", "run_pretraining"]
