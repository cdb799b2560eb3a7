"""A suggested training, and what `hpm plan` says of it: why, what to mind, and the screen."""

from __future__ import annotations

import dataclasses
import shlex
import statistics
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hpm.commands.plan_rules import ENOUGH, EPOCHS, Setting, training_images
from hpm.core.durations import time_text
from hpm.core.errors import counted
from hpm.core.wording import file_word
from hpm.data.survey import Survey
from hpm.training.first_lines import FEW_STEPS

FEW_IMAGES = 100_000  # with fewer, other weights are the better start
BUSY = 0.8  # of the workers' time, from which on the loading of images may be what limits
CHANNELS = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGBA"}


@dataclass
class Plan:
    """A suggested training.

    recommended: steps of a full training. seconds, step_seconds, memory_gb: measured here, or
    `estimated`. hours: the time there is, if it was said. max_hours: set if it ends the training.
    """

    survey: Survey
    setting: Setting
    command: list[str]
    steps: int
    epochs: float | None
    recommended: int
    base_lr: float
    seconds: float
    step_seconds: float
    memory_gb: float
    memory_available_gb: float
    machine: str
    on_gpu: bool
    estimated: bool
    workers: int
    hours: float | None
    max_hours: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the sizes of each image."""
        content = dataclasses.asdict(self)
        for name in ("widths", "heights"):
            sizes = sorted(content["survey"].pop(name))
            content["survey"][name] = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
        return content | {
            "command": shlex.join(self.command),
            "notes": notes_on(self),
            "reasons": reasons_for(self),
        }


def reasons_for(plan: Plan) -> dict[str, str]:
    """Why each option has its value."""
    setting, found = plan.setting, plan.survey
    count = training_images(found)
    kind = _kind(setting)
    images = "a stream" if count is None else f"{count:,} {kind}s to train on"
    size = f"the shorter side has {found.short_side:.0f} pixels (median)"
    if setting.image_size < 0.8 * min(224, found.short_side):
        size += "; reduced to fit"
    elif setting.image_size > found.short_side:
        size += f", enlarged to the next size with patches of {setting.patch_size}"
    reasons = {
        f"model {setting.model}": f"{images}; a larger model needs more {kind}s or more time",
        f"image size {setting.image_size}, patches of {setting.patch_size}": size,
        f"batch {setting.batch_size}": f"smaller batches give few {kind}s more steps"
        if setting.batch_size < 256
        else "the default",
    }
    if setting.accumulate > 1:
        reasons[f"accumulate {setting.accumulate}"] = "the whole batch would not fit into memory"
    if setting.channels != 3:
        reasons[f"channels {setting.channels}"] = "that is what the images have"
    if setting.frames > 1:
        reasons[f"frames {setting.frames}, mask ratio 0.9"] = "videos: VideoMAE's recipe"
    if plan.max_hours is None and plan.steps > plan.recommended:
        length = f"as many as fit into {plan.hours:g} h, but no more epochs than these"
        if plan.epochs is not None and plan.epochs < 0.99 * EPOCHS[1]:
            length = f"as many as fit into {plan.hours:g} h"
    elif plan.max_hours is None:
        length = "a full training, which fits"
        length += " into a day" if plan.hours is None else f" into {plan.hours:g} h"
    else:
        share = 100 * plan.steps / plan.recommended
        length = f"{share:.0f} % of a full training of {plan.recommended:,} steps"
    title = f"{plan.steps:,} steps"
    title += f" ({plan.epochs:.0f} epochs)" if plan.epochs is not None else ""
    reasons[title] = length
    reasons[f"base lr {plan.base_lr:g}"] = "the default for so many steps"
    decoding = f"decoding takes {1e3 * found.decode_seconds:.2g} ms"
    if setting.frames > 1:
        reasons[f"workers {plan.workers}"] = f"{decoding} a clip on one core"
    else:
        reasons[f"workers {plan.workers}, cache auto"] = (
            f"{decoding} an image on one core; the cache is used if all images fit into a quarter "
            "of the memory"
        )
    return reasons


def notes_on(plan: Plan) -> list[str]:
    """What to mind before the command is run."""
    found, setting = plan.survey, plan.setting
    count = training_images(found)
    notes = []
    if found.unreadable:
        name, reason = found.unreadable[0]
        notes.append(
            f"{counted(len(found.unreadable), _kind(setting))} cannot be read and will be passed "
            f"over, the first: {name} ({reason})"
        )
    if found.duplicates:
        notes.append(
            f"{counted(found.duplicates, 'copy', 'copies')} of other files looked at: such images "
            "count twice in training; remove them if you split the data yourself"
        )
    if count is not None and count < FEW_IMAGES:
        notes.append(_continue_from(plan, count))
    if plan.steps < ENOUGH * plan.recommended or plan.steps < FEW_STEPS:
        more = f"more {_kind(setting)}s"  # what limits the training is their number, or the time
        if plan.max_hours is not None:
            more = "more time" if plan.on_gpu else "more time, or a GPU,"
        notes.append(
            f"{plan.steps:,} steps are a short training: {more} would give better features"
        )
    needed = setting.batch_size / plan.step_seconds
    if plan.estimated and needed * found.decode_seconds > BUSY:
        cores = needed * found.decode_seconds
        if setting.frames > 1:
            kind, then = "clips", "; docs/data.md says which videos load faster"
        else:
            kind = "images"
            then = ", until the images are in the cache; `hpm prepare` makes them smaller"
        notes.append(
            f"the GPU would use {needed:,.0f} {kind} a second, which takes about {cores:.0f} cores "
            f"as fast as those here to decode{then}, `hpm bench data` measures it"
        )
    if plan.estimated:
        notes.append(
            "time and memory are estimates: they assume 30 % of the GPU's peak, of which small "
            "models reach less, and leave out evaluations and loading. --max-hours measures the "
            "steps on the machine that trains"
        )
    return notes


def _kind(setting: Setting) -> str:
    return file_word(setting.frames > 1)


def _continue_from(plan: Plan, count: int) -> str:
    begin = f"{count:,} {_kind(plan.setting)}s: with fewer than {FEW_IMAGES:,}, training that "
    begin += "continues from other weights is usually better than from random ones. "
    if plan.setting.frames > 1:
        return begin + "Pass --init with weights of VideoMAE (docs/exporting.md)"
    if plan.setting.channels != 3:
        return begin + "Pass --init with weights of images like yours, if there are any"
    return begin + (
        "Try --model timm/vit_small_patch16_224.augreg_in21k --pretrained, with --image-size 224 "
        "and no --patch-size (docs/recipes.md)"
    )


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan, as wide as the terminal."""
    found = plan.survey
    if not console.is_terminal:
        console.width = 80
    about = Table.grid(padding=(0, 2))
    about.add_row(Text(f"{_kind(plan.setting)}s", "bold"), Text("\n".join(_about_images(found))))
    about.add_row(Text("machine", "bold"), Text(plan.machine))
    console.print(about)
    console.print()
    console.print(Text("command", "bold"))
    console.print(Text(wrapped(plan.command, console.width)), soft_wrap=True)
    console.print()
    console.print(Text("why", "bold"))
    why = Table.grid(padding=(0, 2))
    for title, reason in reasons_for(plan).items():
        why.add_row(Text(title), Text(reason))
    console.print(Padding(why, (0, 0, 0, 2)))
    console.print()
    sure = "estimated" if plan.estimated else "measured here"
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row(
        Text("time", "bold"),
        Text(f"{time_text(plan.seconds)}; a step takes {plan.step_seconds:.3g} s ({sure})"),
    )
    numbers.add_row(
        Text("memory", "bold"),
        Text(f"{plan.memory_gb:.2g} of {plan.memory_available_gb:.3g} GB ({sure})"),
    )
    console.print(numbers)
    for note in notes_on(plan):
        console.print()
        console.print(Text(f"note: {note}"))


