"""Learn a codebook of discrete tokens."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from hpm.commands.options import TokenizeConfig
from hpm.core import distributed
from hpm.core.config import pair
from hpm.core.distributed import pick_device
from hpm.core.errors import UserError
from hpm.core.options import check_rules
from hpm.core.progress import track
from hpm.data.loader import evaluation_batches
from hpm.data.sources import Source, Subset, open_source
from hpm.targets.codebook import Codebook, kmeans
from hpm.targets.frozen_model import load_frozen


def tokenize(config: TokenizeConfig) -> tuple[Path, float]:
    """Learn a codebook from the patches of random images. Returns its file and the mean squared
    distance of a patch to its code. Raises UserError on bad input."""
    out = Path(config.out)
    for name in ("codes", "images", "rounds"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at least 1")
    size, patch = pair(config.image_size), pair(config.patch_size)
    if any(p < 1 or s % p for s, p in zip(size, patch, strict=True)):
        raise UserError(f"patch_size {config.patch_size} does not divide {config.image_size}")
    if out.suffix != ".safetensors":
        raise UserError(f"out is '{out}': name a .safetensors file")
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    check_rules(config)
    if config.of != "pixels" and config.channels not in (1, 3):
        raise UserError(
            f"{config.of} takes grey or RGB images, but channels is {config.channels}: pass "
            "--of pixels"
        )
    distributed.need_one_process("tokenize")
    device = pick_device(config.device)
    frozen = load_frozen(config.of) if config.of != "pixels" else None
    codebook = Codebook(torch.empty(0, 1), config.of, patch, config.channels, frozen).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    vectors = _sample(codebook, open_source(config.data).train, size, config, generator)
    if len(vectors) < config.codes:
        raise UserError(
            f"codes {config.codes} is more than there are patches ({len(vectors)}): pass fewer "
            "--codes or more images"
        )
    codebook.codes, inertia = kmeans(vectors.to(device), config.codes, config.rounds, generator)
    codebook.save(out)
    return out, inertia / len(vectors)


def _sample(
    codebook: Codebook,
    source: Source,
    size: tuple[int, int],
    config: TokenizeConfig,
    generator: torch.Generator,
) -> Float[Tensor, "vectors dim"]:
    """Patches of random images, at most `config.patches` in total."""
    chosen = torch.randperm(len(source), generator=generator)[: config.images].sort().values
    grid = tuple(s // p for s, p in zip(size, codebook.patch_size, strict=True))
    share = max(1, min(math.prod(grid), config.patches // len(chosen)))
    found = []
    some = Subset(source, chosen.numpy())
    batches = math.ceil(len(chosen) / 64)
    reading = evaluation_batches(some, size, config.channels, 64, config.workers)
    for batch in track(reading, "patches", batches):
        if len(batch.images):
            pixels = batch.images.to(codebook.codes.device).float() / 255
            vectors = codebook.vectors(pixels, grid).cpu()
            kept = torch.rand(vectors.shape[:2], generator=generator).argsort(1)[:, :share]
            found.append(vectors.gather(1, kept[..., None].expand(-1, -1, vectors.shape[-1])))
    if not found:
        raise UserError(f"{source.name}: no readable image")
    return torch.cat(found).flatten(0, 1)
