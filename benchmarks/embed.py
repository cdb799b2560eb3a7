"""Time `hpm embed` beside a bare loop of the same encoder: `python benchmarks/embed.py vit_small`.

Both get the same batches, loaded in advance. Embedding includes pooling, the copy to the CPU, the
checks and the file; the bare loop calls the encoder and takes the mean of the patches.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from results import machine, table, write_section

from hpm.commands.embed import run_embed
from hpm.commands.embedding_options import EmbedConfig
from hpm.core.distributed import pick_device
from hpm.data.loader import Batch
from hpm.models.architecture import SIZES, Architecture
from hpm.models.build import build_encoder
from hpm.weights.own import save_backbone
from hpm.weights.resolve import load_encoder

SIDE = 224


def noise(images: int, batch_size: int, pinned: bool) -> list[Batch]:
    """Batches of uint8 noise [B 3 224 224]."""
    found = []
    for ids in torch.arange(images).split(batch_size):
        pixels = torch.randint(0, 256, (len(ids), 3, SIDE, SIDE), dtype=torch.uint8)
        found.append(Batch(pixels.pin_memory() if pinned else pixels, ids, []))
    return found


def time_bare(run: Path, batches: list[Batch], device: torch.device, precision: str) -> float:
    """Seconds of a loop over the batches."""
    encoder = load_encoder(run).to(device)
    bfloat16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    pooled = []
    with torch.inference_mode(), bfloat16:
        encoder(batches[0].images.to(device))
        wait(device)
        start = time.perf_counter()
        for batch in batches:
            images = encoder.normalize(batch.images.to(device, non_blocking=True))
            pooled.append(encoder.tokens(images)[1].mean(1))
        wait(device)
    return time.perf_counter() - start


def time_embedding(config: EmbedConfig, batches: list[Batch], device: torch.device) -> float:
    """Seconds of `hpm embed` from the first batch to the end of the file."""
    began = 0.0

    def loaded(*_: object, **__: object) -> Iterator[Batch]:
        nonlocal began
        wait(device)
        began = time.perf_counter()
        yield from batches

    with mock.patch("hpm.evals.embedder.evaluation_batches", loaded):
        run_embed(config, report=lambda line: None)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES, help="of the encoder, with random weights")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    device = pick_device("auto")
    batches = noise(chosen.images, chosen.batch_size, device.type == "cuda")
    size = SIZES[chosen.size]
    patch = (size.patch_size, size.patch_size)
    architecture = Architecture((SIDE, SIDE), patch, 3, size.embed_dim, size.depth, size.num_heads)
    rounds = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = folder / "run.safetensors"
        encoder = build_encoder(architecture, seed=0)
        save_backbone(run, encoder.state_dict(), architecture, [0.5] * 3, [0.25] * 3)
        (folder / "images").mkdir()
        for number in range(chosen.images):  # only their names are used
            Image.new("RGB", (1, 1)).save(folder / "images" / f"{number:05d}.png")
        for number in range(chosen.rounds):
            config = EmbedConfig(
                str(run),
                str(folder / "images"),
                str(folder / f"{number}.npy"),
                precision=chosen.precision,
                batch_size=chosen.batch_size,
                device="cuda" if device.type == "cuda" else "cpu",
            )
            bare = time_bare(run, batches, device, chosen.precision)
            rounds.append((bare, time_embedding(config, batches, device)))
    bare_speed, speed = (
        statistics.median(chosen.images / seconds for seconds in each)
        for each in zip(*rounds, strict=True)
    )
    shares = [100 * bare / embedding for bare, embedding in rounds]
    rows = [["bare loop", f"{bare_speed:.1f}"], ["`hpm embed`", f"{speed:.1f}"]]
    write_section(
        f"embed {chosen.size} {chosen.precision}",
        f"## Embedding, {chosen.size}, {chosen.precision}\n\n"
        f"`python benchmarks/embed.py {chosen.size} --images {chosen.images} --batch-size "
        f"{chosen.batch_size} --precision {chosen.precision} --rounds {chosen.rounds}` on "
        f"{machine()}; random weights, images of {SIDE} x {SIDE} pixels.\n\n"
        f"{table(['median of the rounds', 'images per second'], rows)}\n\n"
        f"`hpm embed` reaches {statistics.median(shares):.1f} % of the bare loop (median of the "
        f"rounds; {min(shares):.1f} to {max(shares):.1f} %).",
    )


if __name__ == "__main__":
    main()
