"""SGD, AdamW and Muon: three ways to turn a gradient into a step.

    python lessons/optimizers.py                # about ten seconds

Each function takes the weights w, their gradient g and a state, and returns the new weights.
Shapes: the example of part 3 has one matrix of 7 rows and 4 columns.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# --- Three optimizers ---


def sgd(w: Tensor, g: Tensor, state: dict, lr: float) -> Tensor:
    """Stochastic gradient descent: a step against the gradient."""
    return w - lr * g


def adamw(
    w: Tensor,
    g: Tensor,
    state: dict,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    """AdamW (Loshchilov and Hutter 2019): each weight has a step size of its own."""
    step = state["step"] = state.get("step", 0) + 1
    # The gradient of one batch is noisy. The mean of about the last 10 is more reliable.
    m = state["m"] = beta1 * state.get("m", torch.zeros_like(w)) + (1 - beta1) * g
    # The mean of the squares says how large the gradients of this weight usually are. m is divided
    # by its root: so weights with small gradients take steps as large as weights with large ones.
    v = state["v"] = beta2 * state.get("v", torch.zeros_like(w)) + (1 - beta2) * g**2
    # m and v start at 0, so they are too small at first: after step 1, m is only 0.1 g.
    # This division corrects it: m / (1 - 0.9) = g.
    m, v = m / (1 - beta1**step), v / (1 - beta2**step)
    # Weight decay pulls each weight towards 0. A weight stays large only if the gradients push it
    # up again and again.
    # (Adam, without W, adds the decay to the gradient. Then it is divided by the root of v, too.)
    w = w - lr * weight_decay * w
    return w - lr * m / (v.sqrt() + eps)  # eps: no division by 0


def muon(
    w: Tensor,
    g: Tensor,
    state: dict,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
) -> Tensor:
    """Muon (Jordan et al. 2024), for matrices: each direction takes a step of the same size.

    A direction is a row of V^T in the singular value decomposition U S V^T (glossary, README.md).
    A step along the gradient moves the weights along each direction in proportion to its singular
    value in S. Muon sets all singular values to 1.
    """
    # A running mean, as in AdamW.
    m = state["m"] = momentum * state.get("m", torch.zeros_like(w)) + (1 - momentum) * g
    # Nesterov momentum: the newest gradient counts a little more.
    update = momentum * m + (1 - momentum) * g
    # The numbers in matrix @ x should be as large as the numbers in x. A sum of n random terms is
    # about sqrt(n) times as large as one term. In an orthogonalized matrix, each column (each row
    # of a wide matrix) has length 1: 4 numbers of about 0.5, or 16 numbers of about 0.25.
    #     4 x 4    numbers of about 0.5,  sums of 4 terms:   sqrt(4) * 0.5 = 1
    #     16 x 4   numbers of about 0.25, sums of 4 terms:   sqrt(4) * 0.25 = 0.5
    #     4 x 16   numbers of about 0.25, sums of 16 terms:  sqrt(16) * 0.25 = 1
    # So a tall matrix needs a factor: sqrt(16 / 4) = 2.
    size = max(1, w.size(0) / w.size(1)) ** 0.5
    return w - lr * weight_decay * w - lr * size * orthogonalize(update)


def orthogonalize(matrix: Tensor) -> Tensor:
    """U S V^T -> U V^T. The same directions, but all singular values are 1."""
    U, _, Vt = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vt


# --- One step ---


def show_first_step() -> None:
    g = torch.tensor([[1000.0, -0.001]])
    step = adamw(torch.zeros(1, 2), g, {}, lr=0.1)  # from w = 0, so the new weights are the step
    print("1. The first step of AdamW")
    print("   gradients     1000   and  -0.001")
    print("   steps         " + "   and   ".join(f"{number:.1f}" for number in step[0].tolist()))
    print("""   Both steps have the size lr = 0.1. After one batch, m / sqrt(v) = g / |g|:
   only the sign is left, even of a gradient that is mere noise. So the first
   steps are the least reliable. This is why the learning rate starts small and
   rises: the warmup.""")


def show_orthogonalize() -> None:
    g = torch.tensor([[3.0, 1.0], [2.0, 1.0]])
    print("\n2. What Muon does to a gradient")
    for name, matrix in (("gradient", g), ("orthogonalized", orthogonalize(g))):
        lengths = ", ".join(f"{s:.2f}" for s in torch.linalg.svdvals(matrix).tolist())
        rows = "   ".join(f"{a:5.2f} {b:5.2f}" for a, b in matrix.tolist())
        print(f"   {name:14}  rows {rows}    singular values {lengths}")
    print("""   Both rows of this gradient point to almost the same direction. A step along
   the gradient learns this direction 15 times as fast (3.86 / 0.26) as the
   direction at right angles to it. After orthogonalization, both are equally
   fast.""")


# --- Many steps ---

LENGTHS = [1.0, 0.3, 0.1, 0.03]  # of the directions of the inputs


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Learn w (7, 4) from examples. Returns the solution (7, 4), inputs and directions (4, 4).

    The columns of `inputs` are four directions that are orthogonal to each other. The first is
    long, the last is short: compare frequent and rare words. Each weight takes part in all four.
    """
    generator = torch.Generator().manual_seed(1337)
    directions, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator))
    solution = torch.randn(7, 4, generator=generator)
    return solution, directions * torch.tensor(LENGTHS), directions


