"""Hard Patches Mining: the algorithm, top to bottom (CVPR 2023, arXiv 2304.05919, section 3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpm.core import distributed, lock
from hpm.core.config import HARD_SHARES, PretrainConfig
from hpm.core.options import lay_over, make_config, read_preset
from hpm.core.random_state import random_state_kept
from hpm.core.signals import Interrupted, Stop, stop_signals
from hpm.data.loader import Batch
from hpm.evals.ongoing import OngoingProbe, make_probe
from hpm.mining.draw import Draw
from hpm.mining.losses import absolute_loss, ranking_accuracy, relative_loss
from hpm.mining.masking import hard_share
from hpm.mining.miner import Mark, Mined, no_mark
from hpm.models.patches import gather_patches
from hpm.show.monitor import Step, Window, evaluate, look, probe, read, recorded, refresh_report
from hpm.targets.base import Target
from hpm.training.checks import check_pretrain
from hpm.training.state import State
from hpm.weights.run_folder import Run


def pretrain(
    data: str | Path | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pre-train a backbone: `hpm.pretrain("photos/", out="runs/first", model="vit_small")`.

    Args:
        data: images: a folder, a list file, parquet, or `demo`.
        out: run folder; the same call again continues an interrupted run.
        config: name of a preset, or a YAML file, that the options are laid over.
        options: those of `config.PretrainConfig`.

    Returns the run. Raises UserError on bad input, Interrupted when told to stop.
    """
    named = {"data": data, "out": out}
    options |= {name: value for name, value in named.items() if value is not None}
    preset = read_preset(config) if config else {}
    return run_pretraining(make_config(PretrainConfig, lay_over(preset, options)))


def run_pretraining(config: PretrainConfig) -> Run:
    """Train as configured, or go on with an interrupted run of the same config."""
    check_pretrain(config)
    device = distributed.pick_device(config.device)
    with (
        distributed.process_group(device),
        random_state_kept(device),
        stop_signals() as stop,
    ):
        try:
            ongoing = make_probe(config)  # before a folder is made: its data may be refused
            state = State(config, device)
            _run(state, ongoing, stop)
        finally:
            lock.release(Path(config.out))
    return state.run


def _run(state: State, ongoing: OngoingProbe | None, stop: Stop) -> None:
    """Train, and leave the folder of a finished run."""
    try:
        if state.step == state.schedule.total:
            state.log.info(f"{state.config.out} is finished already: nothing is changed")
        else:
            with recorded(state):
                _train(state, ongoing, stop)
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
            f'  encoder = hpm.load_encoder("{state.config.out}")\n'
            "  pooled, patches = encoder(images)  # uint8 [B C H W] -> [B D], [B N D]"
        )
    finally:
        state.log.close()


def _train(state: State, ongoing: OngoingProbe | None, stop: Stop) -> None:
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
        probing = ongoing is not None and schedule.probes(state.step)
        stopping = stop.received > 0 and distributed.world_size() == 1
        if evaluating or probing or saving or stopping or state.step % config.log_every == 0:
            read(state, window, num_hard)
            # Several processes agree here, where they all wait for each other anyway.
            stopping = distributed.any_process(stop.received > 0, state.device)
            if evaluating:
                evaluate(state, num_hard)
            if ongoing is not None and probing:
                probe(state, ongoing)
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

    Nothing here waits for the device. `mark` is called with each phase as it ends, for measuring.
    """
    config, schedule, epoch = state.config, state.schedule, state.schedule.epoch(step)
    parts: list[tuple[Mined, Learned]] = []
    for number, part in enumerate(batch.parts(config.accumulate)):
        images = state.to_device(part.images)
        draw = Draw(config.seed, epoch, part.view_ids.to(state.device, non_blocking=True))
        with state.autocast():
            mined = state.miner.mine(images, draw, num_hard, step, state.seen(part), mark)
        last = number == config.accumulate - 1
        with distributed.no_gradient_sync(state.parallel, last):
            learned = _learn(
                state.parallel, state.target, images, mined, config, state.autocast(), mark
            )
        parts.append((mined, learned))
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.clip_grad)
    state.optimizer.step()
    state.optimizer.zero_grad()
    mark("optimiser")
    state.teacher.update(state.model, schedule.ema_decay(step))
    mark("EMA")
    all_mined, all_learned = zip(*parts, strict=True)
    if (seen := state.seen(batch)) is not None:
        state.miner.remember(seen, all_mined, [learned.patch_loss for learned in all_learned])
        mark("mining")
    losses = torch.stack([learned.losses for learned in all_learned]).mean(0)
    return Step(
        losses=torch.stack([*losses, grad_norm.detach()]),
        batch=batch,
        visible_ids=torch.cat([mined.visible_ids for mined in all_mined]),
        hidden_ids=torch.cat([mined.hidden_ids for mined in all_mined]),
    )


def _num_hard(state: State, step: int) -> int:
    """How many of the hidden patches are mined: int(M alpha)."""
    config, schedule = state.config, state.schedule
    if config.mask not in HARD_SHARES:
        return 0
    alpha = hard_share(
        schedule.hard_share_progress(step), *config.hard_shares, config.hard_share_schedule
    )
    return int(state.num_hidden * alpha)


class Learned(NamedTuple):
    """Results of a forward and backward pass, still on the device."""

    losses: Float[Tensor, " 3"]  # reconstruction, predictor, ranking accuracy
    patch_loss: Float[Tensor, "batch hidden"]  # that the predictor ranks


def _learn(
    student: nn.Module,
    target: Target,
    images: Float[Tensor, "batch channels *size"],
    mined: Mined,
    config: PretrainConfig,
    autocast: torch.autocast,
    mark: Mark,
) -> Learned:
    """Reconstruct the hidden patches, predict how well, and take both losses backward."""
    hidden_ids = mined.hidden_ids
    with autocast:
        with torch.no_grad():
            expected = gather_patches(target(images, mined.features), hidden_ids)
        prediction, predicted_loss = student(
            images, mined.visible_ids, hidden_ids, mined.covered_ids
        )
    patch_loss = target.patch_loss(prediction, expected)
    reconstruction_loss = patch_loss.mean()
    predictor_loss = torch.zeros_like(reconstruction_loss)
    accuracy = torch.full_like(reconstruction_loss, math.nan)
    patch_loss = patch_loss.detach()
    if predicted_loss is not None or config.mines_by_memory:
        patch_loss = target.ranked_by(patch_loss, images, hidden_ids)
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


__all__ = ["Interrupted", "pretrain", "run_pretraining"]
