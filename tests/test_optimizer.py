"""Muon: of a gradient it keeps the directions and makes them equally long."""

import pytest
import torch

from model import GPT, GPTConfig
from train import TrainConfig
from training.optimizer import MARGIN, QUINTICS, Muon, make_optimizer, orthogonalise


def tiny_model(**changes) -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16, **changes))


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    random = torch.randn(3, *shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    S = torch.logspace(0, -2, U.size(2), dtype=torch.float64)  # from long directions to short ones
    result = orthogonalise(U * S @ Vh)
    lengths = U.mT @ result @ Vh.mT  # diagonal if the directions are the same
    assert lengths.diagonal(dim1=1, dim2=2).min() > 0.8
    assert lengths.diagonal(dim1=1, dim2=2).max() < 1.2
    off_diagonal = lengths - torch.diag_embed(lengths.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-9


def test_the_quintics_bring_every_length_from_a_thousandth_on_near_one():
    s = torch.logspace(-3, 0, 999, dtype=torch.float64)
    for a, b, c in QUINTICS:
        a, b, c = a / MARGIN, b / MARGIN**3, c / MARGIN**5
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.8
    assert s.max() < 1.2


def test_a_matrix_moves_alike_alone_and_in_company():
    together = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(3)]
    together.append(torch.nn.Parameter(torch.randn(48, 16)))  # queries, keys, values
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    alone[3:] = [torch.nn.Parameter(part.clone()) for part in alone[3].detach().chunk(3)]
    optimizers = [Muon(together, lr=0.1, weight_decay=0.2)]
    optimizers += [Muon([p], lr=0.1, weight_decay=0.2) for p in alone]
    for _ in range(3):
        gradients = [torch.randn_like(p) for p in together]
        for parameter, gradient in zip(together, gradients, strict=True):
            parameter.grad = gradient
        parts = [*gradients[:3], *gradients[3].chunk(3)]
        for parameter, gradient in zip(alone, parts, strict=True):
            parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.cat([*together]), torch.cat([*alone]), rtol=1e-5, atol=1e-5)


def test_directions_may_be_found_in_bfloat16_and_change_little():
    exact, brief = (torch.nn.Parameter(torch.zeros(64, 32)) for _ in range(2))
    brief.grad = exact.grad = torch.randn(64, 32)
    Muon([exact], lr=1.0, weight_decay=0.0).step()
    Muon([brief], lr=1.0, weight_decay=0.0, precision=torch.bfloat16).step()
    assert not torch.equal(exact, brief) and brief.dtype == torch.float32
    alike = torch.nn.functional.cosine_similarity(exact.flatten(), brief.flatten(), dim=0)
    assert alike > 0.999


def test_the_first_step_is_the_learning_rate_along_the_orthogonal_gradient():
    weight = torch.nn.Parameter(torch.randn(32, 8))
    before = weight.detach().clone()
    weight.grad = torch.randn(32, 8)
    U, _, Vh = torch.linalg.svd(weight.grad, full_matrices=False)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    step = (before * (1 - 0.1 * 0.5) - weight.detach()) / (0.1 * 2)  # sqrt(32 / 8) = 2
    torch.testing.assert_close(step, U @ Vh, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name):
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    owners = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in owners
            owners[id(parameter)] = group
    assert len(owners) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        group = owners[id(parameter)]
        is_matrix = parameter_name.endswith("weight") and ".ln_" not in parameter_name
        assert group["weight_decay"] == (0.3 if is_matrix else 0.0), parameter_name
        by_muon = name == "muon" and is_matrix and ".h." in parameter_name
        assert ("momentum" in group) == by_muon, parameter_name
        assert group["peak_lr"] == (0.02 if by_muon else 5e-3)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_state_survives_a_save_bit_by_bit(name, tmp_path):
    def trained(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            idx = torch.randint(13, (4, 9))
            model(idx[:, :-1], idx[:, 1:])[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    config = TrainConfig(optimizer=name)
    torch.manual_seed(0)
    model = tiny_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, _ = trained(model, make_optimizer(model, config), range(6))
    model = tiny_model()
    model.load_state_dict(start)
    _, optimizer = trained(model, make_optimizer(model, config), range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    again = tiny_model()
    again.load_state_dict(weights)
    optimizer = make_optimizer(again, config)
    optimizer.load_state_dict(state)
    trained(again, optimizer, range(3, 6))
    for parameter_name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[parameter_name]), parameter_name
