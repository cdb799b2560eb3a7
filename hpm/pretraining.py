"""Hard Patches Mining: the algorithm, top to bottom (CVPR 2023, arXiv 2304.05919, section 3)."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpm.core import distributed, lock
from hpm.core.config import PretrainConfig
from hpm.core.durations import seconds, time_text
from hpm.core.options import lay_over, make_config, read_preset
from hpm.core.phases import phase
from hpm.core.random_state import random_state_kept
from hpm.core.signals import Interrupted, Stop, stop_signals
from hpm.data.given import named
from hpm.data.loader import Batch
from hpm.evals.ongoing import OngoingProbe, make_probe
from hpm.mining.draw import Draw
from hpm.mining.losses import absolute_loss, ranking_accuracy, relative_loss
from hpm.mining.miner import Mined
from hpm.models.patches import gather_patches
from hpm.show.live import live_display
from hpm.show.monitor import (
    evaluate,
    picture_held_out,
    probe,
    refresh_report,
    seldom,
    session_recorded,
)
from hpm.show.run import Run
from hpm.targets.base import Target
from hpm.training.build import build_run
from hpm.training.checks import check_pretrain
from hpm.training.length import fit_to_time
from hpm.training.loop import Event, StepResult, accumulated, optimizer_step, train
from hpm.training.optim import scale_encoder
from hpm.training.run import PretrainingRun
from hpm.training.trial import Parts
from hpm.weights.own import encoder_call


def pretrain(
    data: Any = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> Run:
    """Pre-train a backbone: `hpm.pretrain("photos/", out="runs/first", model="vit_small")`.

    Args:
        data: what `hpm pretrain` takes as DATA, such as a folder; or a data set as an object, such
            as torch's (see `hpm.data.given`).
        out: run folder; the same call again resumes an interrupted run.
        config: name of a preset, or a YAML file; the options override it.
        options: those of `hpm pretrain`, the fields of `hpm.core.config.PretrainConfig`.

    Returns the run. Raises UserError on bad input, and Interrupted on a stop signal.
    """
    first = {"data": named(data), "out": out}
    options |= {name: value for name, value in first.items() if value is not None}
    preset = read_preset(config) if config else {}
    return run_pretraining(make_config(PretrainConfig, lay_over(preset, options)))


def run_pretraining(config: PretrainConfig) -> Run:
    """Train as configured, or resume an interrupted run of the same config."""
    began = time.monotonic()
    check_pretrain(config)
    device = distributed.pick_device(config.device)
    with (
        distributed.process_group(device),
        random_state_kept(device),
        stop_signals(seconds(config.stop_after) if config.stop_after else None) as stop,
    ):
        try:
            ongoing = make_probe(config)  # before the folder is created: it may raise
            config, notes = fit_to_time(config, device, training_parts(ongoing), stop, began)
            run = build_run(config, device)
            run.began = began
            try:
                for note in notes:
                    run.log.info(note)
                _train_and_export(run, ongoing, stop)
            finally:
                run.log.close()
        finally:
            lock.release(Path(config.out))
    return Run(run.files.folder)


def training_parts(ongoing: OngoingProbe | None) -> Parts:
    """What a training consists of, for a trial that times it."""

    def evaluation(run: PretrainingRun) -> None:
        evaluate(run)
        refresh_report(run)

    def one_probe(run: PretrainingRun) -> None:
        assert ongoing is not None
        probe(run, ongoing)

    return Parts(train_step, evaluation, one_probe if ongoing else None)


def _train_and_export(run: PretrainingRun, ongoing: OngoingProbe | None, stop: Stop) -> None:
    """Run the remaining steps, and write the backbone."""
    finished = run.step == run.total_steps
    if finished:
        run.log.info(
            f"{run.config.out} is already finished: nothing to do (more --epochs or --steps "
            "prolong it)"
        )
    else:
        with (
            session_recorded(run),
            live_display(run.files.folder, run.log, run.step),
            run.saving(),
        ):
            _train(run, ongoing, stop)
    run.save_backbone(overwrite=not finished)
    if best := run.best_probe:
        run.log.info(
            f"best probe: linear {best['linear']:.1f} %, kNN {best['knn']:.1f} % at step "
            f"{best['step']} ({run.files.best_checkpoint}); probing took "
            f"{run.probe_seconds:.1f} s in all"
        )
    if run.config.max_hours is not None and not finished:
        run.log.info(f"took {time_text(run.seconds)} of --max-hours {run.config.max_hours:g}")
    run.log.info(
        f"done: {run.files.backbone}\n  import hpm\n"
        f'  encoder = hpm.load_encoder("{run.config.out}")\n'
        f"  {encoder_call(run.sampling is not None)}"
    )


def _train(run: PretrainingRun, ongoing: OngoingProbe | None, stop: Stop) -> None:
    """Run the remaining steps, with evaluations, probes and reports in between."""
    if run.step == 0:
        picture_held_out(run)  # the untrained model
        distributed.wait_for_main()
    schedule = run.schedule
    events = [Event(schedule.evaluates, partial(evaluate, run))]
    probes = schedule.probes if ongoing is not None else lambda step: False
    if ongoing is not None:
        events.append(Event(probes, partial(probe, run, ongoing)))

    def reports(step: int) -> bool:
        return schedule.evaluates(step) or probes(step) or schedule.saves(step)

    events.append(Event(reports, seldom(partial(refresh_report, run))))
    train(
        run,
        lambda batch, step: train_step(run, batch, step, run.num_hard(step)),
        stop,
        events,
    )


def train_step(run: PretrainingRun, batch: Batch, step: int, num_hard: int) -> StepResult:
    """One step of the algorithm: mine, reconstruct and predict, update student and teacher.

    Args:
        batch: this process's part of the images.
        step: 0-based.
        num_hard: how many of the hidden patches are mined.

    Does not synchronise with the device.
    """
    config, schedule = run.config, run.schedule
    mined_parts: list[Mined] = []
    learned_parts: list[Learned] = []
    for part in accumulated(run.student, batch.parts(config.accumulate)):
        images = run.to_device(part.images)
        sample_ids = part.view_ids.to(run.device, non_blocking=True)
        draw = Draw(config.seed, schedule.epoch(step), sample_ids)
        with run.autocast():
            mined = run.miner.mine(images, draw, num_hard, step, run.seen(part))
        learned = _learn(run.student, run.target, images, mined, config, run.autocast())
        mined_parts.append(mined)
        learned_parts.append(learned)

    learning_rate = schedule.learning_rate(step)
    scale_encoder(run.optimizer, schedule.encoder_share(step))
    grad_norm = optimizer_step(run.model, run.optimizer, learning_rate, config.clip_grad)
    with phase("EMA"):
        run.teacher.update(run.model, schedule.ema_decay(step))
    if (seen := run.seen(batch)) is not None:
        with phase("mining"):
            patch_losses = [learned.patch_loss for learned in learned_parts]
            run.miner.remember(seen, mined_parts, patch_losses)
    return _result(run, mined_parts, learned_parts, grad_norm)


class Learned(NamedTuple):
    """Results of a forward and backward pass, still on the device."""

    losses: Float[Tensor, " 3"]  # reconstruction, predictor, ranking accuracy
    patch_loss: Float[Tensor, "batch decoded"]  # that the predictor ranks


def _learn(
    student: nn.Module,
    target: Target,
    images: Float[Tensor, "batch channels *size"],
    mined: Mined,
    config: PretrainConfig,
    autocast: torch.autocast,
) -> Learned:
    """Reconstruct the hidden patches, or a share of them, predict how well, and take both losses
    backward."""
    decoded_ids = mined.decoded_ids
    with phase("forward"):
        with autocast:
            with torch.no_grad():
                expected = gather_patches(target(images, mined.features), decoded_ids)
            prediction, predicted_loss = student(
                images, mined.visible_ids, decoded_ids, mined.covered_ids
            )
        patch_loss = target.patch_loss(prediction, expected)
        reconstruction_loss = patch_loss.mean()
        predictor_loss = torch.zeros_like(reconstruction_loss)
        accuracy = torch.full_like(reconstruction_loss, math.nan)
        patch_loss = patch_loss.detach()
        if predicted_loss is not None or config.mines_by_memory:
            patch_loss = target.ranked_by(patch_loss, images, decoded_ids)
        if predicted_loss is not None:
            if config.predictor_loss == "relative":
                total, pairs = relative_loss(predicted_loss, patch_loss)
                # Pairs are counted over all processes, as if they were one.
                predictor_loss = total / distributed.mean(pairs).clamp(min=1)
            else:
                predictor_loss = absolute_loss(predicted_loss, patch_loss)
            accuracy = ranking_accuracy(predicted_loss.detach().float(), patch_loss)
        loss = reconstruction_loss + config.predictor_weight * predictor_loss
    with phase("backward"):
        (loss / config.accumulate).backward()
    losses = torch.stack([reconstruction_loss.detach(), predictor_loss.detach(), accuracy])
    return Learned(losses, patch_loss)


def _result(
    run: PretrainingRun, mined: list[Mined], learned: list[Learned], grad_norm: Tensor | None
) -> StepResult:
    """The losses to log, and tensors to save for a replay if a loss is not finite."""
    assert grad_norm is not None
    reconstruction, predictor, accuracy = torch.stack([part.losses for part in learned]).mean(0)
    losses, measures = {"reconstruction_loss": reconstruction, "grad_norm": grad_norm}, {}
    if run.model.predictor is not None:
        losses["predictor_loss"] = predictor
        measures["ranking_accuracy"] = accuracy
    replay = {
        "losses": torch.stack([reconstruction, predictor, accuracy, grad_norm]),
        "visible_ids": torch.cat([part.visible_ids for part in mined]),
        "hidden_ids": torch.cat([part.hidden_ids for part in mined]),
    }
    return StepResult(losses, measures, replay)


__all__ = ["Interrupted", "pretrain", "run_pretraining"]