def _about_images(found: Survey) -> list[str]:
    whole = "a stream, whose number of images is not known" if found.count is None else ""
    classes = f", {counted(found.classes, 'class', 'classes')}" if found.classes else ""
    lines = [f"{found.name}: {whole or f'{found.count:,}'}{classes}"]
    middle = (statistics.median(found.widths), statistics.median(found.heights))
    least = (min(found.widths), min(found.heights))
    most = (max(found.widths), max(found.heights))
    sizes = [f"{width:.0f} x {height:.0f}" for width, height in (middle, least, most)]
    lines.append(f"{sizes[0]} pixels (median), from {sizes[1]} to {sizes[2]}")
    kinds = sorted(found.channels.items(), key=lambda each: -each[1])
    whole_sample = sum(found.channels.values())
    named = [
        CHANNELS.get(kind, f"{kind} channels")
        + ("" if number == whole_sample else f" ({number:,} of {whole_sample:,})")
        for kind, number in kinds
    ]
    lines.append(", ".join(named))
    looked = _among(found.looked_at, found.count)
    unreadable = len(found.unreadable)
    lines.append(
        f"{unreadable} of {looked} cannot be read"
        if unreadable
        else f"no damaged files among {looked}"
    )
    if found.searched:
        looked = _among(found.searched, found.count)
        copies = counted(found.duplicates, "copy", "copies") if found.duplicates else "no copies"
        lines.append(f"{copies}, byte by byte, among {looked}")
    return lines


def _among(part: int, whole: int | None) -> str:
    if whole is None:
        return f"the first {part:,}"
    return f"all {whole:,}" if part >= whole else f"a sample of {part:,}"


def wrapped(words: list[str], width: int) -> str:
    """A command to paste, on lines of at most this width where its words allow it."""
    # An option stays with its value.
    parts, waiting = [], list(map(shlex.quote, words))
    while waiting:
        word = waiting.pop(0)
        if word.startswith("--") and waiting:
            word += f" {waiting.pop(0)}"
        parts.append(word)
    lines, line = [], "  " + parts[0]
    for part in parts[1:]:
        if len(line) + len(part) + 3 > width:
            lines.append(line + " \\")
            line = "      " + part
        else:
            line += f" {part}"
    return "\n".join([*lines, line])
