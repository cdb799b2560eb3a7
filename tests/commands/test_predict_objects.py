import json

import numpy as np
import pytest
import torch
from detecting import tiny_model
from PIL import Image

import hpm
from hpm.commands.predict_objects import FILE, write_objects
from hpm.core.files import new_file
from hpm.data.detection import has_masks, objects, open_detection
from hpm.data.joint import WholeImages
from hpm.data.sources import FileSource


@pytest.mark.parametrize("masks", [True, False])
def test_results_can_be_opened_as_a_data_set(tmp_path, masks):
    rng = np.random.default_rng(0)
    paths = [tmp_path / "images" / name for name in ("b/one.png", "two.png")]
    for path, size in zip(paths, [(40, 60), (70, 30)]):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    model = tiny_model(masks=masks, proposals=10, score_threshold=0.0)
    source = FileSource("images", paths, root=tmp_path / "images")
    views = WholeImages(3, size=64, longest=64)
    images = [(index, *views(source, (0, index))) for index in range(2)]
    write_objects(model, source, images, tmp_path / "annotations.json")
    content = json.loads((tmp_path / "annotations.json").read_text())
    names = [(image["file_name"], image["height"]) for image in content["images"]]
    assert names == [("b/one.png", 40), ("two.png", 70)]
    assert content["categories"] == [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    assert {"image_id", "category_id", "bbox", "score"} <= set(content["annotations"][0])

    if masks:  # those without a pixel are no objects that a data set may have
        kept = [a for a in content["annotations"] if a["area"] > 0]
        (tmp_path / "annotations.json").write_text(json.dumps(content | {"annotations": kept}))
    train = open_detection(str(tmp_path)).train
    assert has_masks(train) == masks and train.classes == model.classes
    found, opened = model.predict(paths[0]), objects(train, 0)
    assert len(opened) > 0
    expected = found.boxes if not masks else found.boxes[found.masks.flatten(1).any(1)]
    torch.testing.assert_close(opened.boxes, expected, atol=1e-3, rtol=1e-4)


def test_nothing_is_overwritten(tmp_path):
    assert new_file(tmp_path / "out", FILE) == tmp_path / "out" / "results.json"
    file = tmp_path / "found.json"
    assert new_file(file, FILE) == file
    file.write_text("{}")
    with pytest.raises(hpm.UserError, match="exists"):
        new_file(file, FILE)
