import pytest
import torch

from hpm.show.figures import picture
from hpm.show.moments import keep_moment, measured_steps, read_moments
from hpm.weights.resolve import load


@pytest.fixture(scope="module")
def shown(finished_run):
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    return picture(load(finished_run.folder), images, torch.arange(2), hard_share=0.5)


def test_a_moment_survives(shown, tmp_path):
    keep_moment(shown, tmp_path, 7)
    (moment,) = read_moments(tmp_path, 7)
    assert moment.step == 7
    assert torch.equal(torch.from_numpy(moment.images), shown.images.permute(0, 2, 3, 1))
    assert moment.mask.reshape(2, -1).tolist() == shown.mask.tolist()
    assert moment.actual.shape == moment.predicted.shape == (2, 4, 4)
    assert moment.reconstruction.shape == (2, 16, 16, 3)


def test_ten_are_read_the_first_and_last_among_them(shown, tmp_path):
    for step in range(0, 50, 2):
        keep_moment(shown, tmp_path, step)
    steps = [moment.step for moment in read_moments(tmp_path, 45)]
    assert len(steps) == 10 and steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 44), "those after step 44 are of a training taken back"


def test_only_our_files_are_listed(shown, tmp_path):
    keep_moment(shown, tmp_path, 3)
    (tmp_path / "step_copy.safetensors").write_bytes(b"not ours")
    assert measured_steps(tmp_path, 1_000_000) == [3]
    assert measured_steps(tmp_path, 2) == []


def test_a_damaged_one_is_left_out(shown, tmp_path):
    for step in (0, 2, 4):
        keep_moment(shown, tmp_path, step)
    path = tmp_path / "step_00000002.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert [moment.step for moment in read_moments(tmp_path, 4)] == [0, 4]
    assert read_moments(tmp_path / "nowhere", 0) == []


def test_large_images_are_reduced(shown, tmp_path):
    shown.images = torch.randint(0, 256, (2, 1, 192, 256), dtype=torch.uint8)
    shown.reconstruction = None
    keep_moment(shown, tmp_path, 1)
    (moment,) = read_moments(tmp_path, 1)
    assert moment.images.shape == (2, 96, 128, 3) and moment.reconstruction is None
