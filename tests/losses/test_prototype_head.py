from __future__ import annotations

import pytest
import torch

from kdvit.losses import PrototypeHead


def test_scores_are_products_with_an_embedding_of_length_1():
    head = PrototypeHead(3, 5, hidden_dim=4, bottleneck_dim=2)
    for p in head.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(2, 7, 3)
    inside = torch.nn.functional.gelu(head.mlp[2](torch.nn.functional.gelu(head.mlp[0](x))))
    embedding = head.mlp[4](inside)
    embedding = embedding / embedding.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(head(x), embedding @ head.last_layer.weight.T)


def test_names_are_those_of_released_heads():
    names = {name for name, _ in PrototypeHead(3, 5).named_parameters()}
    layers = {f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert names == layers | {"last_layer.weight"}
    assert {name for name, _ in PrototypeHead(3, 5, num_layers=1).named_parameters()} == {
        "mlp.weight",
        "mlp.bias",
        "last_layer.weight",
    }


def test_an_embedding_of_length_0_has_a_gradient():
    head, x = PrototypeHead(3, 5), torch.zeros(1, 3, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_repr_rebuilds(num_layers):
    head = PrototypeHead(3, 5, 4, 2, num_layers)
    twin = eval(repr(head))
    assert {k: x.shape for k, x in twin.state_dict().items()} == {k: x.shape for k, x in head.state_dict().items()}
    assert twin(torch.rand(2, 3)).shape == (2, 5)
