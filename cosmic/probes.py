"""Linear probes: regularised logistic regressions that tell two sets of states apart, one for every cell at once.

A cell is whatever the states are indexed by besides prompt and width, such as position and layer. There are far fewer
prompts than coordinates, so the fit works with inner products of prompts and never with `d_model` by `d_model` matrices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, softplus

from cosmic.errors import InputError

STRENGTH = 1e-3
"""Default strength of the regularisation, for states whose mean squared distance from their centre is 1.

Chosen on the embedded model by the log loss on held-out prompts: the best power of ten with 32 prompts per class, and the
third best with 165. Less follows chance differences between few prompts; more comes close to the difference in means.
"""

_CHUNK_BYTES = 2**28
_MOST_STEPS = 100
_MOST_HALVINGS = 40
_TOLERANCE = 1e-8
_ROUNDING = 1e-12
"""States that vary by less than this share of their length are constant; the rest is rounding of float64."""


@dataclass(frozen=True)
class Probe:
    """wᵀx + b for every cell; above zero means *positive*.

    Attributes:
        weight: w, `[..., d_model]` float64, in the units of the states; zero where states are constant.
        bias: b, `[...]` float64.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Log-odds `[N, ...]` float64 that `states` (`[N, ..., d_model]`) are positive."""
        weight, bias = self.weight.to(states.device), self.bias.to(states.device)
        found = weight.new_empty(len(states), *bias.shape)
        for row, state in enumerate(states):  # one at a time, as all states in float64 may be gigabytes
            found[row] = (state.double() * weight).sum(-1) + bias
        return found


def fit_probe(positive: torch.Tensor, negative: torch.Tensor, strength: float = STRENGTH) -> Probe:
    """L2-regularised logistic regression of two classes of states, which count equally whatever their sizes.

    Every cell's states are centred between the two class means and divided by one number s, the root mean square of
    their distance from that centre (both classes weighted equally). On these z = (x - centre) / s it minimises

        ½ mean log(1 + exp(-f)) over positive  +  ½ mean log(1 + exp(f)) over negative  +  ½ strength ‖w‖²

    with f = wᵀz + b. So predictions do not change if all states are shifted or multiplied by a constant, and one
    strength suits all layers. A very large strength gives the direction of the difference in means, a very small one
    that of the widest margin. The fit is Newton's method on the dual in float64; it is deterministic.

    Args:
        positive: `[N, ..., d_model]`.
        negative: `[M, ..., d_model]`, with the same cells.
        strength: above 0; below 1e-9 rounding may win.

    Returns:
        The probe for unscaled states. A cell that has a state that is not finite has a weight that is not a number.

    Raises:
        InputError: a class is empty, shapes differ, or `strength` is not above 0 or too small to be fitted.
    """
    _require_classes(positive, negative, strength)
    cells, width = positive.shape[1:-1], positive.shape[-1]
    counts = (len(positive), len(negative))
    first, second = (states.detach().reshape(len(states), cells.numel(), width) for states in (positive, negative))
    rows = sum(counts)
    at_once = max(1, _CHUNK_BYTES // (8 * rows * (width + 4 * rows)))
    weight = torch.empty(cells.numel(), width, dtype=torch.float64, device=positive.device)
    bias = torch.empty(cells.numel(), dtype=torch.float64, device=positive.device)
    for start in range(0, cells.numel(), at_once):
        part = slice(start, start + at_once)
        states = torch.cat([first[:, part], second[:, part].to(first.device)]).transpose(0, 1).double()
        weight[part], bias[part] = _fit(states, counts, strength)
    return Probe(weight.reshape(*cells, width), bias.reshape(cells))


def _require_classes(positive: torch.Tensor, negative: torch.Tensor, strength: float) -> None:
    for name, states in (("positive", positive), ("negative", negative)):
        if states.dim() < 2 or not len(states):
            raise InputError(
                f"`{name}` has shape {tuple(states.shape)}; expected [N, ..., d_model] with N at least 1. Give states."
            )
    if positive.shape[1:] != negative.shape[1:]:
        raise InputError(
            f"`negative` has states of shape {tuple(negative.shape[1:])}; expected {tuple(positive.shape[1:])} as in "
            "`positive`. Read both from the same model at the same positions."
        )
    if not 0 < strength < math.inf:
        raise InputError(f"`strength` is {strength}; expected a number above 0, such as {STRENGTH}.")


def _fit(states: torch.Tensor, counts: tuple[int, int], strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[C, d_model]` and biases `[C]` for `states` (`[C, N + M, d_model]` float64, overwritten)."""
    share = torch.cat([states.new_full((count,), 0.5 / count) for count in counts])
    sign = torch.cat([states.new_full((count,), value) for count, value in zip(counts, (1.0, -1.0), strict=True)])
    finite = states.isfinite().flatten(1).all(1)
    states = torch.where(finite[:, None, None], states, 0)
    centre = (states[:, : counts[0]].mean(1) + states[:, counts[0] :].mean(1)) / 2
    states -= centre[:, None]
    scale = (states.square().sum(-1) @ share).sqrt()
    varies = scale > _ROUNDING * centre.norm(dim=-1)
    scale = torch.where(varies, scale, math.inf)
    states /= scale[:, None, None]
    dual, bias = _Regression(states @ states.mT, sign, share, strength).solve()
    weight = torch.einsum("cn,cnd->cd", dual, states) / scale[:, None]
    weight[~finite] = math.nan
    return weight, bias - (weight * centre).sum(-1)


