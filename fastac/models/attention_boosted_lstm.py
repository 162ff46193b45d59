"""The attention-boosted bi-LSTM (You & Korhonen, ICIP 2020) and its temporal attention block.

A bi-LSTM over the features of frames, alone or with attention over time before or after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastac import checks, functional, reference

from .base import checked_count, checked_dropout, checked_dtype, checked_switch
from .inputs import padded, without_excluded
from .one_modality import OneModalityClassifier

POSITIONS = ("none", "before", "after")
"""Where the attention block can stand, seen from the LSTM."""


def _resized(x: Tensor, length: int) -> Tensor:
    """x (B, L, D) cut or padded with 0 to (B, length, D)."""
    return x if x.size(1) == length else F.pad(x, (0, 0, 0, length - x.size(1)))  # a negative pad cuts


class TemporalAttention(nn.Module):
    """The attention block: one softmax over time for every feature, the weights left on their positions.

        scores[b, t, d] = sum_t' W[t', t] x[b, t', d] + bias[t]      a = softmax over t      y = x * a

    You & Korhonen, *Attention Boosted Deep Networks for Video Classification*, ICIP 2020, as in the authors'
    code: W and bias are shared by the features d, T is fixed, and y is not summed over time. Longer sequences
    are cut to T, shorter ones padded with 0. There every padded position takes part in the softmax; here it
    has no weight unless ``honor_lengths`` is False, and its features count as 0 in the scores of others.

    Args:
        sequence_length: T.
        honor_lengths: give weight to valid positions only: the first ``lengths[b]``, or all of x without
            lengths. False is the published behaviour: what lengths exclude is set to 0, and all T positions
            have weight.
        device, dtype: where and in what type the parameters are made.

    Parameters: ``weight`` (T, T), row t' the input position, column t the position scored; ``bias`` (T,).

    Raises: TypeError for a wrong type, ValueError for a wrong value.
    """

    def __init__(
        self,
        sequence_length: int,
        *,
        honor_lengths: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.sequence_length = t = checked_count("sequence_length", sequence_length)
        self.honor_lengths = checked_switch("honor_lengths", honor_lengths)
        dtype = checked_dtype(dtype)
        self.weight = nn.Parameter(torch.empty(t, t, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(t, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again, as Keras does for the original: W uniform (Glorot), bias 0."""
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)

    def _scores(self, x: Tensor) -> Tensor:
        """The scores (B, n, D) of the first n positions, from x (B, n, D): those after them are 0."""
        n = x.size(1)
        weight = self.weight[:n, :n].t().expand(x.size(0), -1, -1)
        return torch.baddbmm(self.bias[:n, None], weight, x)

    @overload
    def forward(
        self, x: Tensor, lengths: Tensor | None = ..., return_weights: Literal[False] = ...
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, lengths: Tensor | None = ..., *, return_weights: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, return_weights: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The weighted features.

        Args:
            x: (B, L, D), the dtype of the parameters, or any float but float64 under autocast.
            lengths: (B,) integer in 0...L: the first lengths[b] positions are valid; None for all. Whatever
                stands in the others, NaN and Inf included, has no influence on y or any gradient.
            return_weights: return the weights a too, differentiable.

        Returns: y (B, T, D), 0 where x has no valid position; with return_weights also a (B, T, D), 0 there
            too unless ``honor_lengths`` is False.
        Raises: TypeError for a wrong type or dtype, ValueError for a wrong shape, value or device.
        """
        lengths, _ = checks.check_call(x, *(None,) * 5, lengths, None, None, None, 1.0)
        if x.device != self.weight.device:
            raise ValueError(f"x must be on the device of the block, {self.weight.device}, got {x.device}")
        if checks.computed_dtype(x) != checks.computed_dtype(self.weight):
            raise TypeError(f"x must be {self.weight.dtype} as the block, got {x.dtype}")
        t = self.sequence_length
        x = x[:, :t].to(checks.computed_dtype(x))
        if lengths is not None:
            lengths = lengths.clamp(max=t)
            x = without_excluded(x, lengths)
        if not self.honor_lengths:
            x, lengths = _resized(x, t), None
        scores = self._scores(x)
        y = _resized(functional.softmax_weight(x, scores, lengths=lengths), t)
        if not return_weights:
            return y
        valid = reference.valid_positions(x.size(1), lengths, None)
        by_feature = scores.to(reference.accumulation_dtype(scores.dtype)).transpose(1, 2)  # (B, D, n)
        weights, _ = reference.masked_softmax(by_feature, valid)
        return y, _resized(weights.transpose(1, 2).to(y.dtype), t)

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return f"{self.sequence_length}" + ("" if self.honor_lengths else ", honor_lengths=False")


class AttentionBoostedLSTM(OneModalityClassifier):
    """A bi-LSTM over frame features, with temporal attention before it, after it, or none.

    You & Korhonen, *Attention Boosted Deep Networks for Video Classification*, ICIP 2020, as in the authors'
    code; H is ``hidden_features``, per direction:

    - "none": bi-LSTM, its last states (B, 2 H), dense layer with ReLU, dropout, linear layer;
    - "before": ``TemporalAttention`` on the frame features, then the same;
    - "after": bi-LSTM, ``TemporalAttention`` on its outputs (B, T, 2 H), flattened (B, T * 2 H), dense layer
      with ReLU, dropout, linear layer.

    The gates are sigmoids; those of the Keras release that the authors name are piecewise linear ("hard").
    The last state of the backward direction is that of the first frame. Videos are cut to T frames. The
    original pads shorter ones with frames of 0 and lets those take part. Here the LSTM ends with the video
    and padding gets no weight, unless ``honor_lengths`` is False.

    A video without any frame counts as one frame of zeros. Its scores are finite and its features get no
    gradient.

    ``torch.export`` takes the eval forward of dense sets without lengths, or of any dense or packed sets with
    ``honor_lengths=False``; the number of videos may be free, L is that of the example. It cannot take a
    packed LSTM, whose layout depends on the values of the lengths.

    Args:
        in_features: M, the dimension of a frame's features.
        num_classes: C.
        sequence_length: T; the authors' is the mean number of frames of all videos, rounded down, at one
            frame per second.
        position: "none", "before" or "after".
        hidden_features: H.
        dense_features: of the dense layer.
        dropout: the probability of dropping one of its entries, in [0, 1).
        honor_lengths: False for the published behaviour: videos are padded with 0 to T, which takes part.
        multi_label: a video has any number of labels, rather than one: it decides ``losses`` and
            ``probabilities``.
        modality: the name of the features.
        standardize: each feature enters as (x - mean) / std over the training set, which ``set_moments``
            gives.
        device, dtype: where and in what type the parameters are made.

    State: ``lstm.*`` as of ``torch.nn.LSTM``, ``dense.weight``, ``dense.bias``, ``fc.weight``, ``fc.bias``;
    but for "none" also ``temporal_attention.weight`` and ``temporal_attention.bias``; with ``standardize``
    ``feature_mean`` and ``feature_std``.

    Raises: TypeError for a wrong type, ValueError for a wrong value.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        sequence_length: int,
        position: str = "after",
        hidden_features: int = 256,
        dense_features: int = 512,
        dropout: float = 0.5,
        honor_lengths: bool = True,
        multi_label: bool = False,
        modality: str = "features",
        standardize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            standardize=standardize,
            multi_label=multi_label,
            modality=modality,
            device=device,
            dtype=dtype,
        )
        m = self.in_features
        self.sequence_length = t = checked_count("sequence_length", sequence_length)
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, got {position!r}")
        self.position = position
        self.hidden_features = h = checked_count("hidden_features", hidden_features)
        self.dense_features = checked_count("dense_features", dense_features)
        self.honor_lengths = checked_switch("honor_lengths", honor_lengths)
        factory: dict[str, Any] = {"device": device, "dtype": checked_dtype(dtype)}
        self.temporal_attention = (
            None if position == "none" else TemporalAttention(t, honor_lengths=honor_lengths, **factory)
        )
        self.lstm = nn.LSTM(m, h, batch_first=True, bidirectional=True, **factory)
        flat = 2 * h * (t if position == "after" else 1)
        self.dense = nn.Linear(flat, self.dense_features, **factory)
        self.dropout = nn.Dropout(checked_dropout(dropout))
        self.fc = nn.Linear(self.dense_features, self.num_classes, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters again, as Keras does for the original.

        Kernels are uniform (Glorot), recurrent kernels orthogonal, biases 0; but that of the LSTM's forget
        gate is 1. Of the two biases that torch adds, ``bias_ih`` has that 1 and ``bias_hh`` is 0; both learn.
        """
        if self.temporal_attention is not None:
            self.temporal_attention.reset_parameters()
        h = self.hidden_features
        with torch.no_grad():
            for name, parameter in self.lstm.named_parameters():
                if name.startswith("weight_ih"):
                    nn.init.xavier_uniform_(parameter)
                elif name.startswith("weight_hh"):
                    _orthogonal(parameter)
                else:
                    nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    parameter[h : 2 * h] = 1  # the gates are input, forget, cell, output
        for layer in (self.dense, self.fc):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @property
    def attention_rows(self) -> str:
        """What the second dimension of ``attention`` counts: features, each with a softmax of its own."""
        return "feature"

    @property
    def has_attention(self) -> bool:
        """Whether ``attention`` has weights to give: not where the block stands at no position."""
        return self.position != "none"

    @property
    def config(self) -> dict[str, Any]:
        """What ``from_config`` needs to make this model again, in builtins that JSON and YAML can hold."""
        return {
            "in_features": self.in_features,
            "num_classes": self.num_classes,
            "sequence_length": self.sequence_length,
            "position": self.position,
            "hidden_features": self.hidden_features,
            "dense_features": self.dense_features,
            "dropout": self.dropout.p,
            "honor_lengths": self.honor_lengths,
            "multi_label": self.multi_label,
            "modality": self.modality,
            "standardize": self.standardize,
        }

    def extra_repr(self) -> str:
        """What the submodules do not show."""
        return (
            f"position={self.position!r}, sequence_length={self.sequence_length}, "
            f"honor_lengths={self.honor_lengths}, multi_label={self.multi_label}"
        )

    # Use

    def _prepared(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the LSTM reads: x (B, n, M) with 1 <= n <= T and 0 where excluded, and lengths in 1...n.

        Without lengths every position counts.
        """
        n = max(1, min(x.size(1), self.sequence_length))
        if self.position == "before":
            assert self.temporal_attention is not None
            x = self.temporal_attention(x, lengths)
        else:
            x = without_excluded(x, lengths)
        if not self.honor_lengths:
            return _resized(x, self.sequence_length), None
        x = _resized(x, n)
        if lengths is None or is_compiling():
            return x, None if lengths is None else lengths.clamp(1, n)
        lengths = lengths.clamp(1, n)
        on_cpu = lengths.cpu()  # where a packed LSTM wants them
        return x, None if bool((on_cpu == n).all()) else on_cpu

    def _lstm(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs (B, n, 2 H), 0 where excluded, and last states (B, 2 H)."""
        batch, n = x.shape[:2]
        if batch == 0:  # packing refuses an empty batch, and not every kernel is known to take one
            x, lengths = x.new_zeros(1, n, x.size(2)), None
        if lengths is None:
            outputs, (last, _) = self.lstm(x)
        else:
            if is_exporting():
                raise ValueError(
                    "torch.export cannot take a packed LSTM: export a model with honor_lengths=False, "
                    "or with dense features and no lengths"
                )
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            outputs, (last, _) = self.lstm(packed)
            outputs, _ = pad_packed_sequence(outputs, batch_first=True, total_length=n)
        last = last.transpose(0, 1).flatten(1)  # forward, then backward
        return outputs[:batch], last[:batch]

    def _pooled(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """What the dense layer reads, of padded sets."""
        x, lengths = self._prepared(x, lengths)
        outputs, last = self._lstm(x, lengths)
        if self.position != "after":
            return last
        assert self.temporal_attention is not None
        weighted: Tensor = self.temporal_attention(outputs, _moved(lengths, x))
        return weighted.flatten(1)

    def forward(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> Tensor:
        """Class scores (B, C), before any softmax or sigmoid.

        Every argument is by modality or bare.

        Args:
            features: frame features in order: dense (B, L, M); packed (T, M), with offsets; or a jagged
                nested tensor (B, j, M). Of the model's dtype, or any float but float64 under autocast.
            lengths: (B,) integer, for dense features: the frames of each video. Whatever stands after them
                has no influence.
            offsets: (B + 1,) int64 or int32, for packed features: the borders of the videos.
            max_length: an upper bound of the lengths of packed videos.

        Raises: TypeError for a wrong type or dtype; ValueError for a wrong shape, value or device or another
            modality.
        """
        sets = self._sets(features, lengths, offsets, max_length)
        t, bound = self.sequence_length, sets.max_length  # frames after T are not even unpacked
        x, counts = padded(sets._replace(max_length=t if bound is None else min(bound, t)))
        counts = None if counts is None else counts.clamp(max=x.size(1))
        dense = F.relu(self.dense(self._pooled(x, counts)))
        scores: Tensor = self.fc(self.dropout(dense))
        return scores

    def attention(
        self,
        features: Mapping[str, Tensor] | Tensor,
        *,
        lengths: Mapping[str, Tensor] | Tensor | None = None,
        offsets: Mapping[str, Tensor] | Tensor | None = None,
        max_length: Mapping[str, int] | int | None = None,
    ) -> dict[str, Tensor]:
        """The weights over time of every feature: (B, D, L), or (D, T) where features are packed or nested.

        D is M for "before", 2 H for "after". Positions that are excluded or cut off have weight 0. The weight
        of padding, with ``honor_lengths=False``, is not shown. Differentiable.

        Raises: ValueError for position "none"; else as ``forward``.
        """
        if self.temporal_attention is None:
            raise ValueError("attention needs position before or after, the model has none")
        sets = self._sets(features, lengths, offsets, max_length)
        x, counts = padded(sets)
        length = x.size(1)
        inputs, limits = x, counts
        if self.position == "after":
            prepared, limits = self._prepared(x, counts)
            inputs, _ = self._lstm(prepared, limits)
        _, weights = self.temporal_attention(inputs, _moved(limits, x), return_weights=True)
        by_feature = without_excluded(_resized(weights, length), counts).transpose(1, 2)  # (B, D, L)
        if sets.offsets is not None:
            by_feature = reference.pack_weights(by_feature, sets.offsets, sets.x.size(0))
        return {self.modality: by_feature}


def _moved(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    return None if lengths is None else lengths.to(x.device)


def _orthogonal(parameter: Tensor) -> None:
    """`nn.init.orthogonal_`, drawn in float32 where the type has no QR decomposition."""
    drawn = parameter.new_empty(parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32))
    parameter.copy_(nn.init.orthogonal_(drawn))
