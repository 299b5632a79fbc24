"""Promises of prepacked weights: the same values, no gradient touched, and never those of weights that have changed."""

import copy

import pytest
import torch
from torch import nn

from datamodules.sample import Item, Part
from lightning_modules.encoder.prepacked import prepack


@pytest.fixture
def layers() -> tuple[nn.Module, nn.Module]:
    """A network, and its copy that is prepacked."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32, bias=False))
    packed = copy.deepcopy(plain)
    prepack(packed)
    return plain, packed


def same(plain: nn.Module, packed: nn.Module, *shape: int) -> bool:
    x = torch.randn(*shape, 48)
    with torch.inference_mode():
        return torch.allclose(plain(x), packed(x), atol=1e-6)


def test_values_are_those_of_plain_layers_for_any_shape(layers):
    assert all(same(*layers, *shape) for shape in ((1,), (7,), (1500,), (2, 3), (0,), ()))
    assert any("_forward" in str(layer.forward) for layer in layers[1])


def test_an_encoders_vectors_stay(tiny_encoder, processor):
    inputs = processor([Item((Part("text", text, content=text),)) for text in ("a small red circle", "the cat sat")])
    packed = copy.deepcopy(tiny_encoder).eval()
    prepack(packed)
    with torch.inference_mode():
        torch.testing.assert_close(packed(inputs), tiny_encoder.eval()(inputs), rtol=1e-5, atol=1e-6)
    assert packed.state_dict().keys() == tiny_encoder.state_dict().keys()


def test_what_is_differentiated_or_not_in_fp32_is_computed_as_before(layers):
    plain, packed = layers
    x = torch.randn(5, 48)
    for network in layers:
        network(x).square().sum().backward()
    for one, other in zip(plain.parameters(), packed.parameters(), strict=True):
        assert one.grad is not None
        assert torch.equal(one.grad, other.grad)  # pyright: ignore[reportArgumentType]
    with torch.inference_mode():
        assert torch.equal(plain.double()(x.double()), packed.double()(x.double()))


def test_a_compiled_module_computes_as_before(layers):
    plain, packed = layers
    x = torch.randn(3, 48)
    with torch.inference_mode():
        assert torch.equal(torch.compile(packed, backend="eager")(x), plain(x))


def test_weights_that_change_are_laid_out_anew(layers):
    plain, packed = layers
    assert same(plain, packed, 4)
    with torch.no_grad():
        for network in layers:
            network[0].weight.mul_(-2.0)
    assert same(plain, packed, 4)
    weights = {name: torch.randn_like(value) for name, value in plain.state_dict().items()}
    for network in layers:
        network.load_state_dict(weights)
    assert same(plain, packed, 4)
    weights = {name: torch.randn_like(value) for name, value in weights.items()}
    for network in layers:
        network.load_state_dict(weights, assign=True)
    assert same(plain, packed, 4)


def test_a_copy_has_weights_of_its_own(layers):
    plain, packed = layers
    assert same(plain, packed, 4)
    copied = copy.deepcopy(packed)
    with torch.no_grad():
        packed[0].weight.zero_()
    assert same(plain, copied, 4)
    assert not same(plain, packed, 4)
