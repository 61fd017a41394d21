"""Optimizers: Muon for the matrices of the blocks, AdamW for all other parameters.

AdamW (Loshchilov and Hutter 2019) treats each weight w alone. With its gradient g:

    m = beta1 * m + (1 - beta1) * g             running mean of gradients: averages out their noise
    v = beta2 * v + (1 - beta2) * g^2           running mean of squares: how large g usually is
    w = w - lr * (m / (sqrt(v) + eps) + weight_decay * w)

(m and v, called the first and the second moment, are divided by 1 - beta^step, because they start
at 0.) So each weight moves by about lr, however large its gradients are.

But the weights of a matrix act together. The gradient of a matrix often has a few large singular
values and many small ones. Muon (Jordan et al. 2024) orthogonalizes the running mean of gradients:
of its singular value decomposition U S V^T it takes U V^T, whose singular values are all 1.
For example, diag(10, 0.1) becomes diag(1, 1). So directions with small singular values are learned
as fast as directions with large ones.

lessons/optimizers.py has both in their simplest form.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from engine.distributed import Distributed
from engine.train_config import TrainConfig
from model import GPT


def make_optimizer(
    model: GPT,
    config: TrainConfig,
    dtype: torch.dtype = torch.float32,
    dist: Distributed | None = None,
) -> "Optimizer":
    """The optimizer of all parameters of the model.

    dtype: of the model's matrix products; with bfloat16, Muon multiplies in bfloat16, too.
    dist: the processes over which Muon is sharded; None: one process.

    | parameters               | optimizer="muon"           | optimizer="adamw"      | decay |
    |--------------------------|----------------------------|------------------------|-------|
    | matrices of the blocks   | Muon at muon_learning_rate | AdamW at learning_rate | yes   |
    | embeddings               | AdamW at learning_rate     | AdamW at learning_rate | yes   |
    | biases, layer norm gains | AdamW at learning_rate     | AdamW at learning_rate | no    |

    Weight decay keeps the weights of a matrix small. Biases and gains have no need of it: they are
    few, and a gain belongs near 1 rather than near 0.
    """
    block_matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    in_blocks = set(block_matrices)
    # wte and wpe. If model.py was changed, its other matrices belong here, too.
    embeddings = [p for p in model.parameters() if p.dim() >= 2 and p not in in_blocks]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    use_muon = config.optimizer == "muon"
    decayed = embeddings if use_muon else embeddings + block_matrices
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over all parameters instead of a dozen small operations for each.
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )
    if use_muon:
        muon = Muon(
            block_matrices, config.muon_learning_rate, config.weight_decay, dtype=dtype, dist=dist
        )
        optimizer = CombinedOptimizer(muon, optimizer)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_lr_multiplier(optimizer: "Optimizer", multiplier: float) -> None:
    """Set the learning rate of each group to multiplier (0 to 1) times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = multiplier * group["initial_lr"]


