"""The tables of docs/scaling.md, from counts of parameters and operations and from assumptions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from results import table, write_section
from scaling_model import (
    OPTIMISER_BYTES,
    Machine,
    Model,
    Network,
    compute_seconds,
    ddp_bandwidth,
    ddp_bytes,
    fsdp_bandwidth,
    fsdp_bytes,
    optimiser_seconds,
)

from hpm.commands.multiply_adds import multiply_adds_of_parts
from hpm.core.config import PretrainConfig
from hpm.models.architecture import Architecture, resolve_model
from hpm.models.build import build_empty_model

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
# 990 TFLOP/s in bfloat16 and 3.35 TB/s are the vendor's numbers of an H100 (SXM). 677 images per
# second and core: simplejpeg and a crop to 224 px, of images of 0.2 megapixels, in RESULTS.md.
H100 = Machine(peak=990e12, utilisation=0.35, memory=3.35e12, core=677, image=110e3)
NETWORK = Network(inside=2e-6, between=10e-6, node=8)
BATCH = 4096
LINKS = {"10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9, "400 Gbit/s": 50e9, "NVLink": 450e9}
GPUS = (1, 8, 64, 256, 1024)
STORES = (1e9, 10e9, 100e9)  # bytes/s
IMAGES = (10**6, 10**7, 10**8, 10**9)
EPOCHS = 200
GIANT = {"embed_dim": 1408, "depth": 40, "num_heads": 16}  # ViT-g/14


def architectures() -> dict[str, Architecture]:
    """The paper's models at 224 px, and the next two sizes."""

    def named(model: str) -> Architecture:
        return resolve_model(PretrainConfig("demo", "unused", model=model)).with_target_dim(588)

    base, large, huge = map(named, ("vit_base", "vit_large", "vit_huge"))
    base, large = base.with_target_dim(768), large.with_target_dim(768)
    giant = replace(huge, **GIANT)  # type: ignore[arg-type]
    return {"ViT-B/16": base, "ViT-L/16": large, "ViT-H/14": huge, "ViT-g/14 (1 B)": giant}


def count(name: str, architecture: Architecture) -> Model:
    """Parameters and operations of a step, on the meta device."""
    config = PretrainConfig("demo", "unused", normalize="imagenet")
    mining, learning = multiply_adds_of_parts(architecture, config)
    model = build_empty_model(architecture)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    unused = sum(p.numel() for p in model.reconstructor.blocks.parameters())
    return Model(name, trained, whole - trained, whole - unused, 2 * mining, 2 * learning)


def units(architecture: Architecture) -> int:
    """How many parts are gathered, one after the other, in a forward pass."""
    return architecture.depth + 2 * architecture.need_decoders().decoder_depth + 2


def memory_table(models: list[Model]) -> str:
    rows = [
        [
            model.name,
            f"{model.parameters / 1e9:.2f} B",
            f"{model.mining / 1e9:.0f} + {model.learning / 1e9:.0f}",
            *[f"{ddp_bytes(model, n) / 1e9:.2f}" for n in (2, 8, 1024)],
            *[f"{fsdp_bytes(model, n) / 1e9:.2f}" for n in (2, 8, 1024)],
        ]
        for model in models
    ]
    head = ["model", "parameters", "GFLOP per image: teacher + student"]
    head += [f"DDP, {n}" for n in (2, 8, 1024)] + [f"--shard, {n}" for n in (2, 8, 1024)]
    return table(head, rows)


def short(value: float) -> str:
    """Two digits, or whole numbers; `-` for infinity."""
    if math.isinf(value):
        return "-"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def gpu_table(models: list[Model], shapes: dict[str, Architecture]) -> str:
    """For a batch of 4096, whatever the number of GPUs."""
    rows = []
    for model in models:
        for gpus in GPUS:
            images = BATCH / gpus
            compute = compute_seconds(model, H100, images)
            per_second = images / compute
            links = ["", ""]
            if gpus > 1:
                unit = units(shapes[model.name])
                links = [
                    short(ddp_bandwidth(model, H100, images, gpus, NETWORK) / 1e9),
                    short(fsdp_bandwidth(model, H100, images, gpus, NETWORK, unit) / 1e9),
                ]
            rows.append(
                [
                    model.name,
                    str(gpus),
                    short(images),
                    short(1e3 * compute),
                    short(1e3 * optimiser_seconds(model, H100)),
                    short(1e3 * optimiser_seconds(model, H100, gpus)),
                    *links,
                    short(per_second * gpus * H100.image / 1e9),
                ]
            )
    head = ["model", "GPUs", "images each", "passes, ms", "optimiser, ms", "with --shard, ms"]
    head += ["link for DDP, GB/s", "for --shard, GB/s", "data in all, GB/s"]
    return table(head, rows)


def first_limit(limited: Callable[[int], bool]) -> int:
    """The smallest power of two of GPUs at which a condition holds; 0 if not up to 1,024."""
    return next((n for n in (2**k for k in range(1, 11)) if limited(n)), 0)


