from types import SimpleNamespace

import pytest
import torch

from hpm.core.precision import auto_precision


@pytest.mark.parametrize(
    ("generation", "precision"),
    [(7, "float32"), (8, "bfloat16"), (9, "bfloat16"), (12, "bfloat16")],
)
def test_gpus_that_emulate_bfloat16_compute_in_float32(generation, precision, monkeypatch):
    """A T4 is of generation 7.5; PyTorch's own answer counts the emulation."""
    about = SimpleNamespace(major=generation)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    assert auto_precision(torch.device("cuda", 1)) == precision
    assert auto_precision(torch.device("cpu")) == "float32"
