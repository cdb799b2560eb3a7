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
    {name: `head${i + 1}`, title: `head ${i + 1}`, scale: [], overlaid: true, src, sharp: true})));
  const photo = panels.find(panel => panel.name === "image");
  document.body.style.setProperty("--photo", photo ? `url(${photo.src})` : "");
}

// Pictures that are there already are changed, so that nothing flickers.
function fill(strip, panels) {
  while (strip.children.length > panels.length) strip.lastChild.remove();
  panels.forEach((panel, i) => {
    const figure = strip.children[i] || strip.appendChild(newFigure());
    const [frame, caption] = figure.children, picture = frame.firstChild;
    figure.dataset.panel = panel.name;
    picture.src = panel.src;
    picture.alt = panel.title;
    picture.className = panel.sharp ? "map" : "";
    frame.className = panel.overlaid ? "over" : "";
    caption.replaceChildren(panel.title, ...bar(panel.scale));
  });
}

function newFigure() {
  const figure = document.createElement("figure"), frame = document.createElement("span");
  frame.append(document.createElement("img"));
  figure.append(frame, document.createElement("figcaption"));
  return figure;
}

function bar(scale) {
  if (!scale.length) return [];
  const line = document.createElement("span");
  line.className = "bar";
  line.append(scale[0], document.createElement("i"), scale[1]);
  return [line];
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
part("overlay").addEventListener("click", () => {
  const on = document.body.classList.toggle("overlay");
  part("overlay").setAttribute("aria-pressed", String(on));
});
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
