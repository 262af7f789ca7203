r"""Where a classifier starts: a linear probe of the training pictures is solved first, then all is trained from there.

Ananya Kumar, Aditi Raghunathan, Robbie Jones, Tengyu Ma, Percy Liang: Fine-Tuning can Distort Pretrained Features and
Underperform Out-of-Distribution, 2022, arXiv:2202.10054 (LP-FT). With features f (n, d) of the training pictures, each
brought to mean 0 and deviation 1, and their classes y:

    W, b = argmin  1/n sum_k CE(W f_k + b, y_k) + |W|^2 / (2 n C),    C = `STRENGTH`

folded back to features as the model gives them. The problem is convex; L-BFGS solves it in float64, from zero, so that
the same pictures give the same classifier. `method.head_start = "probe"` asks for it; no method's own paper does it.

Differs from the paper: C is fixed, where the paper chooses it on validation pictures, which are not looked at here; and
the features are those of the model as the training starts, with the method attached, which is the frozen model's own
for methods that start as the identity, and not for prompts and SSF.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

STRENGTH = 0.1
"""C, the inverse of the pull to zero. On `pocket-vit`'s features of drawn digits and of counts, 1 told training
pictures better and validation pictures worse."""
STEPS = 300
"""Of L-BFGS, at most."""


def solve_probe(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """The linear classifier that tells features apart best.

    Args:
        features: (n, d), in any type.
        labels: (n,) long.
        classes: their number c.

    Returns:
        Weight (c, d) and bias (c,), float32, on the CPU.
    """
    f, labels = features.detach().double().cpu(), labels.cpu()
    deviation, mean = torch.std_mean(f, 0, correction=0)
    flat = deviation <= 1e-6 * f.abs().amax(0).clamp(min=1e-30)  # tells nothing, and divided by it would be noise
    f = torch.where(flat, 0.0, (f - mean) / deviation.where(~flat, torch.ones_like(deviation)))
    weight = torch.zeros(classes, f.shape[1], dtype=f.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=f.dtype, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        found = cross_entropy(f @ weight.T + bias, labels) + weight.square().sum() / (2 * len(f) * STRENGTH)
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(loss)
    folded = weight.detach() / deviation.where(~flat, torch.full_like(deviation, torch.inf))
    return folded.float(), (bias.detach() - folded @ mean).float()
