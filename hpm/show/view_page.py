"""The page of `hpm view`."""

from __future__ import annotations

from html import escape
from typing import Any

from hpm.show.figures import TITLES
from hpm.show.gallery import MEANING, STYLE
from hpm.show.page import data_block, page

VIEW_STYLE = """
.strip { grid-template-columns: repeat(5, minmax(0, 1fr)); }
@media (max-width: 60rem) { .strip { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
@media (max-width: 30rem) { .strip { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.strip figcaption { white-space: pre-line; }
.strip.heads { grid-template-columns: repeat(auto-fill, minmax(min(7rem, 45%), 1fr)); }
.strip[aria-busy="true"] { opacity: 0.6; }
.map { image-rendering: pixelated; }
#drop {
  display: block; border: 2px dashed var(--line); border-radius: 8px; padding: 1rem;
  text-align: center; background: var(--card); cursor: pointer;
}
#drop.over, #drop:focus-within { border-color: var(--accent); }
#drop input { position: absolute; opacity: 0; width: 1px; height: 1px; }
#examples button { padding: 0; line-height: 0; overflow: hidden; border-width: 2px; }
#examples img { width: 4.5rem; height: auto; }
#settings { display: grid; gap: 0.5rem 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); }
#settings label { display: block; }
#settings input { width: 100%; height: 2.2rem; margin: 0; }
details { margin: 0.75rem 0; }
#settings input[type="number"] { background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 0.2rem 0.5rem; }
output { float: right; font-variant-numeric: tabular-nums; }
#message:empty { display: none; }
h2 { margin: 1rem 0 0.5rem; }
dl { display: grid; grid-template-columns: max-content minmax(0, 60ch); gap: 0.15rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 0.5rem; } }
"""

SCRIPT = """
const about = JSON.parse(document.getElementById("about").textContent);
const part = name => document.getElementById(name);
const sliders = [...document.querySelectorAll("#settings input")];
let image = null;  // {name, example} or {name, file}
// Requests are numbered and sent one by one: an old answer never follows a newer one.
let wanted = 0, done = 0, busy = false;

async function refresh() {
  wanted += 1;
  if (busy || image === null) return;
  busy = true;
  part("panels").setAttribute("aria-busy", "true");
  while (done !== wanted) {
    const number = wanted, asked = image, answer = await ask(asked);
    done = number;
    if (asked === image) render(asked, answer);
  }
  busy = false;
  part("panels").setAttribute("aria-busy", "false");
}

async function ask(asked) {
  const query = new URLSearchParams();
  for (const slider of sliders) query.set(slider.name, slider.value);
  if (asked.file === undefined) query.set("example", asked.example);
  try {
    const response = await fetch("/show?" + query, {method: "POST", body: asked.file});
    return await response.json();
  } catch {
    const gone = "no answer: is hpm view still running, and the file still there?";
    return {error: gone};
  }
}

function render(asked, answer) {
  part("message").textContent = answer.error ? `${asked.name}: ${answer.error}` : "";
  part("name").textContent = answer.error ? "" : asked.name;
  const panels = answer.panels || [], heads = answer.heads || [];
  fill(part("panels"), panels);
  part("attention").hidden = heads.length === 0;
  fill(part("heads"), heads.map((src, i) => (
    {name: `head${i + 1}`, title: `head ${i + 1}`, values: "", src, sharp: true})));
}

// Pictures that are there already are changed, so that nothing flickers.
function fill(strip, panels) {
  while (strip.children.length > panels.length) strip.lastChild.remove();
  panels.forEach((panel, i) => {
    const figure = strip.children[i] || strip.appendChild(newFigure());
    const [picture, caption] = figure.children;
    figure.dataset.panel = panel.name;
    picture.src = panel.src;
    picture.alt = panel.title;
    picture.className = panel.sharp ? "map" : "";
    caption.textContent = panel.values ? `${panel.title}\\n${panel.values}` : panel.title;
  });
}

function newFigure() {
  const figure = document.createElement("figure");
  figure.append(document.createElement("img"), document.createElement("figcaption"));
  return figure;
}

function choose(chosen) {
  image = chosen;
  [...part("examples").children].forEach((button, i) =>
    button.setAttribute("aria-pressed", String(chosen.example === i)));
  refresh();
}

function chooseFile(file) {
  if (!file) return;
  const most = Math.floor(about.limit / 2 ** 20);
  if (file.size <= about.limit) return choose({name: file.name, file});
  // Whatever is being computed for the image before has no place any more.
  image = {name: file.name};
  render(image, {error: `this file has more than ${most} MB`});
  image = null;
}

about.examples.forEach((example, i) => {
  const button = document.createElement("button"), thumbnail = document.createElement("img");
  thumbnail.src = example.src;
  thumbnail.alt = example.name;
  button.title = example.name;
  button.append(thumbnail);
  button.addEventListener("click", () => choose({name: example.name, example: i}));
  part("examples").append(button);
});
for (const slider of sliders) {
  const output = document.querySelector(`output[for="${slider.id}"]`);
  const tell = () => { if (output) output.textContent = Math.round(100 * slider.value) + " %"; };
  slider.addEventListener("input", () => { tell(); refresh(); });
  tell();
}
part("file").addEventListener("change", event => {
  chooseFile(event.target.files[0]);
  event.target.value = "";  // so that the same file can be picked again
});
// A file that misses the frame by a little would replace the page.
document.addEventListener("dragover", event => {
  event.preventDefault();
  part("drop").classList.add("over");
});
document.addEventListener("dragleave", event => {
  if (!event.relatedTarget) part("drop").classList.remove("over");
});
document.addEventListener("drop", event => {
  event.preventDefault();
  part("drop").classList.remove("over");
  chooseFile(event.dataTransfer.files[0]);
});
if (about.examples.length) choose({name: about.examples[0].name, example: 0});
"""