@dataclass(frozen=True)
class _Regression:
    """The dual problem: w = Σ aᵢzᵢ, so that f = Ga + b with the inner products G.

    Attributes:
        gram: G, `[C, n, n]`.
        sign: 1 for positive, -1 for negative, `[n]`.
        share: weight of each row, 1 in all, `[n]`.
        strength: of the regularisation.
    """

    gram: torch.Tensor
    sign: torch.Tensor
    share: torch.Tensor
    strength: float

    def solve(self) -> tuple[torch.Tensor, torch.Tensor]:
        """a `[C, n]` and b `[C]` by Newton's method, with steps halved where they would raise the loss.

        Raises:
            InputError: it does not converge.
        """
        dual, bias = torch.zeros_like(self.gram[:, 0]), torch.zeros_like(self.gram[:, 0, 0])
        for _ in range(_MOST_STEPS):
            goal, goal_bias = self._newton(dual, bias)
            logits, change = self._logits(dual, bias), self._logits(goal - dual, goal_bias - bias)
            if bool((change.abs().amax(-1) <= _TOLERANCE * (1 + logits.abs().amax(-1))).all()):
                return goal, goal_bias
            step = self._step(dual, bias, goal, goal_bias)
            dual, bias = dual.lerp(goal, step[:, None]), bias.lerp(goal_bias, step)
        raise InputError(
            f"`strength` is {self.strength}; expected more, as the probe does not converge. Try {STRENGTH}."
        )

    def _logits(self, dual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.einsum("cnm,cm->cn", self.gram, dual) + bias[:, None]

    def _loss(self, dual: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = self._logits(dual, bias)
        squared = (dual * (logits - bias[:, None])).sum(-1)
        return softplus(-self.sign * logits) @ self.share + self.strength * squared / 2

    def _newton(self, dual: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The minimum of the loss's second-order expansion.

        With g and S² the first and second derivatives of the mean loss by f it solves

            (strength + S²G) a + S² b = S² f - g        Σ a = 0

        through strength + S G S, which is positive definite however sure the probe is.
        """
        logits = self._logits(dual, bias)
        root = (self.share.log() + logsigmoid(logits) + logsigmoid(-logits)).div(2).exp()
        pull = self.share.sqrt() * self.sign * (-self.sign * logits / 2).exp()  # -g / S without division
        system = root[:, :, None] * self.gram * root[:, None, :]
        system.diagonal(dim1=-2, dim2=-1).add_(self.strength)
        right = torch.stack([root * logits + pull, root], -1)
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(system)) * root[..., None]
        goal_bias = solved[..., 0].sum(-1) / solved[..., 1].sum(-1)
        return solved[..., 0] - goal_bias[:, None] * solved[..., 1], goal_bias

    def _step(
        self, dual: torch.Tensor, bias: torch.Tensor, goal: torch.Tensor, goal_bias: torch.Tensor
    ) -> torch.Tensor:
        """How far each cell goes towards its goal, `[C]` in (0, 1]."""
        before = self._loss(dual, bias)
        step = torch.ones_like(bias)
        for _ in range(_MOST_HALVINGS):
            after = self._loss(dual.lerp(goal, step[:, None]), bias.lerp(goal_bias, step))
            worse = after > before + _ROUNDING * (1 + before)
            if not worse.any():
                break
            step = torch.where(worse, step / 2, step)
        return step
