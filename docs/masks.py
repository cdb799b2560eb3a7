"""Draw every mask on a built-in image: `python docs/masks.py`, after `make demo`."""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpm.core.choices import HARD_SHARES
from hpm.data.loader import normalize
from hpm.data.sources import open_source
from hpm.data.transforms import evaluation_view
from hpm.mining.draw import Draw
from hpm.mining.masking import make_mask, num_hidden_patches, to_mask
from hpm.mining.strategies import BUILT_IN
from hpm.mining.teacher import attention, predicted_losses
from hpm.weights.resolve import load

DOCS = Path(__file__).parent
IMAGE, RATIO = 7, 0.75

trained = load(DOCS.parent / "runs" / "demo")
teacher, photos = trained.teacher, open_source("demo").test
assert teacher is not None and photos is not None
encoder = teacher.encoder
height, width = encoder.image_size
view = torch.from_numpy(evaluation_view(photos.open(IMAGE), (height, width), 3))[None]
images = normalize(view, torch.tensor(trained.mean), torch.tensor(trained.std))
with torch.no_grad():
    signals = {"attention": attention(teacher, images)[1]}
    losses = predicted_losses(teacher.predict_loss, images)[1]

names = BUILT_IN
hidden = num_hidden_patches(encoder.num_patches, RATIO)
figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
FigureCanvasAgg(figure)
panels = figure.subplots(3, 6).flatten()
picture = view[0].permute(1, 2, 0).numpy()
shown = {"image": picture, "predicted loss": losses.view(encoder.grid).numpy()}
for name in names:
    share = max(HARD_SHARES.get(name, (0, 0)))
    _, ids = make_mask(
        name,
        Draw(0, 0, torch.tensor([3])),
        encoder.grid,
        hidden,
        signals.get(name, losses),
        int(share * hidden),
    )
    mask = to_mask(ids, encoder.num_patches).view(1, 1, *encoder.grid)
    covered = torch.nn.functional.interpolate(mask.float(), encoder.image_size)[0, 0].bool()
    covered_picture = picture.copy()
    covered_picture[covered.numpy()] = 128
    title = f"{name}\n(share {share:g})" if 0 < share < 1 else name
    shown[title] = covered_picture
for panel in panels:
    panel.set_axis_off()
for panel, (title, content) in zip(panels, shown.items(), strict=False):
    panel.imshow(content, cmap="magma", interpolation="nearest")
    panel.set_title(title, fontsize=9)
figure.savefig(DOCS / "masks.png")
