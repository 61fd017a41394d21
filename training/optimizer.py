"""How the weights change: AdamW (Loshchilov and Hutter 2019), one setting for each kind of weight.

The training story knows three things of an optimizer: make_optimizer() builds it, its groups carry
the peak learning rate each of them has, and set_learning_rate() scales all of them at once.
"""

import torch


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, beta1: float, beta2: float
) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only.

    Decay keeps the many weights of a matrix product from growing together. Biases and the gains of
    layer norms have a scale of their own to keep, and are left alone.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["peak_lr"] = learning_rate
    # fused: one pass over all parameters instead of a dozen small operations on each.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Give every group this share (0 to 1) of its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak_lr"]
