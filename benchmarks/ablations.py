"""The paper's ablations at small scale: masks, and targets, on flowers.

    python benchmarks/ablations.py masks
    python benchmarks/ablations.py targets

Each is one `hpm ablate`, which goes on where it was stopped; its table goes into RESULTS.md (with
--report that of what there is, without running anything).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from results import machine, write_section

FOLDER = Path(__file__).parent
DATA = FOLDER / ".." / ".." / "shared" / "data" / "flowers"
ABLATIONS = {
    "masks": [
        "--vary",
        "mask=easy_to_hard,random,easiest,hard_to_easy,hardest,moderate",
        "--target",
        "pixels",
    ],
    "targets": ["--vary", "target=pixels,normalized_pixels,hog,teacher", "--mask", "random"],
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
    table = (out / "ablation.md").read_text()
    text = f"""
## Ablation of {chosen.name}, flowers

`python benchmarks/ablations.py {chosen.name} --seeds {chosen.seeds}`, which is
`hpm ablate flowers {" ".join(options)}`, on {machine()}.

Top-1 in % on the test split by kNN (k = 20) and linear probe on the mean of the patches, mean ±
standard deviation over as many seeds as were run. Minutes are of training, and were taken with
other work on the same cores.

{table}
"""
    write_section(f"ablation {chosen.name}", text)


if __name__ == "__main__":
    main()
