"""`hpm doctor`: what this machine has, what is missing, and how to get it."""

from __future__ import annotations

import contextlib
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Literal

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from hpm.core.compilers import REMEDY, has_compiler
from hpm.core.errors import UserError, one_line
from hpm.core.version import __version__

State = Literal["ok", "warning", "missing"]

DISTRIBUTION = "hpm-vision"  # another project on PyPI is called hpm
# What each extra of `pip install 'hpm-vision[EXTRA]'` is for.
EXTRAS = {
    "parquet": "parquet files and Hugging Face data sets",
    "multichannel": "TIFF and 16-bit colours",
    "heic": "photographs of phones in HEIC",
    "datasets": "hf://user/name, tables read as streams",
    "stream": "shards on S3, and braces in addresses",
    "video": "video files",
    "timm": "timm's encoders, export to timm",
    "hf": "Hugging Face models, export to transformers",
    "onnx": "export to ONNX",
    "finetune": "fine-tuning with RandAugment, mixup and CutMix",
    "dense": "segmentation and detection",
    "clusters": "hpm show of features",
    "umap": "maps of features by UMAP instead of PCA",
    "faiss": "hpm similar --approximate",
    "ray": "hpm ray",
    "slurm": "hpm slurm",
    "wandb": "--tracker wandb",
    "mlflow": "--tracker mlflow",
}
LEAST_SHARED_MEMORY = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, its state, and what to do about it."""

    subject: str
    state: State
    found: str
    remedy: str = ""


def run_doctor() -> list[dict[str, str]]:
    """Print what is found, and return it as plain values."""
    findings = diagnose()
    print_findings(findings, Console(highlight=False))
    return [asdict(each) for each in findings]


def diagnose() -> list[Finding]:
    """Look at versions, hardware, shared memory, decoders and extras."""
    return [*_versions(), *_hardware(), *_decoders(), *_extras()]


def print_findings(findings: list[Finding], console: Console) -> None:
    """Print a table of the findings."""
    # A third, and room for the longest word, so that it can be copied.
    remedies = Column("to do", width=max(26, console.width // 3))
    table = Table("", "", "found", remedies, box=None)
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    for each in findings:
        state = Text(each.state, colours[each.state])
        table.add_row(Text(each.subject), state, Text(each.found), Text(each.remedy))
    console.print(table)


def _versions() -> Iterator[Finding]:
    yield Finding("hpm", "ok", __version__)
    yield Finding("Python", "ok", f"{platform.python_version()}, {platform.system()}")
    for name in ("torch", "numpy", "safetensors"):
        yield Finding(name, "ok", version(name))


def _hardware() -> Iterator[Finding]:
    import torch

    from hpm.core.precision import computes_in_bfloat16
    from hpm.data.cache import total_memory
    from hpm.data.workers import SHARED, usable_cores

    yield Finding("processor", "ok", f"{usable_cores()} cores for this process")
    with contextlib.suppress(ValueError, OSError):  # some systems do not say
        yield Finding("memory", "ok", f"{total_memory() / 1e9:.3g} GB")
    if torch.backends.mps.is_available():
        remedy = "to use it, pass --device mps, which is untested"
        yield Finding("GPU", "ok", "Apple GPU: training runs on the CPU unless it is named", remedy)
    elif not torch.cuda.is_available():
        built = torch.version.cuda
        yield Finding(
            "GPU",
            "warning",
            "none: training runs on the CPU" if built else "this PyTorch is a CPU build",
            "check the driver with nvidia-smi" if built else "for a GPU: https://pytorch.org",
        )
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        device = torch.device("cuda", number)
        bfloat16 = "" if computes_in_bfloat16(device) else ", no bfloat16"
        yield Finding(
            f"GPU {number}",
            "ok",
            f"{about.name}, {about.total_memory / 1e9:.3g} GB{bfloat16}, CUDA {torch.version.cuda}",
        )
    if torch.cuda.is_available() and not has_compiler("cuda"):
        yield Finding("C compiler", "missing", "none: training is not compiled, and slower", REMEDY)
    if SHARED.is_dir():
        size = shutil.disk_usage(SHARED).total
        low = size < LEAST_SHARED_MEMORY
        yield Finding(
            "shared memory",
            "warning" if low else "ok",
            f"{size / 1e9:.3g} GB in {SHARED}",
            "workers need more: docker run --shm-size=8g, or --workers 0" if low else "",
        )


def _decoders() -> Iterator[Finding]:
    fast = find_spec("simplejpeg") is not None
    yield Finding(
        "JPEG decoder",
        "ok" if fast else "warning",
        f"simplejpeg {version('simplejpeg')}" if fast else "Pillow",
        "" if fast else "faster: pip install simplejpeg",
    )
    if find_spec("av"):
        yield _video()
    if find_spec("torchvision"):
        yield _torchvision()


def _video() -> Finding:
    """What decodes videos in the main process."""
    from hpm.data.video.torchcodec import decoding_device

    try:
        device = decoding_device()
    except UserError as error:
        return Finding("video decoder", "missing", str(error))
    found = f"PyAV {version('av')}" if device is None else f"TorchCodec on {device}"
    return Finding("video decoder", "ok", found)


def _torchvision() -> Finding:
    """Whether torchvision fits this PyTorch."""
    from hpm.core import torchvision_shim

    try:
        torchvision_shim.import_torchvision()
    except Exception as error:
        remedy = "install the torchvision that fits torch"
        return Finding("torchvision", "missing", one_line(error), remedy)
    found = version("torchvision")
    if torchvision_shim.replaces_operators():
        found += ", built for another PyTorch: its operators are replaced by slower ones"
        return Finding("torchvision", "warning", found, "install the torchvision that fits torch")
    return Finding("torchvision", "ok", found)


def _extras() -> Iterator[Finding]:
    wanted = _requirements()
    for extra, purpose in EXTRAS.items():
        absent = [name for name in wanted.get(extra, ()) if not _installed(name)]
        remedy = f"pip install 'hpm-vision[{extra}]'" if absent else ""
        found = f"{purpose}: without {', '.join(absent)}" if absent else purpose
        yield Finding(f"extra {extra}", "missing" if absent else "ok", found, remedy)


def _requirements() -> dict[str, list[str]]:
    """Names of the packages of each extra, extras within extras resolved."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        raise UserError("hpm is not installed: run pip install . in its folder") from None
    direct: dict[str, list[str]] = {}
    for line in lines:
        if extra := re.search(r"extra == ['\"](\w+)['\"]", line):
            direct.setdefault(extra[1], []).append(line.split(";")[0].strip())

    def resolved(extra: str) -> Iterator[str]:
        for requirement in direct.get(extra, ()):
            inner = re.match(rf"{DISTRIBUTION}\[([\w,]+)\]", requirement)
            if inner:
                for name in inner[1].split(","):
                    yield from resolved(name)
            else:
                yield re.split(r"[^\w.-]", requirement)[0]

    return {extra: list(dict.fromkeys(resolved(extra))) for extra in direct}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
