import sys

import pytest
import torch

import hpm
from hpm.core.extras import need


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        hpm.UserError, match=r"reading parquet needs pyarrow: pip install 'hpm-vision\[p"
    ):
        need("pyarrow", "parquet", "reading parquet")


def test_torchvision_imports_beside_any_build():
    transforms = need("torchvision.transforms.v2", "finetune", "x")
    assert transforms.RandomHorizontalFlip(1.0)(torch.arange(3).view(1, 1, 3)).tolist() == [
        [[2, 1, 0]]
    ]
    assert need("timm", "finetune", "x") is need("timm", "finetune", "y")
