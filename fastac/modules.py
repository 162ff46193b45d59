"""`AttentionCluster`: parameters for a weighting function and the shift, thin over `fastac.functional`."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import checks, functional, reference

WEIGHTINGS = ("fc1", "fc2", "gated", "average")
_PARAMETERS = (
    "weight",
    "hidden_weight",
    "hidden_bias",
    "tanh_weight",
    "gate_weight",
    "score_weight",
    "position_bias",
    "alpha",
    "beta",
)
_DEFAULT_HIDDEN = {"fc2": 10, "gated": 128}


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


class AttentionCluster(nn.Module):
    """N attention units over a set of local features, concatenated (Long et al., CVPR 2018).

    Args:
        in_features: M, the dimension of one local feature.
        cluster_size: N, the number of attention units.
        weighting: how scores are made: "fc1" (Eq. 4), "fc2" (Eq. 5), "gated" (Ilse et al. 2018), or "average"
            (Eq. 3, every unit the mean).
        hidden_features: H of "fc2" (10 unless given) and "gated" (128 unless given).
        shared_hidden: share W1 and b1 of "fc2" over the units; the paper's units are independent.
        position_bias: L_max: add a bias per unit and position, the paper's b, which ties the layer to an
            order and a length. None for no bias.
        shift: the shifting operation (Eq. 7); without it y is the plain concatenation (Eq. 6).
        eps: as in `fastac.attention_cluster`.
        device, dtype: where and in what type the parameters are made.

    Parameters: `weight` (N, M) for fc1; `hidden_weight` (N, H, M) or (H, M), `hidden_bias` (N, H) or (H,) and
    `score_weight` (N, H) for fc2; `tanh_weight` and `gate_weight` (H, M) and `score_weight` (N, H) for gated;
    `position_bias` (N, L_max); `alpha` and `beta` (N,) with shift.

    A score bias that is one scalar per unit cancels in the softmax and is not a parameter; a state dict that
    has one under the name `bias`, shape (N,), loads and the entry is dropped.
    """

    weight: nn.Parameter | None
    hidden_weight: nn.Parameter | None
    hidden_bias: nn.Parameter | None
    tanh_weight: nn.Parameter | None
    gate_weight: nn.Parameter | None
    score_weight: nn.Parameter | None
    position_bias: nn.Parameter | None
    alpha: nn.Parameter | None
    beta: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        cluster_size: int,
        *,
        weighting: str = "fc1",
        hidden_features: int | None = None,
        shared_hidden: bool = False,
        position_bias: int | None = None,
        shift: bool = True,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = m = _positive_int("in_features", in_features)
        self.cluster_size = n = _positive_int("cluster_size", cluster_size)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if hidden_features is not None and weighting not in _DEFAULT_HIDDEN:
            raise ValueError(f"hidden_features is for weighting fc2 and gated, not {weighting}")
        if shared_hidden and weighting != "fc2":
            raise ValueError(f"shared_hidden is for weighting fc2, not {weighting}")
        if position_bias is not None and weighting == "average":
            raise ValueError("position_bias needs scores to be added to; weighting average has none")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in checks.FLOATS:
            raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
        checks.check_eps(eps, double=dtype == torch.float64)
        self.weighting = weighting
        self.shared_hidden = bool(shared_hidden)
        self.shift = bool(shift)
        self.eps = float(eps)
        self.hidden_features = None
        if weighting in _DEFAULT_HIDDEN:
            chosen = _DEFAULT_HIDDEN[weighting] if hidden_features is None else hidden_features
            self.hidden_features = _positive_int("hidden_features", chosen)
        h = self.hidden_features or 0

        shapes: dict[str, tuple[int, ...]] = {}
        if weighting == "fc1":
            shapes = {"weight": (n, m)}
        elif weighting == "fc2":
            units = () if shared_hidden else (n,)
            shapes = {"hidden_weight": (*units, h, m), "hidden_bias": (*units, h), "score_weight": (n, h)}
        elif weighting == "gated":
            shapes = {"tanh_weight": (h, m), "gate_weight": (h, m), "score_weight": (n, h)}
        if position_bias is not None:
            shapes["position_bias"] = (n, _positive_int("position_bias", position_bias))
        if shift:
            shapes.update(alpha=(n,), beta=(n,))
        for name in _PARAMETERS:
            made = name in shapes
            self.register_parameter(
                name, nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype)) if made else None
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters again.

        Linear maps start as those of `torch.nn.Linear`: uniform in +-1/sqrt(fan_in), their biases too.
        position_bias starts at 0. alpha and beta are drawn from a normal distribution with mean 0 and
        standard deviation N^(-1/4), as in the authors' code.
        """
        hidden_bound = 1 / math.sqrt(self.in_features)
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("alpha", "beta"):
                nn.init.normal_(parameter, 0.0, self.cluster_size**-0.25)
            elif name == "position_bias":
                nn.init.zeros_(parameter)
            elif name == "score_weight":
                bound = 1 / math.sqrt(parameter.size(-1))
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.uniform_(parameter, -hidden_bound, hidden_bound)

    def _scores(self, x: Tensor) -> Tensor:
        """Scores (..., N, L) of features (..., L, M) whose excluded rows are 0."""
        if self.weight is not None:
            dtype = checks.computed_dtype(x)
            acc = reference.accumulation_dtype(dtype)
            with checks.no_autocast(x):
                return reference.fc1_scores(x.to(dtype).to(acc), self.weight.to(dtype).to(acc))
        if self.score_weight is None:
            return x.new_zeros(()).expand(*x.shape[:-2], self.cluster_size, x.size(-2))  # Eq. 3: equal scores
        if self.hidden_weight is not None and self.hidden_bias is not None:
            return reference.fc2_scores(x, self.hidden_weight, self.hidden_bias, self.score_weight)
        assert self.tanh_weight is not None
        assert self.gate_weight is not None
        return reference.gated_scores(x, self.tanh_weight, self.gate_weight, self.score_weight)

    def _add_position_bias(self, scores: Tensor, offsets: Tensor | None) -> Tensor:
        bias = self.position_bias
        if bias is None:
            return scores
        length = scores.size(-1)
        if offsets is None:
            return scores + bias[:, :length]
        if offsets.size(0) < 2:
            return scores
        _, position, _ = reference.row_sets(offsets, length)
        return scores + bias[:, position.clamp(0, bias.size(1) - 1)]

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = ...,
        mask: Tensor | None = ...,
        offsets: Tensor | None = ...,
        return_weights: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = ...,
        mask: Tensor | None = ...,
        offsets: Tensor | None = ...,
        return_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Cluster outputs of every set, flattened unit-major.

        Args:
            x, lengths, mask, offsets: as in `fastac.attention_cluster`; x may be a jagged nested tensor.
            return_weights: return the attention weights too, differentiable, 0 where excluded.

        Returns: y (B, N * M), and with return_weights the weights (B, N, L), or (N, T) for a packed or nested
        x.
        Raises: as `fastac.attention_cluster`.
        """
        if not return_weights and self.weighting in ("fc1", "average"):
            if isinstance(x, Tensor) and x.dim() > 1:
                checks.check_features(x, self.in_features)
            y = functional.attention_cluster(
                x,
                self.weight,
                self.alpha,
                self.beta,
                position_bias=self.position_bias,
                lengths=lengths,
                mask=mask,
                offsets=offsets,
                eps=self.eps,
            )
            if y.size(1) != self.cluster_size:  # the average without shift knows no N
                y = y.expand(-1, self.cluster_size, -1)
            return y.flatten(1)
        return self._forward_scores(x, lengths, mask, offsets, return_weights)

    def _forward_scores(
        self,
        x: Tensor,
        lengths: Tensor | None,
        mask: Tensor | None,
        offsets: Tensor | None,
        return_weights: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Scores by torch's matrix products, the rest by `attention_pool`."""
        x, offsets, max_length = functional.unnest(x, lengths, mask, offsets, None)
        alpha, beta = self.alpha, self.beta
        lengths, offsets = checks.check_call(
            x, None, None, self.position_bias, alpha, beta, lengths, mask, offsets, max_length, self.eps,
            units=self.cluster_size,
        )  # fmt: skip
        checks.check_features(x, self.in_features)

        taking_part: Tensor | None
        if offsets is not None:
            rows = torch.arange(x.size(0), device=x.device)
            taking_part = rows < offsets[-1]
        else:
            taking_part = reference.valid_positions(x.size(1), lengths, mask)
        # A parameter's gradient sums over all rows: an excluded one must be 0, not NaN times 0.
        clean = x if taking_part is None else torch.where(taking_part.unsqueeze(-1), x, 0)
        scores = self._add_position_bias(self._scores(clean), offsets)
        y = functional.attention_pool(
            x,
            scores,
            alpha,
            beta,
            lengths=lengths,
            mask=mask,
            offsets=offsets,
            max_length=max_length,
            eps=self.eps,
        )
        if not return_weights:
            return y.flatten(1)
        return y.flatten(1), reference.attention_weights(scores, lengths, mask, offsets).to(y.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        bias = state_dict.get(f"{prefix}bias")
        if isinstance(bias, Tensor) and bias.shape == (self.cluster_size,):
            del state_dict[f"{prefix}bias"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The constructor's arguments, the ones at their defaults left out."""
        parts = [f"{self.in_features}, {self.cluster_size}, weighting={self.weighting!r}"]
        if self.hidden_features is not None:
            parts.append(f"hidden_features={self.hidden_features}")
        if self.shared_hidden:
            parts.append("shared_hidden=True")
        bias = self.position_bias
        if bias is not None:
            parts.append(f"position_bias={bias.size(1)}")
        if not self.shift:
            parts.append("shift=False")
        if self.eps != 1e-12:
            parts.append(f"eps={self.eps}")
        return ", ".join(parts)
