"""Time the training steps of HPM on clips beside VideoMAE's, in turns.

    python benchmarks/video_step.py         # ViT-B, the preset of Kinetics-400; minutes on a CPU
    python benchmarks/video_step.py --model vit_small --batch-size 4

VideoMAE's step is that of `hpm pretrain --mask tube --predictor-loss none` and, as a reference,
that of transformers' VideoMAEForPreTraining with the same sizes. All steps are of noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import machine, table, write_section

from hpm.commands.bench_step import HARD_SHARE, build_bench_run, noise_batch
from hpm.commands.multiply_adds import count_multiply_adds, step_multiply_adds
from hpm.commands.options import BenchConfig
from hpm.commands.timing import matrix_product_flops, wait
from hpm.core.choices import HARD_SHARES
from hpm.core.distributed import pick_device
from hpm.core.extras import need
from hpm.core.options import make_config, read_preset
from hpm.data.loader import normalize
from hpm.pretraining import train_step
from hpm.training.run import PretrainingRun

PRESET = "video_vit_base_k400"
PLAIN = {"mask": "tube", "mine_tubes": "none", "predictor_loss": "none"}
METHODS: dict[str, dict[str, Any]] = {
    "VideoMAE (random tubes)": PLAIN,
    "HPM": {},
    "HPM by memory": {"mine_by": "memory"},
    "HPM by memory, no predictor": {"mine_by": "memory", "predictor_loss": "none"},
    "VideoMAE, --decoder-keep 0.5": PLAIN | {"decoder_keep": 0.5},
    "HPM, --decoder-keep 0.5": {"decoder_keep": 0.5},
}
THEIRS = "transformers' VideoMAEForPreTraining"
REFERENCE = next(iter(METHODS))


class Timed:
    """A method: its step, multiply-adds per clip, and the seconds of each step."""

    def __init__(self, step: Callable[[], Any], multiply_adds: float):
        self.step, self.multiply_adds = step, multiply_adds
        self.seconds: list[float] = []

    def time(self, device: torch.device) -> None:
        wait(device)
        start = time.perf_counter()
        self.step()
        wait(device)
        self.seconds.append(time.perf_counter() - start)


def our_step(config: BenchConfig, options: dict[str, Any], out: Path) -> tuple[Timed, Any]:
    """A method's step, half-way through training, and its run."""
    run = build_bench_run(config, options, out, pick_device(config.device))
    batch = noise_batch(run)
    num_hard = int(run.num_hidden * HARD_SHARE) if run.config.mask in HARD_SHARES else 0
    multiply_adds = step_multiply_adds(run.architecture, run.config)
    return Timed(lambda: train_step(run, batch, 0, num_hard), multiply_adds), run


def their_step(run: PretrainingRun) -> Timed:
    """A step of transformers' model, of the sizes of ours."""
    transformers = need("transformers", "hf", "their step")
    ours, decoders, device = run.architecture, run.architecture.decoders, run.device
    assert decoders is not None
    config = transformers.VideoMAEConfig(
        image_size=ours.image_size[1],
        patch_size=ours.patch_size[1],
        num_frames=ours.image_size[0],
        tubelet_size=ours.patch_size[0],
        hidden_size=ours.embed_dim,
        num_hidden_layers=ours.depth,
        num_attention_heads=ours.num_heads,
        intermediate_size=4 * ours.embed_dim,
        decoder_hidden_size=decoders.decoder_dim,
        decoder_num_hidden_layers=decoders.decoder_depth,
        decoder_num_attention_heads=decoders.decoder_heads,
        decoder_intermediate_size=4 * decoders.decoder_dim,
        norm_pix_loss=True,
    )
    model = transformers.VideoMAEForPreTraining(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), fused=True)
    images = noise_batch(run).images
    times, rows, columns = run.model.encoder.grid
    hidden = torch.zeros(len(images), rows * columns, dtype=torch.bool)
    hidden[:, : run.num_hidden // times] = True  # the same number of tubes in each clip
    mask = hidden.repeat(1, times).to(device)

    def step() -> None:
        clips = normalize(images.to(device), *run.mean_and_std).transpose(1, 2)
        with run.autocast():
            loss = model(clips, bool_masked_pos=mask).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    return Timed(step, count_multiply_adds(step)[0] / len(images))


def report(
    timed: dict[str, Timed], products: list[float], run: PretrainingRun, command: str
) -> str:
    batch, product = run.config.global_batch_size, statistics.median(products)
    rows = []
    for name, found in timed.items():
        ratios = [a / b for a, b in zip(found.seconds, timed[REFERENCE].seconds, strict=True)]
        middle = statistics.median(found.seconds)
        share = 2 * found.multiply_adds * batch / middle / product
        rows.append(
            [
                name,
                f"{found.multiply_adds / 1e9:.3g}",
                f"{found.multiply_adds / timed[REFERENCE].multiply_adds:.2f}",
                f"{1e3 * middle:.0f}",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                f"{100 * share:.0f}",
            ]
        )
    head = ["", "multiply-adds per clip, G", "of VideoMAE's", "step, ms", "of VideoMAE's"]
    head += ["of the matrix product, %"]
    shape, decoders = run.architecture, run.architecture.decoders
    assert decoders is not None
    size, patch = (" x ".join(map(str, each)) for each in (shape.image_size, shape.patch_size))
    return (
        f"## The training step on clips, {run.config.model}\n\n`{command}` on {machine()}, "
        f"{torch.get_num_threads()} threads, {run.config.precision}.\n\n"
        f"Clips of {size} in patches of {patch}, batches of {batch}, "
        f"{100 * run.config.mask_ratio:g} % hidden, decoders of {decoders.decoder_depth} blocks "
        f"of width {decoders.decoder_dim}. Steps in turns, {len(products)} rounds: medians; "
        "ratios within a round, lowest to highest. A matrix product reaches "
        f"{product / 1e12:.3g} TFLOP/s.\n\n" + table(head, rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--try", action="store_true", dest="dry", help="print, and write nothing")
    chosen = parser.parse_args()
    preset = read_preset(PRESET)
    if chosen.model != "vit_base":  # whose decoders the preset has
        preset = {name: v for name, v in preset.items() if not name.startswith("decoder_")}
    given = {"model": chosen.model, "batch_size": chosen.batch_size, "accumulate": 1}
    config = make_config(BenchConfig, preset | given)
    with tempfile.TemporaryDirectory() as folder:
        built = {
            name: our_step(config, options, Path(folder) / str(number))
            for number, (name, options) in enumerate(METHODS.items())
        }
        timed = {name: found for name, (found, _) in built.items()}
        reference: PretrainingRun = built[REFERENCE][1]
        timed[THEIRS] = their_step(reference)
        products = []
        for each in timed.values():
            each.step()
        for number in range(chosen.rounds):
            for each in timed.values():
                each.time(reference.device)
            products.append(matrix_product_flops(reference.device))
            print(f"round {number + 1} of {chosen.rounds}", flush=True)
        for _, run in built.values():
            run.log.close()
    words = [f"--model {chosen.model}"] if chosen.model != "vit_base" else []
    words += [f"--batch-size {chosen.batch_size}"] if chosen.batch_size != 2 else []
    words += [f"--rounds {chosen.rounds}"] if chosen.rounds != 2 else []
    command = " ".join(["python benchmarks/video_step.py", *words])
    text = report(timed, products, reference, command)
    if chosen.dry:
        print(text)
    else:
        write_section(f"video step {chosen.model}", text)


if __name__ == "__main__":
    main()
