"""Ablations at small scale, on flowers: the paper's masks and targets, and Pixio's changes.

    python benchmarks/ablations.py masks
    python benchmarks/ablations.py targets
    python benchmarks/ablations.py pixio

Each is one `hpm ablate`, which goes on where it was stopped; its table goes into RESULTS.md (with
--report that of what there is, without running anything).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from results import machine, spread, table, write_section

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data" / "flowers"
PLAIN = "mask=random predictor_loss=none"
ABLATIONS = {
    "masks": [
        "--vary",
        "mask=easy_to_hard,random,easiest,hard_to_easy,hardest,moderate",
        "--target",
        "pixels",
    ],
    "targets": ["--vary", "target=pixels,normalized_pixels,hog,teacher", "--mask", "random"],
    # The grid has 8 x 8 patches, so that units of 2 x 2 are as many as Pixio's of 4 x 4.
    "pixio": [
        *("--arm", "mae"),
        *("--arm", f"units: {PLAIN} mask_unit=2"),
        *("--arm", f"tokens: {PLAIN} class_tokens=8"),
        *("--arm", f"decoder: {PLAIN} decoder=deep"),
        *("--arm", f"all: {PLAIN} mask_unit=2 class_tokens=8 decoder=deep"),
    ],
}
COMMON = [
    "--model",
    "vit_nano",
    "--image-size",
    "64",
    "--patch-size",
    "8",
    "--batch-size",
    "64",
    "--base-lr",
    "4e-3",
    "--epochs",
    "6",
    "--holdout",
    "64",
    "--eval-every",
    "100%",
    "--checkpoint-every",
    "50%",
    "--keep-checkpoints",
    "1",
    "--workers",
    "0",
]


def class_tokens(out: Path) -> str:
    """The same measures on the class token, or the mean of several, for each arm."""
    rows = []
    for arm in sorted({run.parent for run in out.glob("*/seed_*")}):
        cells = []
        for protocol in ("knn", "linear"):
            files = sorted(arm.glob(f"seed_*/ablation/{protocol}_*.json"))
            values = [json.loads(f.read_text())["values"]["trained, class token"] for f in files]
            cells.append(spread([next(iter(value.values()))["top1"] for value in values]))
        rows.append([arm.name, *cells])
    return (
        "The same on the class token, or the mean of several:\n\n"
        f"{table(['arm', 'kNN', 'linear probe'], rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=ABLATIONS)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="of what there is already")
    chosen = parser.parse_args()
    out = chosen.out / f"ablate_{chosen.name}"
    options = [*ABLATIONS[chosen.name], *COMMON, "--seeds", str(chosen.seeds)]
    if not chosen.report:
        command = [sys.executable, "-m", "hpm", "ablate", str(DATA), "--out", str(out), *options]
        subprocess.run(command, check=True)
    means = (out / "ablation.md").read_text()
    text = f"""
## Ablation of {chosen.name}, flowers

`python benchmarks/ablations.py {chosen.name} --seeds {chosen.seeds}`, which is
`hpm ablate flowers {shlex.join(options)}`, on {machine()}.

Top-1 in % on the test split by kNN (k = 20) and linear probe on the mean of the patches, mean ±
standard deviation over as many seeds as were run. Minutes are of training, and were taken with
other work on the same cores.

{means}
{class_tokens(out) if chosen.name == "pixio" else ""}
"""
    write_section(f"ablation {chosen.name}", text)


if __name__ == "__main__":
    main()
