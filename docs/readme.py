"""Write the demo's numbers and figure into the README: `make readme`, after `make demo`."""

import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "demo"

(linear,) = (json.loads(file.read_text()) for file in (RUN / "evals").glob("linear_demo*.json"))
nearest = json.loads((RUN / "evals" / "knn_demo.json").read_text())
hard = nearest["hardness"]
lines = [
    "| features | linear probe | 95 % interval | kNN, k = 20 |",
    "|---|---|---|---|",
    *[
        "| {} | {top1:.1f} | {top1_low:.1f} to {top1_high:.1f} | {:.1f} |".format(
            name, nearest["values"][name]["k = 20"]["top1"], **numbers["linear"]
        )
        for name, numbers in linear["values"].items()
    ],
    "",
    f"Of the quarter of patches that the teacher predicts to be hardest, "
    f"{100 * hard['hard_on_objects']:.0f} % are on objects "
    f"({100 * hard['chance_on_objects']:.0f} % by chance). The student's predictor puts "
    f"{100 * hard['ranking_accuracy']:.0f} % of the pairs of hidden patches in the right order, "
    f"the teacher, from whole images, {100 * hard['mining_accuracy']:.0f} % (50 is chance).",
]
readme = ROOT / "README.md"
block = "<!-- demo -->\n" + "\n".join(lines) + "\n<!-- /demo -->"
text = re.sub(r"<!-- demo -->.*<!-- /demo -->", lambda _: block, readme.read_text(), flags=re.S)
readme.write_text(text)
shutil.copy(RUN / "demo.png", ROOT / "docs" / "demo.png")
