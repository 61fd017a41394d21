"""Muon keeps the directions of a gradient, makes them equally large; AdamW: all other weights."""

import sys
from pathlib import Path

import pytest
import torch

from engine import optimizer as optimizer_module
from engine.distributed import Distributed
from engine.optimizer import (
    POLAR_EXPRESS_COEFFICIENTS,
    SAFETY_FACTOR,
    Muon,
    make_optimizer,
    orthogonalize,
    set_lr_multiplier,
)
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.processes import start_job


def tiny_model(n_layer: int = 2) -> GPT:
    return GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=n_layer, n_head=2, n_embd=16))


def train(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        idx = torch.randint(13, (4, 9))
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16)])
def test_singular_values_come_close_to_1_and_singular_vectors_stay(shape):
    random = torch.randn(3, *shape, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(random, full_matrices=False)
    S = torch.logspace(0, -2, U.size(2), dtype=torch.float64)  # from large to small directions
    result = orthogonalize(U * S @ Vh)
    values = U.mT @ result @ Vh.mT  # diagonal if the singular vectors are the same
    assert values.diagonal(dim1=1, dim2=2).min() > 0.8
    assert values.diagonal(dim1=1, dim2=2).max() < 1.2
    off_diagonal = values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))
    assert off_diagonal.abs().max() < 1e-9


def test_the_polynomials_bring_every_singular_value_above_a_thousandth_close_to_1():
    s = torch.logspace(-3, 0, 999, dtype=torch.float64)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        a, b, c = a / SAFETY_FACTOR, b / SAFETY_FACTOR**3, c / SAFETY_FACTOR**5
        s = a * s + b * s**3 + c * s**5
    assert s.min() > 0.8
    assert s.max() < 1.2


def test_a_batched_update_equals_updates_one_at_a_time():
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


def test_momentum_is_nesterovs_with_a_decay_rate_of_0_95(monkeypatch):
    """By hand, for the gradients 1 and 2, with updates that are not orthogonalized."""
    monkeypatch.setattr(optimizer_module, "orthogonalize", lambda matrices: matrices)
    weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0)
    weights = []
    for gradient in (1.0, 2.0):
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        weights.append(weight.item())
    first_mean = 0.05 * 1
    second_mean = 0.95 * first_mean + 0.05 * 2
    first, second = 0.95 * first_mean + 0.05 * 1, 0.95 * second_mean + 0.05 * 2
    assert weights == pytest.approx([-first, -first - second])


def test_a_matrix_whose_gradient_is_zero_does_not_become_nan():
    """As the matrices behind a gate that a changed model.py starts at 0."""
    weight = torch.nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    Muon([weight], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(weight, before)


def test_bfloat16_changes_the_update_only_slightly():
    exact, rounded = (torch.nn.Parameter(torch.zeros(64, 32)) for _ in range(2))
    rounded.grad = exact.grad = torch.randn(64, 32)
    Muon([exact], lr=1.0, weight_decay=0.0).step()
    Muon([rounded], lr=1.0, weight_decay=0.0, dtype=torch.bfloat16).step()
    assert not torch.equal(exact, rounded) and rounded.dtype == torch.float32
    similarity = torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0)
    assert similarity > 0.999


def test_the_first_muon_step_is_lr_times_the_orthogonalized_gradient():
    weight = torch.nn.Parameter(torch.randn(32, 8))
    before = weight.detach().clone()
    weight.grad = torch.randn(32, 8)
    U, _, Vh = torch.linalg.svd(weight.grad, full_matrices=False)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    update = (before * (1 - 0.1 * 0.5) - weight.detach()) / (0.1 * 2)  # sqrt(32 / 8) = 2
    torch.testing.assert_close(update, U @ Vh, rtol=0, atol=0.1)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name):
    model = tiny_model()
    optimizer = make_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3))
    group_of = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in group_of
            group_of[id(parameter)] = group
    assert len(group_of) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        is_matrix = parameter_name.endswith("weight") and ".ln_" not in parameter_name
        assert group["weight_decay"] == (0.3 if is_matrix else 0.0), parameter_name
        uses_muon = name == "muon" and is_matrix and ".h." in parameter_name
        assert ("momentum" in group) == uses_muon, parameter_name
        assert group["initial_lr"] == (0.02 if uses_muon else 5e-3)


