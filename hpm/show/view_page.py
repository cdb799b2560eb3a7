"""The page of `hpm view`."""

from __future__ import annotations

from html import escape
from typing import Any

from hpm.show.gallery import legend
from hpm.show.page import asset, by_device, data_block, page
from hpm.show.scale import bar_style


def view_page(about: dict[str, Any]) -> str:
    """The page for a model. about: see `Viewer.page`."""
    lines = [f"The model takes {about['input']}; {about['kind']}s are cropped to their centre."]
    if about["features_only"]:
        lines.append("These weights show features only.")
    if about["not_shown"]:
        lines.append(f"{about['not_shown'][:1].upper()}{about['not_shown'][1:]}.")
    meanings = legend(about["panels"], clips=about["kind"] == "video")
    article = {"image": "an image", "video": "a video"}[about["kind"]]
    pick = by_device(f"Drop {article} here, or click to pick one.", f"Touch to pick {article}.")
    body = f"""<h1>{escape(about["title"])}</h1>
{"".join(f"<p>{escape(line)}</p>" for line in lines)}
<noscript><p class="warning">This page needs JavaScript.</p></noscript>
<label id="drop">{pick} It stays on this machine.
<input type="file" id="file" aria-label="pick {article}"></label>
<div class="row" id="examples"></div>
{_settings(about)}
<p id="message" class="warning" role="alert"></p>
<div class="row"><h2 id="name"></h2>
<button type="button" id="overlay" aria-pressed="false">maps over the {about["kind"]}</button></div>
<div class="strip" id="panels" aria-busy="false"></div>
<details id="attention" hidden><summary>attention, head by head</summary>
<div class="strip heads" id="heads"></div></details>
<details><summary>What the panels show</summary><dl>{meanings}</dl>
<p class="faint">Actual loss: the mean over {about["num_masks"]} random masks. Colours of the
features: of this {about["kind"]} alone, so that two cannot be compared by them.</p></details>
{data_block("about", about)}"""
    script, style = (
        f"\n{asset('view.js')}\n",
        f"{asset('strip.css')}\n{asset('view.css')}\n{bar_style()}",
    )
    return page(f"hpm view: {about['title']}", body, script, style, fetches=True)


def _settings(about: dict[str, Any]) -> str:
    """Sliders for the settings that have an effect; none for a backbone."""
    if about["features_only"]:
        return '<div id="settings" hidden></div>'
    low = min(0.01, about["most_hidden"])
    sliders = _slider("mask_ratio", "share hidden", about["mask_ratio"], low, about["most_hidden"])
    if mined := about["mined"]:
        sliders += _slider("hard_share", f"of these, {mined}", about["hard_share"], 0, 1)
    sliders += (
        '<div><label for="seed">seed of the masks</label>'
        '<input type="number" id="seed" name="seed" min="0" max="2147483647" value="0"></div>'
    )
    return f'<div id="settings">{sliders}</div>'


def _slider(name: str, label: str, value: float, low: float, high: float) -> str:
    return (
        f'<div><label for="{name}">{label} <output for="{name}"></output></label>'
        f'<input type="range" id="{name}" name="{name}" min="{low}" max="{high}" step="0.01" '
        f'value="{value}"></div>'
    )
