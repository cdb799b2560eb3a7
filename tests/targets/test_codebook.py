import pytest
import torch
from helpers import TINY, assert_refused, run_here
from hypothesis import given
from hypothesis import strategies as st

import hpm
from hpm.targets.codebook import kmeans, load_codebook, nearest_code


@given(st.integers(1, 50), st.integers(1, 8), st.integers(0, 100))
def test_the_nearest_code(count, codes, seed):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 3, generator=generator)
    centres = torch.randn(codes, 3, generator=generator)
    ids, distances = nearest_code(vectors, centres)
    expected = torch.cdist(vectors.double(), centres.double()).square()
    torch.testing.assert_close(distances.double(), expected.min(1).values, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(expected.gather(1, ids[:, None])[:, 0], expected.min(1).values)


def test_inertia_is_that_of_scikit_learn():
    """Blobs that lie apart, where every good start finds the same: to 1 %. Noise: to 5 %."""
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(8, 5, generator=generator)
    blobs = centres.repeat(100, 1) + torch.randn(800, 5, generator=generator)
    noise = torch.rand(1000, 4, generator=generator)
    for vectors, tolerance in ((blobs, 0.01), (noise, 0.05)):
        expected = KMeans(8, n_init=1, random_state=0).fit(vectors.numpy()).inertia_
        codes, inertia = kmeans(vectors, 8, 100, torch.Generator().manual_seed(1))
        assert codes.shape == (8, vectors.shape[1])
        assert inertia <= expected * (1 + tolerance)
        assert inertia == pytest.approx(nearest_code(vectors, codes)[1].sum().item(), rel=1e-4)


def test_more_codes_than_different_vectors():
    vectors = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    codes, inertia = kmeans(vectors, 3, 10, torch.Generator().manual_seed(0))
    assert inertia == 0 and codes.isfinite().all()


def test_tokenize_and_train_on_tokens(image_folder, tmp_path):
    file = tmp_path / "codebook.safetensors"
    size = ["--image-size=16", "--patch-size=4"]
    result = run_here("tokenize", image_folder, "--out", file, "--codes=12", *size)
    assert result.returncode == 0, result.stderr
    assert "mean squared distance" in result.stdout and f"--codebook {file}" in result.stdout
    before = file.read_bytes()
    again = run_here("tokenize", image_folder, "--out", file, "--codes=8", *size)
    assert_refused(again, "codebook.safetensors exists", "another --out")
    assert file.read_bytes() == before
    codebook = load_codebook(str(file))
    assert codebook.codes.shape == (12, 48) and codebook.codes.mean(1).abs().max() < 1e-5
    run = hpm.pretrain(
        data=str(image_folder),
        out=str(tmp_path / "run"),
        target="tokens",
        codebook=str(file),
        **TINY,
    )
    losses = [
        line["reconstruction_loss"] for line in run.metrics() if "reconstruction_loss" in line
    ]
    assert losses[0] == pytest.approx(torch.tensor(12.0).log().item(), rel=0.4)
    with pytest.raises(hpm.UserError, match="is of patches of .4, 4. pixels"):
        hpm.pretrain(
            data=str(image_folder),
            out=str(tmp_path / "other"),
            target="tokens",
            codebook=str(file),
            **(TINY | {"patch_size": 8}),
        )
    with pytest.raises(hpm.UserError, match="is no codebook"):
        hpm.pretrain(
            data=str(image_folder),
            out=str(tmp_path / "other"),
            target="tokens",
            codebook=str(run.backbone),
            **TINY,
        )


def test_bad_tokenizing(image_folder, tmp_path):
    size = ["--image-size=16", "--patch-size=8", "--out", tmp_path / "c.safetensors"]
    assert_refused(run_here("tokenize", image_folder, "--codes=9999", *size), "patches (192)")
    assert_refused(run_here("tokenize", image_folder, "--codes=0", *size), "codes is 0")
    assert_refused(run_here("tokenize", tmp_path / "none", *size), "no such folder")
