"""What an installation holds, and what the Dockerfile asks for."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes beside the sources
    tracked = subprocess.run(["git", "ls-files", "hpm"], cwd=ROOT, capture_output=True, text=True)
    names = set(tracked.stdout.split())
    for name in [*names, "pyproject.toml", "README.md", "LICENSE"]:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, "-m", *command, tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert held == names


def test_the_dockerfile_names_what_exists() -> None:
    text = (ROOT / "Dockerfile").read_text()
    extras = re.search(r"ARG EXTRAS=(\S+)", text)
    assert extras and set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    copied = re.findall(r"--mount=type=bind,source=(\S+?),", text)
    sent = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    assert copied and set(copied) <= set(sent)
    assert all((ROOT / name).exists() for name in sent)