def solve(optimizer: Callable[..., Tensor], lr: float, seed: int, steps: int = 300) -> Tensor:
    """Returns (5,): how much error is left in each direction, 1 = all; and the loss at the end."""
    solution, inputs, directions = problem()
    w, state = torch.zeros(7, 4), {}
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = inputs @ torch.randn(4, 1, generator=generator)  # a random mixture of the directions
        target = solution @ x + 0.05 * torch.randn(7, 1, generator=generator)  # with noise, (7, 1)
        gradient = (w @ x - target) @ x.T  # of half the sum of the squared errors
        w = optimizer(w, gradient, state, lr * (1 - step / steps))  # lr falls to 0
    # The mean over all x = inputs @ n, without the noise: the numbers in n are independent and have
    # mean 0 and variance 1. With A = (w - solution) @ inputs, the mean of |A @ n|^2 is the sum of
    # the squares in A.
    loss = ((w - solution) @ inputs).square().sum() / 2
    # The error along each direction, as a part of the error at the start (w = 0).
    left = ((w - solution) @ directions).norm(dim=0) / (solution @ directions).norm(dim=0)
    return torch.cat((left, loss[None]))


def normalized(w: Tensor, g: Tensor, state: dict, lr: float, momentum: float = 0.95) -> Tensor:
    """For comparison: Muon's momentum, but the update is only divided by its length."""
    m = state["m"] = momentum * state.get("m", torch.zeros_like(w)) + (1 - momentum) * g
    update = momentum * m + (1 - momentum) * g
    return w - lr * update / update.norm()


def compare() -> dict[str, Tensor]:
    """For each optimizer, what solve() returns, with the best learning rate."""
    print("\n3. Learn a matrix in 300 steps, each with one random example: how much error is")
    print("   left in each direction? (Mean of three runs.)")
    print(f"   {'length of the direction':29}" + "".join(f"{x:7}" for x in LENGTHS) + "    loss")
    results = {}
    for optimizer in (sgd, adamw, normalized, muon):
        means = {  # for each learning rate, (5,)
            lr: torch.stack([solve(optimizer, lr, seed) for seed in range(3)]).mean(dim=0)
            for lr in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
        }
        lr = min(means, key=lambda lr: float(means[lr][-1]))  # the least loss
        *left, loss = means[lr].tolist()
        name = f"{optimizer.__name__}, learning rate {lr}"
        print(f"   {name:29}" + "".join(f"{x:7.0%}" for x in left) + f"{loss:8.0e}")
        results[optimizer.__name__] = means[lr]
    print("""   SGD: the gradient of a short direction is tiny, and so is the step.
   AdamW: better, but it sees single weights. Each is part of all directions.
   Muon: it sees the matrix, so all directions are learned fast.
   normalized: for comparison. Muon's momentum, but the update is only divided
   by its length. It is no better than SGD here: with noisy steps, the
   orthogonalization makes the difference. (With all examples in each step and
   no noise, normalized is as good as Muon: tests/test_lessons.py shows it.)""")
    return results


# --- The strong forms ---


def equal_to_torch(steps: int = 20) -> bool:
    """Whether torch.optim.AdamW makes the same steps from random gradients."""
    ours, state = torch.randn(7, 4), {}
    theirs = ours.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    for _ in range(steps):
        theirs.grad = torch.randn(7, 4)
        ours = adamw(ours, theirs.grad, state, lr=0.1, weight_decay=0.2)
        optimizer.step()
    return torch.allclose(ours, theirs, atol=1e-6)


def difference_to_muon() -> float:
    """The largest difference to Muon in engine/optimizer.py, as a fraction of the largest step."""
    from engine.optimizer import Muon

    ours = torch.randn(7, 4)
    theirs = ours.clone().requires_grad_()
    optimizer = Muon([theirs], lr=0.1, weight_decay=0.2)
    theirs.grad = torch.randn(7, 4)
    after = muon(ours, theirs.grad, {}, lr=0.1, weight_decay=0.2)
    optimizer.step()
    return float((after - theirs.detach()).abs().max() / (after - ours).abs().max())


def main() -> None:
    torch.manual_seed(1337)
    show_first_step()
    show_orthogonalize()
    compare()
    print("\nThe strong forms: torch.optim.AdamW, and Muon in engine/optimizer.py, with a few")
    print("matrix products in place of the slow singular value decomposition.")
    print("Comparing with the strong forms (some seconds) ...", flush=True)
    print("AdamW is equal to torch's:", equal_to_torch())
    print("Muon in engine/optimizer.py approximates the SVD. The difference to this lesson")
    print(f"for one random gradient: {difference_to_muon():.0%} of a step. This is enough:")
    print("Muon needs singular values near 1, not exactly 1.")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of engine/
    main()