def limit_table(models: list[Model], shapes: dict[str, Architecture]) -> str:
    """From how many GPUs on something takes longer than what hides it."""

    def shown(gpus: int) -> str:
        return str(gpus) if gpus else "-"

    rows = []
    for model in models:
        unit = units(shapes[model.name])
        cells = []
        for link in LINKS.values():
            ddp, fsdp = _limits_of_link(model, unit, link)
            cells.append(f"{shown(ddp)} / {shown(fsdp)}")
        passes = partial(compute_seconds, model, H100)
        optimiser = optimiser_seconds(model, H100)
        cells.append(shown(first_limit(lambda n: optimiser > passes(BATCH / n))))  # noqa: B023
        rate = H100.image / passes(1)
        for store in STORES:
            cells.append(shown(first_limit(lambda n: n * rate > store)))  # noqa: B023
        cells.append(f"{1 / passes(1) / H100.core:.1f}")
        rows.append([model.name, *cells])
    head = ["model", *[f"link {name}" for name in LINKS], "optimiser (DDP)"]
    head += [f"store of {store / 1e9:g} GB/s" for store in STORES] + ["cores per GPU"]
    return table(head, rows)


def _limits_of_link(model: Model, unit: int, link: float) -> tuple[int, int]:
    """(with DDP, with --shard)"""

    def slow_ddp(n: int) -> bool:
        return ddp_bandwidth(model, H100, BATCH / n, n, NETWORK) > link

    def slow_fsdp(n: int) -> bool:
        return fsdp_bandwidth(model, H100, BATCH / n, n, NETWORK, unit) > link

    return first_limit(slow_ddp), first_limit(slow_fsdp)


def image_table(models: list[Model]) -> str:
    """How large the data are, and how long they take."""
    rows = []
    for images in IMAGES:
        row = [f"{images / 1e6:,.0f} M", f"{images * H100.image / 1e12:.3g} TB"]
        for model in models:
            hours = EPOCHS * compute_seconds(model, H100, images) / 3600
            row.append(short(hours / 24))
        rows.append(row)
    return table(["images", "bytes", *[f"{model.name}, GPU days" for model in models]], rows)


def text() -> str:
    shapes = architectures()
    models = [count(name, shape) for name, shape in shapes.items()]
    return f"""Operations and parameters are counted (HPM, mask ratio 0.75, 224 px); nothing here
was measured on a cluster. Assumed:

- H100 with {H100.peak / 1e12:.0f} TFLOP/s in bfloat16, of which a step reaches
  {100 * H100.utilisation:.0f} %, and {H100.memory / 1e12:.2f} TB/s of memory; {NETWORK.node} GPUs
  per node
- messages of {1e6 * NETWORK.inside:.0f} us inside of a node and of {1e6 * NETWORK.between:.0f} us
  between nodes, in rings over all GPUs (all-reduce: or in trees over the nodes, where they are
  faster), at the speed of the slowest link per GPU and direction
- gradients and gathered weights in float32, as `hpm` sends them
- {H100.image / 1e3:.0f} kB per image, and {H100.core:.0f} images decoded and cropped per second and
  core ([measured](../benchmarks/RESULTS.md) on 0.2 megapixels)

**Gigabytes that each GPU sends per step**, and what a step computes. DDP: 2 (n - 1) / n times the
gradients. `--shard`: (n - 1) / n times three copies of the student (weights in the forward and in
the backward pass, gradients) and one of the teacher without its reconstructor.

{memory_table(models)}

**A batch of {BATCH}** on 1 to 1,024 GPUs. The optimiser moves {OPTIMISER_BYTES} bytes per parameter
(clipping, AdamW, the teacher's average); with DDP, every GPU moves all of them. The link is the
slowest at which gradients still travel within the backward pass (DDP), and weights and gradients
within all passes (`--shard`); "-" where the latency alone takes longer.

{gpu_table(models, shapes)}

**The number of GPUs from which on something is the limit**, in powers of two, at the same batch
("-": not up to 1,024). Links: DDP / `--shard`. A store is the limit when all GPUs together read
images faster than it delivers. Cores: what decoding needs for each GPU.

{limit_table(models, shapes)}

With a batch that grows with the number of GPUs, the passes keep their time. The link that suffices
is that of the row with as many images each, up to the latency, which grows with the number of GPUs.

**Data and time** for {EPOCHS} epochs. One million images fit into the memory of a node, ten million
onto its disks; from a hundred million on, they are streamed (see [data.md](data.md)), and the store
of the table above is shared by all nodes. The number of images changes neither the link nor the
optimiser's share.

{image_table(models)}
"""


def write_tables() -> None:
    """Into docs/scaling.md."""
    with torch.device("meta"):
        written = text()
    write_section("on paper", written, PAGE)


if __name__ == "__main__":
    write_tables()
