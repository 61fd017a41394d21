"""How the weights change: Muon for the blocks' matrices, AdamW for everything else.

AdamW (Loshchilov and Hutter 2019) looks at each number by itself and divides its step by how large
its gradients have been. But the numbers of a matrix act together. The gradient of a matrix product
tends to be dominated by a few directions, so that a step along it turns those a great deal and all
the others hardly at all. Muon (Jordan et al. 2024) keeps the gradient's directions and makes them
equally long: of the singular value decomposition U S V^T of the averaged gradient it takes U V^T,
the nearest orthogonal matrix. Rare directions are learned as fast as common ones.

The training story knows three things: make_optimizer() builds an optimizer, its param_groups carry
the peak learning rate of each kind of weight, and set_learning_rate() scales all of them at once.
"""

import itertools

import torch


def make_optimizer(model: torch.nn.Module, config, precision: torch.dtype = torch.float32):
    """One optimizer for all parameters of a GPT.

    config: has optimizer, learning_rate, muon_learning_rate, weight_decay, beta1 and beta2.
    precision: of the model's matrix products. Where that is bfloat16, Muon's are, too.

    | parameters             | optimizer="muon"           | ="adamw"               | decay |
    |------------------------|----------------------------|------------------------|-------|
    | the blocks' matrices   | Muon at muon_learning_rate | AdamW at learning_rate | yes   |
    | embeddings             | AdamW at learning_rate     | the same               | yes   |
    | biases and layer norms | AdamW at learning_rate     | the same               | no    |

    Decay keeps the many weights of a matrix product from growing together. Biases and the gains of
    layer norms have a scale of their own to keep, and are left alone.
    """
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.dim() == 2 and ".h." in name]
    tables = [p for name, p in named if p.dim() == 2 and ".h." not in name]
    vectors = [p for _, p in named if p.dim() < 2]
    with_muon = config.optimizer == "muon"
    groups = [
        {"params": tables if with_muon else tables + hidden, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    # fused: one pass over all parameters instead of a dozen small operations on each.
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )
    if with_muon:
        muon = Muon(hidden, config.muon_learning_rate, config.weight_decay, precision=precision)
        optimizer = Both(muon, optimizer)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer, share: float) -> None:
    """Give every group this share (0 to 1) of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]


class Both:
    """Two optimizers, each with parameters of its own, that act as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {type(o).__name__: o.state_dict() for o in self.optimizers}

    def load_state_dict(self, state: dict) -> None:
        for optimizer in self.optimizers:
            optimizer.load_state_dict(state[type(optimizer).__name__])


# --- Muon ---


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix moves by about the same length.

    lr: that length, the singular values of an update (of a matrix with n times as many rows as
    columns, sqrt(n) times as much); weight_decay: per unit of lr.
    Matrices of one shape are orthogonalised together, in one batched product after another, where
    torch.optim.Muon takes one at a time; in bfloat16 if that is the precision, which is several
    times as fast where the hardware has it: a direction need not be exact.
    """

    def __init__(
        self,
        parameters,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        precision: torch.dtype = torch.float32,
    ):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.brief = precision == torch.bfloat16

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            gradients = [p.grad for p in parameters]
            averages = [self.average_of(p) for p in parameters]
            beta = group["momentum"]
            torch._foreach_lerp_(averages, gradients, 1 - beta)
            # Nesterov's look ahead: the average as it will be if the gradient stays as it is.
            ahead = torch._foreach_lerp(gradients, averages, beta)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            for shape, members in by_shape(zip(parameters, ahead, strict=True)):
                rows, columns = shape
                stack = torch.stack([m for _, m in members])
                stack = stack.bfloat16() if self.brief else stack
                directions = orthogonalise(stack).to(members[0][0].dtype)
                # A matrix with more rows than columns has smaller entries once it is orthogonal.
                step = group["lr"] * max(1, rows / columns) ** 0.5
                for (parameter, _), direction in zip(members, directions, strict=True):
                    parameter.sub_(direction, alpha=step)

    def average_of(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def by_shape(pairs):
    """Yields (shape, [(matrix of weights, matrix of directions), ...]).

    The weight of queries, keys and values is three square matrices in one (3C, C), and is taken
    apart: what turns nodes into queries is of no concern to what turns them into values.
    """
    parts = []
    for weight, direction in pairs:
        rows, columns = weight.shape
        count = 3 if rows == 3 * columns else 1
        parts += zip(weight.chunk(count), direction.chunk(count), strict=True)
    parts.sort(key=lambda part: part[0].shape)
    for shape, members in itertools.groupby(parts, key=lambda part: tuple(part[0].shape)):
        yield shape, list(members)


# One quintic after another, each the best one for what the last has left (Polar Express, Amsel et
# al. 2025, for singular values from 0.001 to 1): five of them bring each close to 1, where Jordan's
# one quintic five times over leaves them between about 0.7 and 1.2.
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
MARGIN = 1.01  # rounding may leave a singular value so far past 1, where a quintic explodes


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) -> the same, each U S V^T having become about U V^T.

    A polynomial a X + b (X X^T) X + c (X X^T)^2 X acts on the singular values alone, turning each
    s into a s + b s^3 + c s^5; so a few matrix products do the work of a decomposition.
    """
    wide = matrices.size(1) <= matrices.size(2)
    X = matrices if wide else matrices.mT  # X X^T is then the smaller of the two products
    # The root of the sum of all squared singular values bounds the largest of them.
    X = X / (X.norm(dim=(1, 2), keepdim=True) * MARGIN + 1e-7)
    for a, b, c in QUINTICS:
        a, b, c = a / MARGIN, b / MARGIN**3, c / MARGIN**5  # the quintic of X / MARGIN
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)  # b A + c A^2
        X = torch.baddbmm(X, B, X, beta=a)  # a X + B X
    return X if wide else X.mT
