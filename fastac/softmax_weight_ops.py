"""The operators of `softmax_weight` under `torch.ops.fastac`: schemas, fake kernels and autograd rules.

As in `fastac.ops` every backend with kernels of its own has one family under its own stem:

    {stem}_softmax_weight            y, and for the backward the softmax statistics
    {stem}_softmax_weight_backward   the gradients that `needs` asks for, (0,) for the others; itself
                                     differentiable, in eager mode

x, scores, y, dy, dx and dscores are (B, L, M), lengths (B,) int64. stats (2, B, M), of the accumulation type:
the greatest score of every set and feature, -inf where no position takes part, and the sum of
exp(score - greatest). Bit 0 of `needs` asks for dx, bit 1 for dscores.

The operator is elementwise up to the softmax over L, which is computed in the accumulation type whatever the
dtypes: there is nothing for autocast to cast, so it has no rule.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, reference

_LIBRARY = torch.library.Library("fastac", "FRAGMENT")

_SCHEMAS = {
    "softmax_weight": "(Tensor x, Tensor scores, Tensor? lengths) -> (Tensor y, Tensor stats)",
    "softmax_weight_backward": "(Tensor dy, Tensor x, Tensor scores, Tensor? lengths, Tensor stats, "
    "int needs) -> (Tensor dx, Tensor dscores)",
}

_HOST_FUNCTIONS = {"softmax_weight": "forward", "softmax_weight_backward": "backward"}
"""Of `fastac.kernels.softmax_weight`, by operator."""


def operator(stem: str, kind: str = "softmax_weight") -> Callable[..., Any]:
    """`torch.ops.fastac.{stem}_{kind}`, kind one of softmax_weight, softmax_weight_backward."""
    overload: Callable[..., Any] = getattr(torch.ops.fastac, f"{stem}_{kind}").default
    return overload


def _fake_forward(x: Tensor, scores: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    acc = reference.accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty((2, x.size(0), x.size(2)), dtype=acc)


def _fake_backward(
    dy: Tensor, x: Tensor, scores: Tensor, lengths: Tensor | None, stats: Tensor, needs: int
) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape if needs & 1 else (0,)),
        scores.new_empty(scores.shape if needs & 2 else (0,)),
    )


# Autograd


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, output[1])


def _first_derivative(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[0] | ctx.needs_input_grad[1] << 1
        if dy is None or not needs:
            return (None,) * 3
        dx, dscores = backward(dy, *ctx.saved_tensors, needs)
        return dx if needs & 1 else None, dscores if needs & 2 else None, None

    return differentiate


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])


def _second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the backward in dy, x and scores, through the reference's own graph.

    The statistics are recomputed from the scores, so what reaches the scores is the whole derivative.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fastac: second derivatives are not supported under torch.compile; run this part eagerly"
        )
    *tensors, lengths = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), checks.no_autocast(tensors[0]):
        # A view keeps the graph of an input that has one, for third and higher derivatives.
        leaves = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
        y = reference.weight_by_softmax(leaves[1], leaves[2], lengths)
        asked = [i for i in (0, 1) if ctx.needs >> i & 1 and grads[i] is not None]
        targets = [i for i in range(3) if ctx.needs_input_grad[i]]
        second: list[Tensor | None] = [None] * 3
        if asked and targets:
            first = torch.autograd.grad(y, [leaves[i + 1] for i in asked], leaves[0], create_graph=True)
            found = torch.autograd.grad(
                first, [leaves[i] for i in targets], [grads[i] for i in asked],
                create_graph=create_graph, allow_unused=True,
            )  # fmt: skip
            for i, gradient in zip(targets, found, strict=True):
                second[i] = gradient
    return *second, None, None, None


def fast_function(stem: str) -> type[torch.autograd.Function]:
    """What `{stem}_softmax_weight` and its autograd rule do, for eager calls without lengths.

    As in `fastac.ops`: a registered rule costs more than the kernels of a small call. Arguments: x, scores.
    Returns: y.
    """
    forward_op, backward_op = operator(stem), operator(stem, "softmax_weight_backward")

    class FastSoftmaxWeight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, scores: Tensor) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                y: Tensor
                y, stats = forward_op(x, scores, None)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, scores, stats)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            dy = grads[0]
            if dy is None:
                return None, None
            x, scores, stats = ctx.saved_tensors
            need_x, need_scores = ctx.needs_input_grad
            needs = need_x | need_scores << 1
            if torch.is_grad_enabled():  # for a second derivative the rule of the backward is needed
                dx, dscores = backward_op(dy, x, scores, None, stats, needs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    dx, dscores = backward_op(dy, x, scores, None, stats, needs)
            return dx if need_x else None, dscores if need_scores else None

    return FastSoftmaxWeight


def register(stem: str) -> None:
    """Define the two operators of a backend, with everything but their implementation."""
    for kind, schema in _SCHEMAS.items():
        _LIBRARY.define(f"{stem}_{kind}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    forward, backward = f"fastac::{stem}_softmax_weight", f"fastac::{stem}_softmax_weight_backward"
    torch.library.register_fake(forward, _fake_forward, lib=_LIBRARY)
    torch.library.register_fake(backward, _fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        forward, _first_derivative(operator(stem, "softmax_weight_backward")), setup_context=_save_forward,
        lib=_LIBRARY,
    )  # fmt: skip
    torch.library.register_autograd(backward, _second_derivative, setup_context=_save_backward, lib=_LIBRARY)


@functools.cache
def _launch(kind: str) -> Callable[..., Any]:
    """A host function of the Triton kernels. Importing them needs Triton, so the first call does it."""
    module = importlib.import_module(f"{__package__}.kernels.softmax_weight")
    function: Callable[..., Any] = getattr(module, _HOST_FUNCTIONS[kind])
    return function


def _triton(kind: str) -> Callable[..., Any]:
    """The implementation of `triton_{kind}`: the host function on the operator's arguments."""

    def call(*arguments: Any) -> Any:
        return _launch(kind)(*arguments)

    return call


register("cpu")
register("triton")
for _kind in _SCHEMAS:
    # CPU tensors are for Triton's interpreter.
    for _device in ("CUDA", "CPU"):
        _LIBRARY.impl(f"triton_{_kind}", _triton(_kind), _device)
