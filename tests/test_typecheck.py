"""The tests check types and shapes at run time."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from hpm.core.errors import counted
from hpm.data.loader import EvaluationViews
from hpm.mining.losses import ranking_accuracy


def test_shapes_that_do_not_fit_each_other():
    """Even where a function uses another name for a shape."""
    with pytest.raises(TypeCheckError):
        ranking_accuracy(torch.zeros(2, 3), torch.zeros(2, 4))


def test_types_of_arguments_results_and_fields():
    for wrong in (lambda: counted("one", "image"), lambda: EvaluationViews("wide", 3)):
        with pytest.raises(BeartypeCallHintViolation):
            wrong()
