"""What the documentation tells to type, and points to, is there."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

import hpm
from hpm.commands import cli
from hpm.commands.options import AblateConfig
from hpm.core.config import PretrainConfig
from hpm.core.options import check_rules, describe, make_config
from hpm.evals.options import EvalOptions
from hpm.training.checks import check_pretrain
from hpm.training.resume import may_change

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Of commands that are not ours.
FOREIGN = {"--signals-to-handle", "--nproc-per-node", "--max-restarts", "--logdir"}
FOREIGN |= {"--signal", "--array", "--requeue"}  # of Slurm
FOREIGN |= {"--build-arg", "--gpus", "--network", "--user"}  # of Docker


@functools.cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(text_of(page)) if language in languages]


def commands(page):
    """The arguments of each `hpm ...` in the blocks to paste, also behind torchrun's own."""
    found = []
    for code in blocks(page, "", "bash", "sh"):
        for line in re.sub(r"\\\n\s*", " ", code).splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["hpm"]:
                found.append(words[1:])
            elif "torchrun" in words and "hpm" in words:
                found.append(words[words.index("hpm") + 1 :])
    return found


ALL_COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)}"[:90])
    for page in PAGES
    if page.stem != "extending"  # whose commands need its files: see test_extending.py
    for words in commands(page)
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def parse(words):
    """Arguments -> the options that `hpm` makes of them; nothing is run."""
    return cli.understand(words)[1]


def check(config):
    if isinstance(config, EvalOptions):
        check_rules(config)
    elif isinstance(config, PretrainConfig):
        if config.codebook:  # a file that only its reader has
            config = dataclasses.replace(config, codebook=__file__)
        check_pretrain(config)
    if isinstance(config, AblateConfig):
        from hpm.commands.ablation_plan import make_plan

        make_plan(config)


def test_there_are_commands():
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_commands_are_understood(words):
    if words[-1] in ("--help", "--version"):
        return
    check(parse(words))


def test_a_mistaken_command_is_found():
    with pytest.raises(hpm.UserError, match="unknown option '--mask-rato'"):
        parse(["pretrain", "photos/", "--out", "runs/first", "--mask-rato", "0.5"])
    with pytest.raises(hpm.UserError, match="no evaluation 'kn'"):
        parse(["eval", "kn", "runs/first", "flowers/"])
    with pytest.raises(hpm.UserError, match="--mask-ratio is 2"):
        check(parse(["pretrain", "photos/", "--out", "runs/first", "--mask-ratio", "2"]))


def spoken(page):
    """The text without its blocks."""
    return BLOCK.sub("", text_of(page))


@each_page
def test_options_exist(page):
    named = {
        option
        for code in re.findall(r"`([^`]+)`", spoken(page))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code)
    }
    verbs = [*cli.VERBS.values(), *(v for _, find in cli.GROUPS.values() for v in find().values())]
    known = {"--config", "--help", "--import"}
    for verb in verbs:
        options = describe(verb.command("hpm").options)
        known |= {f"--{name.replace('_', '-')}" for name in options}
    assert named - known - FOREIGN == set()


@each_page
def test_values_of_options_fit(page):
    """`--mask random --predictor-loss none` in the text: options of pretrain and their values."""
    own = {field.name for field in dataclasses.fields(PretrainConfig)} - {"data", "out"}
    for code in re.findall(r"`(--[^`]+ [^`]+)`", spoken(page)):
        names = {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", code)}
        stands_in = re.search(r"[A-Z|]|\.\.\.", code)  # for what the reader has
        if names <= own and not stands_in:
            words = ["photos/", "--out", "runs/first", *shlex.split(code)]
            assert isinstance(parse(["pretrain", *words]), PretrainConfig)


def test_what_may_differ_when_a_run_goes_on():
    page = text_of(ROOT / "docs/troubleshooting.md")
    (listed,) = re.findall(r"^These options may differ:(.*?)\n\n", page, re.MULTILINE | re.DOTALL)
    assert {name.replace("-", "_") for name in re.findall(r"--([a-z-]+)", listed)} == (
        {name for name in describe(PretrainConfig) if may_change(name)} - {"out"}
    )


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", spoken(page)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} points to {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} points to {target}"


def anchors(page):
    """The names that GitHub gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)$", spoken(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ["reliability", "security"])
def test_tests_that_show_it_exist(name):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text_of(ROOT / f"docs/{name}.md"))
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


@each_page
def test_yaml_is_a_config(page):
    for code in blocks(page, "yaml"):
        options = {"data": "photos/", "out": "runs/first"} | yaml.safe_load(code)
        check_pretrain(make_config(PretrainConfig, options))


@each_page
def test_python_is_true(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hpm":
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "hpm":
                assert hasattr(hpm, node.attr), ast.unparse(node)
            # What the files of this page pre-train is run by test_extending.py.
            own = page.stem == "extending"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "hpm.pretrain" and not own:
                options = {given.arg: ast.literal_eval(given.value) for given in node.keywords}
                options |= dict(
                    zip(("data", "out"), map(ast.literal_eval, node.args), strict=False)
                )
                options.pop("config", None)
                check_pretrain(make_config(PretrainConfig, options))