def view_page(about: dict[str, Any]) -> str:
    """The page for a model, as `Viewer.page` describes it."""
    lines = [f"The model takes {about['input']}; images are cropped to their centre."]
    if about["features_only"]:
        lines.append("These weights show features only.")
    if about["not_shown"]:
        lines.append(f"{about['not_shown'][:1].upper()}{about['not_shown'][1:]}.")
    legend = "".join(f"<dt>{TITLES[name]}</dt><dd>{MEANING[name]}</dd>" for name in about["panels"])
    body = f"""<h1>{escape(about["title"])}</h1>
{"".join(f"<p>{escape(line)}</p>" for line in lines)}
<noscript><p class="warning">This page needs JavaScript.</p></noscript>
<label id="drop">Drop an image here, or click to pick one. It stays on this machine.
<input type="file" id="file" aria-label="pick an image"></label>
<div class="row" id="examples"></div>
{_settings(about)}
<p id="message" class="warning" role="alert"></p>
<h2 id="name"></h2>
<div class="strip" id="panels" aria-busy="false"></div>
<details id="attention" hidden><summary>attention, head by head</summary>
<div class="strip heads" id="heads"></div></details>
<details><summary>What the panels show</summary><dl>{legend}</dl>
<p class="faint">Actual loss: the mean over {about["num_masks"]} random masks. Colours of the
features: of this image alone, so that two images cannot be compared by them.</p></details>
{data_block("about", about)}"""
    return page(f"hpm view: {about['title']}", body, SCRIPT, STYLE + VIEW_STYLE, fetches=True)


def _settings(about: dict[str, Any]) -> str:
    """Sliders for what has an effect; none for a backbone alone."""
    if about["features_only"]:
        return '<div id="settings" hidden></div>'
    low = min(0.01, about["most_hidden"])
    sliders = _slider("mask_ratio", "share hidden", about["mask_ratio"], low, about["most_hidden"])
    if about["mines"]:
        sliders += _slider("hard_share", "of these, the hardest", about["hard_share"], 0, 1)
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
