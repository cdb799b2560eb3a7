"""Names of result files and of the folders of trainings."""

from hpm.evals.contract import COMPARED, RANDOM, TRAINED
from hpm.evals.files import result_file, training_folder
from hpm.evals.finetune import Options


def test_what_changes_no_numbers_changes_no_name(tmp_path):
    """A fine-tuning that stops at its test, at too many unreadable files, is not trained again
    with a larger limit."""
    options = [Options("run", "data", **more) for more in ({}, {"max_unreadable": 0.5})]
    assert len({training_folder("finetune", each, tmp_path, TRAINED) for each in options}) == 1
    assert len({result_file("finetune", each, tmp_path) for each in options}) == 1
    other = Options("run", "data", epochs=3)
    assert training_folder("finetune", other, tmp_path, TRAINED) != training_folder(
        "finetune", options[0], tmp_path, TRAINED
    )


def test_a_run_beside_it_changes_no_training(tmp_path):
    """It is trained in a folder of its own."""
    alone, one, other = (Options("run", "data", compare=run) for run in (None, "runs/b", "runs/c"))
    for backbone in (TRAINED, RANDOM):
        folders = {
            training_folder("finetune", each, tmp_path, backbone) for each in (alone, one, other)
        }
        assert len(folders) == 1
    assert training_folder("finetune", one, tmp_path, COMPARED) != training_folder(
        "finetune", other, tmp_path, COMPARED
    )
