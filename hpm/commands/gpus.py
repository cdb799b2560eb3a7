"""GPUs that `hpm plan` knows: what their vendors say of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

GpuName = Literal["h100", "h200", "a100", "l40s", "l4", "rtx4090", "rtx3090"]


class Gpu(NamedTuple):
    """peak: TFLOP/s of dense bfloat16 products that are summed in float32. memory: in GB."""

    title: str
    peak: float
    memory: float


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", 989, 80),
    "h200": Gpu("H200", 989, 141),
    "a100": Gpu("A100", 312, 80),
    "l40s": Gpu("L40S", 362, 48),
    "l4": Gpu("L4", 121, 24),
    "rtx4090": Gpu("RTX 4090", 165, 24),
    "rtx3090": Gpu("RTX 3090", 71, 24),
}
