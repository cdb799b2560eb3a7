"""Names of result files and of the folders of trainings."""

from hpm.evals.files import result_file, training_folder
from hpm.evals.finetune import Options


def test_what_changes_no_numbers_changes_no_name(tmp_path):
    """A fine-tuning that stops at its test, at too many unreadable files, is not trained again
    with a larger limit."""
    options = [Options("run", "data", **more) for more in ({}, {"max_unreadable": 0.5})]
    assert len({training_folder("finetune", each, tmp_path) for each in options}) == 1
    assert len({result_file("finetune", each, tmp_path) for each in options}) == 1
    other = Options("run", "data", epochs=3)
    assert training_folder("finetune", other, tmp_path) != training_folder(
        "finetune", options[0], tmp_path
    )
