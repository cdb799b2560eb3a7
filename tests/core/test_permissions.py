"""Permissions of what is written, and what is said where they are missing."""

import os
import shutil

import pytest
import torch
from helpers import assert_refused, run_here, tiny_arguments, write_images

import hpm
import hpm.data.sources
from hpm.core.files import read_tensors, write_tensors, write_text


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_permissions_that_the_umask_leaves(umask, tmp_path):
    before = os.umask(umask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {})
        write_text(tmp_path / "a.json", "{}")
        write_text(tmp_path / "a.json", "{ }")  # over the one before it
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask, file


def test_every_file_of_a_run_is_readable_by_others(finished_run):
    umask = os.umask(0)
    os.umask(umask)
    files = [file for file in finished_run.folder.rglob("*") if file.is_file()]
    assert files and all(file.stat().st_mode & 0o777 == 0o666 & ~umask for file in files)


def test_another_user_reads_permission_denied(open_folder, another_user):
    weights = open_folder / "a.safetensors"
    write_tensors(weights, {"x": torch.zeros(2)}, {})
    torch.save({"x": torch.zeros(2)}, open_folder / "a.pth")
    (open_folder / "private").mkdir(mode=0o700)
    for file in open_folder.glob("a.*"):
        file.chmod(0o600)
    with another_user():
        for file in (weights, open_folder / "a.pth"):
            with pytest.raises(hpm.UserError, match=f"{file}: permission denied"):
                read_tensors(file)
        for path in (open_folder / "private", open_folder / "private" / "run"):
            result = run_here("eval", "knn", path, "demo")
            assert_refused(result, "private", "ermission denied")
        result = run_here(
            "pretrain", open_folder / "private", "--out", open_folder / "run", *tiny_arguments()
        )
        assert_refused(result, "private", "ermission denied")
    with pytest.raises(hpm.UserError, match="no such file"):
        read_tensors(open_folder / "b.safetensors")


def test_a_folder_of_images_that_may_not_be_entered_is_named(open_folder, another_user, capsys):
    write_images(open_folder, classes=2, per_class=3)
    (open_folder / "class_1").chmod(0o700)
    with another_user():
        assert len(hpm.data.sources.open_source(str(open_folder)).train) == 3
    assert f"{open_folder / 'class_1'}: permission denied, passed over" in capsys.readouterr().err


def test_a_run_folder_that_cannot_be_made(open_folder, image_folder, another_user):
    with another_user():
        result = run_here("pretrain", "demo", "--out", open_folder / "run", *tiny_arguments())
    assert_refused(result, f"{open_folder / 'run'}", "ermission denied")


OPTIONS = {"workers": 0, "k": (1,), "baselines": False, "device": "cpu"}


@pytest.fixture
def run_of_all(finished_run, open_folder):
    """A copy of the run that everyone may read."""
    folder = open_folder / "run"
    return shutil.copytree(finished_run.folder, folder, ignore=shutil.ignore_patterns("evals"))


def test_an_evaluation_that_cannot_be_written_is_printed(run_of_all, image_folder):
    """A file stands where the folder would be: nobody, not even root, can write there."""
    (run_of_all / "evals").write_text("")
    options = ("--workers=0", "--k=[1]", "--baselines=false", "--device=cpu")
    result = run_here("eval", "knn", run_of_all, image_folder, *options)
    assert "top-1 of knn" in result.stdout and "k = 1" in result.stdout
    assert_refused(result, f"{run_of_all / 'evals'}", "could not be written", "--out")


def test_evaluating_the_run_of_another_user(run_of_all, open_folder, another_user):
    images, said = write_images(open_folder / "images", classes=2, per_class=6), []
    with another_user():
        result = hpm.evaluate("knn", str(run_of_all), str(images), said.append, **OPTIONS)
    assert result.file is None and result.values
    assert said == [result.unwritable] and "permission denied; --out" in said[0]
