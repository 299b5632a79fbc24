"""What the guard takes for finite."""

import pytest
import torch

from lightning_modules.guard import all_finite


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, True), (3e38, True), (torch.inf, False), (-torch.inf, False), (torch.nan, False)]
)
def test_a_gradient_is_finite_when_every_value_is(value, expected):
    """Also where the squares of its values are not: 3e38 is near fp32's largest."""
    gradients = [torch.ones(3), torch.empty(0), torch.ones(2, 2)]
    gradients[2][1, 0] = value
    assert all_finite(gradients) is expected


def test_no_gradient_is_finite():
    assert all_finite([])
    assert all_finite([torch.empty(0)])