class CombinedOptimizer:
    """Several optimizers, each with its own parameters, used as one.

    It is no torch.optim.Optimizer, so torch's schedulers do not accept it: use set_lr_multiplier().
    """

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {type(o).__name__: o.state_dict() for o in self.optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            optimizer.load_state_dict(state[type(optimizer).__name__])


Optimizer = torch.optim.Optimizer | CombinedOptimizer


# --- Muon ---


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum, whose updates are orthogonalized (Jordan et al. 2024).

    lr: each singular value of an update; times sqrt(n) if the matrix has n times as many rows as
    columns (see step()). weight_decay: each step multiplies the weights by 1 - lr * weight_decay.
    Matrices of one shape are orthogonalized together, in batched products, where torch.optim.Muon
    takes one at a time. With dtype=bfloat16 these products are computed in bfloat16: several times
    faster where the hardware supports it, and a direction need not be exact.

    dist: with several processes, each process orthogonalizes its share of the matrices and receives
    the results of all processes. Momentum buffers are not sharded: every process updates all of
    them, which takes little time. So the state of one process is complete, and any number of
    processes can resume from it.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
        dist: Distributed | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.use_bfloat16 = dtype == torch.bfloat16
        self.dist = dist or Distributed()  # one process

    @torch.no_grad()
    def step(self) -> None:
        # The _foreach functions apply one operation to a list of tensors at once.
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:  # no matrix has a gradient
                continue
            gradients = [p.grad for p in params]
            for p in params:
                if not self.state[p]:  # the first step
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in params]  # running means
            beta, lr = group["momentum"], group["lr"]
            # buffer = beta * buffer + (1 - beta) * gradient
            torch._foreach_lerp_(buffers, gradients, 1 - beta)
            # Nesterov momentum: update = beta * buffer + (1 - beta) * gradient
            updates = torch._foreach_lerp(gradients, buffers, beta)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for (rows, columns), pairs in group_by_shape(zip(params, updates, strict=True)):
                weights, matrices = zip(*pairs, strict=True)
                stacked = torch.stack(matrices)
                stacked = stacked.bfloat16() if self.use_bfloat16 else stacked
                orthogonal = self.orthogonalize_sharded(stacked).to(weights[0].dtype)
                # Without the factor, the numbers in matrix @ x would be smaller than the numbers
                # in x if the matrix is tall. (lessons/optimizers.py computes three examples.)
                step_size = lr * max(1, rows / columns) ** 0.5
                torch._foreach_sub_(weights, orthogonal.unbind(), alpha=step_size)

    def orthogonalize_sharded(self, matrices: torch.Tensor) -> torch.Tensor:
        """(n, rows, columns) -> (n, rows, columns): orthogonalize(), sharded over the processes.

        Process 1 of 4 computes matrices 1, 5, 9... and fills the other matrices with zeros. So the
        sum over all processes contains every matrix. Adding zero is exact and works with unequal
        shares. All processes receive equal results, so their weights stay equal.
        """
        if self.dist.world_size == 1:
            return orthogonalize(matrices)
        result = torch.zeros_like(matrices)
        share = slice(self.dist.rank, None, self.dist.world_size)
        result[share] = orthogonalize(matrices[share])
        return self.dist.all_reduce_sum(result)


def group_by_shape(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> Iterator[tuple[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]]]:
    """(weight, update) pairs -> (shape, [pairs of this shape]) for each shape.

    The matrix of queries, keys and values (3C, C) is three matrices in one. They do different
    things, so each is orthogonalized by itself. (Parts are views: a step of a part changes the
    whole matrix. In a changed model.py, any matrix of this shape counts as three.)
    """
    parts = []
    for weight, update in pairs:
        rows, columns = weight.shape
        n_chunks = 3 if rows == 3 * columns else 1
        parts += zip(weight.chunk(n_chunks), update.chunk(n_chunks), strict=True)
    parts.sort(key=lambda part: part[0].shape)
    for shape, group in itertools.groupby(parts, key=lambda part: tuple(part[0].shape)):
        yield shape, list(group)


# Coefficients a, b, c of five polynomials a s + b s^3 + c s^5, applied one after another. Each is
# optimal for the range of singular values that the polynomials before it leave (Polar Express,
# Amsel et al. 2025). Singular values from 0.001 to 1 end between 0.84 and 1.13.
POLAR_EXPRESS_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# Each polynomial is made for values up to a limit: 1 for the first one, 1.6 to 2 for the later
# ones. Above it, the polynomial grows fast. Rounding can push a value slightly above: leave room
# for 1%.
SAFETY_FACTOR = 1.01


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> (n, rows, columns): of each matrix U S V^T, approximately U V^T.

    A polynomial a X + b (X X^T) X + c (X X^T)^2 X changes the singular values alone: each s becomes
    a s + b s^3 + c s^5. So a few matrix products replace a singular value decomposition.
    """
    is_wide = matrices.size(1) <= matrices.size(2)
    X = matrices if is_wide else matrices.mT  # then X X^T is smaller than X^T X
    # The Frobenius norm is at least as large as the largest singular value (before rounding).
    X = X / (X.norm(dim=(1, 2), keepdim=True) * SAFETY_FACTOR + 1e-7)
    for a, b, c in POLAR_EXPRESS_COEFFICIENTS:
        # The polynomial of X / SAFETY_FACTOR: to divide the coefficients takes less time than to
        # divide X. (For the first polynomial, X has been divided already; once more is harmless.)
        a, b, c = a / SAFETY_FACTOR, b / SAFETY_FACTOR**3, c / SAFETY_FACTOR**5
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X if is_wide else X.mT
