"""Evaluations are read from a run folder under names that tell their data apart."""

from hpm.evals.saved import Row, data_names


def names(*paths):
    return list(data_names([Row("linear", "", "trained", {}, paths=(p,)) for p in paths]).values())


def test_data_is_named_by_as_much_of_its_path_as_tells_it_apart():
    assert names("/data/flowers", "pets") == ["flowers", "pets"]
    assert names("/data/cub/images", "/data/pets/images") == ["cub/images", "pets/images"]
    assert names("/a/x/train.parquet", "/b/x/train.parquet", "/a/x/val.parquet") == [
        "a/x/train.parquet",
        "b/x/train.parquet",
        "val.parquet",
    ]


def test_a_path_that_ends_in_another_may_be_the_same_data():
    assert names("flowers", "/data/flowers") == ["flowers", "flowers"]
    assert names("images", "cub/images", "pets/images") == ["images", "cub/images", "pets/images"]