def test_the_lr_multiplier_scales_the_peak_of_each_group():
    optimizer = make_optimizer(tiny_model(), TrainConfig(learning_rate=4e-3))
    for multiplier in (0.5, 0.25):  # of the peak, not of the rate before
        set_lr_multiplier(optimizer, multiplier)
        rates = {"momentum" in group: group["lr"] for group in optimizer.param_groups}
        assert rates == {True: 0.02 * multiplier, False: 4e-3 * multiplier}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_training_continues_exactly_after_saving_and_loading(name, tmp_path):
    config = TrainConfig(optimizer=name)
    torch.manual_seed(0)
    model = tiny_model()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    uninterrupted, _ = train(model, make_optimizer(model, config), range(6))
    model = tiny_model()
    model.load_state_dict(start)
    _, optimizer = train(model, make_optimizer(model, config), range(3))
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "state")
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    resumed = tiny_model()
    resumed.load_state_dict(weights)
    optimizer = make_optimizer(resumed, config)
    optimizer.load_state_dict(state)
    train(resumed, optimizer, range(3, 6))
    for parameter_name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[parameter_name]), parameter_name


# --- Several processes ---


def one_layer(dtype: torch.dtype, dist: Distributed | None = None):
    """A model of 4 square matrices, 1 wide and 1 tall one; dtype: of Muon's products."""
    model = tiny_model(n_layer=1).to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return model, make_optimizer(model, TrainConfig(optimizer="muon"), dtype, dist)


def train_and_save(folder: Path, steps: range, dtype: torch.dtype) -> None:
    """Resume from the state that process 0 saved. Save it again, and count orthogonalizations."""
    n_matrices = 0

    def count(matrices):
        nonlocal n_matrices
        n_matrices += len(matrices)
        return orthogonalize(matrices)

    optimizer_module.orthogonalize = count  # this is a process of its own
    with Distributed() as dist:
        model, optimizer = one_layer(dtype, dist)
        weights, state, _ = torch.load(folder / "process_0", weights_only=True)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        torch.distributed.barrier()  # all have read the file
        train(model, optimizer, steps)
        torch.save(
            [model.state_dict(), optimizer.state_dict(), n_matrices],
            folder / f"process_{dist.rank}",
        )


def test_frozen_blocks_are_left_alone():
    model = GPT(GPTConfig(8, 13, n_layer=1, n_head=2, n_embd=16))
    model.transformer.h.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizer = make_optimizer(model, TrainConfig(optimizer="muon"))
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    optimizer.step()
    changed = {name for name, weight in model.named_parameters() if (weight != before[name]).any()}
    assert "transformer.wte.weight" in changed
    assert not any(name.startswith("transformer.h.") for name in changed)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo and fork are for Unix here")
@pytest.mark.parametrize(
    # A library may compute batches of different sizes in different orders. So a weight may differ
    # by rounding: in bfloat16 by about 1% of an entry (up to 1) times the learning rate, 0.02.
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.bfloat16, 1e-3)],
)
def test_any_number_of_processes_resumes_and_gets_the_weights_of_one(dtype, tolerance, tmp_path):
    model, optimizer = train(*one_layer(dtype), range(2))
    torch.save([model.state_dict(), optimizer.state_dict(), 0], tmp_path / "process_0")
    # Per step, process 0 has the first of the square matrices, and the wide and the tall one.
    expected_counts = {2: [4, 2], 4: [3, 1, 1, 1], 3: [4, 1, 1]}
    for i, (n_processes, counts) in enumerate(expected_counts.items(), start=1):
        steps = range(2 * i, 2 * i + 2)
        result = start_job(train_and_save, tmp_path, steps, dtype, n_processes=n_processes).wait()
        assert set(result.exit_codes) == {0}, result.stderr
        train(model, optimizer, steps)
        states = [torch.load(tmp_path / f"process_{rank}") for rank in range(n_processes)]
        assert [state.pop() for state in states] == [2 * count for count in counts]
        expected = [model.state_dict(), optimizer.state_dict()]
        torch.testing.assert_close(states[0], expected, rtol=0, atol=tolerance)
        for state in states[1:]:
            torch.testing.assert_close(state, states[0], rtol=0, atol=0)
