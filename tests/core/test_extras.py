import sys

import pytest
import torch

import hpm
from hpm.core.extras import _nms, need


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(hpm.UserError, match=r"reading parquet needs pyarrow: pip install 'hpm\[p"):
        need("pyarrow", "parquet", "reading parquet")


def test_torchvision_imports_beside_any_build():
    transforms = need("torchvision.transforms.v2", "finetune", "x")
    assert transforms.RandomHorizontalFlip(1.0)(torch.arange(3).view(1, 1, 3)).tolist() == [
        [[2, 1, 0]]
    ]
    assert need("timm", "finetune", "x") is need("timm", "finetune", "y")


def test_non_maximum_suppression():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30.0]])
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.95).tolist() == [1, 0, 2]
    assert _nms(boxes[:0], torch.empty(0), 0.5).tolist() == []
