import pytest
import torch
from torch.nn import functional as F

from hpm.models import linear as module
from hpm.models.linear import ONEDNN, Linear, OneDnnLinear, linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (2, 3, 7, 5), (0, 5)])
def test_values_and_gradients_are_those_of_float64(shape, bias):
    torch.manual_seed(0)
    x, weight, b = torch.randn(shape), torch.randn(6, 5), torch.randn(6) if bias else None
    single = [t if t is None else t.clone().requires_grad_() for t in (x, weight, b)]
    double = [t if t is None else t.double().requires_grad_() for t in (x, weight, b)]
    ours, exact = linear(*single), F.linear(*double)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)
    weights = torch.randn(exact.shape)
    (ours * weights).sum().backward()
    (exact * weights).sum().backward()
    for a, b in zip(single, double):
        if a is not None:
            torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_views_and_part_of_the_gradients():
    torch.manual_seed(0)
    tokens, weight = torch.randn(4, 9, 8), torch.randn(12, 8)
    x = tokens[:, -3:]  # not contiguous, as of a last block
    frozen = weight[4:]
    torch.testing.assert_close(linear(x, frozen, None), F.linear(x, frozen), atol=1e-5, rtol=1e-5)
    leaf = tokens.clone().requires_grad_()
    linear(leaf[:, -3:].transpose(0, 1), frozen, None).sum().backward()
    other = tokens.clone().requires_grad_()
    F.linear(other[:, -3:].transpose(0, 1), frozen).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, atol=1e-5, rtol=1e-5)


def test_other_types_and_the_compiler_take_the_plain_way():
    layer = Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(2, 4).double()).dtype == torch.float64
    graph = torch.export.export(Linear(4, 4).eval(), (torch.randn(2, 4),)).graph
    assert not any("mkldnn" in str(node.target) for node in graph.nodes)


def test_this_build_has_the_kernel():
    """Where a future PyTorch has it no more, the plain way still works; but let us know."""
    assert ONEDNN is not None


def test_without_the_kernel_the_plain_way_is_taken(monkeypatch):
    """Bitwise `F.linear`, forward and backward; the kernel's own function is never entered."""
    torch.manual_seed(0)
    x, layer = torch.randn(3, 7, 5, requires_grad=True), Linear(5, 6)
    by_kernel = layer(x)
    assert type(by_kernel.grad_fn).__name__ == "OneDnnLinearBackward"
    monkeypatch.setattr(module, "ONEDNN", None)
    monkeypatch.setattr(OneDnnLinear, "apply", lambda *_: pytest.fail("the kernel was called"))
    plain = layer(x)
    assert torch.equal(plain, F.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(plain, by_kernel, atol=1e-5, rtol=1e-5)
    gradients = torch.autograd.grad(plain.square().sum(), [x, layer.weight, layer.bias])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("build", ["without oneDNN", "without the operator"])
def test_a_build_without_the_kernel(build, monkeypatch):
    if build == "without oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert module._onednn() is None
