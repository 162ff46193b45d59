"""The operators under `torch.ops.fastac`: schemas, fake kernels, autograd and autocast rules.

Every backend with kernels of its own has one family under its own stem (`cpu_`, ...): `register` makes the
three operators of a stem, and the backend registers implementations only.

    {stem}_inference  y alone; it has no autograd kernel, which is what makes it cheap to call
    {stem}_forward    y, and for the backward: softmax statistics, ||u||, the scores where keeping them pays
    {stem}_backward   the gradients that `needs` asks for, (0,) for the others; itself differentiable

`weight` given is fc1, `scores` given is attention_pool, neither is the average. Shapes: x (B, L, M) or packed
(T, M), weight (N, M), scores (B, N, L) or (N, T), position_bias (N, L_max), alpha and beta (N,),
lengths (B,) int64, mask (B, L) bool, offsets (B + 1,) int64. y (B, N, M) has x.dtype. Of the accumulation
type: stats (3, B, N), the greatest score, the sum of exp(score - greatest) and ||u||; and saved_scores
(B, L, N) or (T, N), empty unless weight is given and save_scores true. max_length bounds the sets of a packed
x; an implementation that needs a bound and is given None takes T, or reads offsets that are on the CPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import checks, reference

_LIBRARY = torch.library.Library("fastac", "DEF")

_INPUTS = (
    "Tensor x, Tensor? weight, Tensor? scores, Tensor? position_bias, Tensor? alpha, Tensor? beta, "
    "Tensor? lengths, Tensor? mask, Tensor? offsets, float eps"
)
_BOUND = "SymInt? max_length=None"
_SCHEMAS = {
    "inference": f"({_INPUTS}, {_BOUND}) -> Tensor",
    "forward": f"({_INPUTS}, bool save_scores, {_BOUND}) -> (Tensor y, Tensor stats, Tensor saved_scores)",
    "backward": f"(Tensor dy, {_INPUTS}, Tensor y, Tensor stats, Tensor saved_scores, int needs, {_BOUND})"
    " -> (Tensor dx, Tensor dweight, Tensor dscores, Tensor dposition_bias, Tensor dalpha, Tensor dbeta)",
}

_ARGUMENTS = {"inference": 11, "forward": 12, "backward": 16}  # how many, max_length included

# The first six inputs are differentiable; bit i of `needs` asks for the gradient of input i.
DIFFERENTIABLE = ("x", "weight", "scores", "position_bias", "alpha", "beta")


def sizes(
    x: Tensor, weight: Tensor | None, scores: Tensor | None, alpha: Tensor | None, offsets: Tensor | None
) -> tuple[int, int, int]:
    """B, N, M of a call."""
    if weight is not None:
        units = weight.size(0)
    elif scores is not None:
        units = scores.size(-2)
    else:
        units = 1 if alpha is None else alpha.numel()
    return x.size(0) if offsets is None else offsets.size(0) - 1, units, x.size(-1)


def keeps_scores(x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the forward keeps the scores for the backward: where they are at most 5 % of x.

    Decided by N, M and the dtype that x is computed in, so a dynamic L cannot change it nor recompile.
    """
    if weight is None:
        return False
    accumulated = reference.accumulation_dtype(dtype).itemsize
    return weight.size(0) * accumulated * 20 <= x.size(-1) * dtype.itemsize


# Fake kernels: shapes and dtypes only


def _fake_inference(
    x: Tensor,
    weight: Tensor | None,
    scores: Tensor | None,
    position_bias: Tensor | None,
    alpha: Tensor | None,
    beta: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    eps: float,
    max_length: int | None = None,
) -> Tensor:
    return x.new_empty(sizes(x, weight, scores, alpha, offsets))


def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, scores, _, alpha, _, _, _, offsets, _, save_scores = rest[:10]
    acc = reference.accumulation_dtype(x.dtype)
    b, n, m = sizes(x, weight, scores, alpha, offsets)
    kept = (*x.shape[:-1], n) if save_scores and weight is not None else (0,)
    return (
        x.new_empty((b, n, m)),
        x.new_empty((3, b, n), dtype=acc),
        x.new_empty(kept, dtype=acc),
    )


def _fake_backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs, needs = rest[:6], rest[13]
    return tuple(
        t.new_empty(t.shape) if t is not None and needs >> i & 1 else (dy if t is None else t).new_empty((0,))
        for i, t in enumerate(inputs)
    )


# Autograd


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps, ctx.max_length = inputs[9], inputs[11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], *output)


def _first_derivative(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Any, ...]]:
    def differentiate(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
        needs = sum(1 << i for i in range(6) if ctx.needs_input_grad[i])
        if dy is None or not needs:
            return (None,) * 12
        inputs, saved = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
        gradients = backward(dy, *inputs, ctx.eps, *saved, needs, ctx.max_length)
        return *(g if needs >> i & 1 else None for i, g in enumerate(gradients)), *(None,) * 6

    return differentiate


def fast_function(stem: str) -> type[torch.autograd.Function]:
    """What `{stem}_forward` and its autograd rule do, for eager calls with weight, alpha and beta at most.

    A registered rule passes through several layers of Python on its way in and out, which cost more than the
    kernels of a small call. Arguments: x, weight, alpha, beta, eps, save_scores. Returns: y.
    """
    forward_op, backward_op = operator(stem, "forward"), operator(stem, "backward")

    class FastCluster(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            x: Tensor,
            weight: Tensor,
            alpha: Tensor | None,
            beta: Tensor | None,
            eps: float,
            save_scores: bool,
        ) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = forward_op(x, weight, None, None, alpha, beta, None, None, None, eps, save_scores)
            ctx.eps = eps
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, weight, alpha, beta, *output)
            y: Tensor = output[0]
            return y

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if grads[0] is None:
                return (None,) * 6
            x, weight, alpha, beta, *saved = ctx.saved_tensors
            asked = ctx.needs_input_grad
            needs = asked[0] | asked[1] << 1 | asked[2] << 4 | asked[3] << 5
            arguments = (
                grads[0], x, weight, None, None, alpha, beta, None, None, None, ctx.eps, *saved, needs
            )  # fmt: skip
            if torch.is_grad_enabled():  # for a second derivative the rule of the backward is needed
                gradients = backward_op(*arguments)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    gradients = backward_op(*arguments)
            found = (gradients[0], gradients[1], gradients[4], gradients[5])
            return *(g if wanted else None for g, wanted in zip(found, asked, strict=False)), None, None

    return FastCluster


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps, ctx.needs, ctx.max_length = inputs[10], inputs[14], inputs[15]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])


def _second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Differentiate the backward in dy and the six inputs, through the reference's own graph.

    y, the statistics and the scores are recomputed from the inputs, so what reaches dy and the inputs is the
    whole derivative and the saved tensors get none.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fastac: second derivatives are not supported under torch.compile; run this part eagerly"
        )
    tensors, layout = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), checks.no_autocast(tensors[0]):
        # A view keeps the graph of an input that has one, for third and higher derivatives.
        leaves: list[Any] = [
            None if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t in tensors
        ]
        arguments: list[Any] = [*leaves[1:], *layout, ctx.eps]
        y = reference.forward(*arguments, max_length=ctx.max_length).y
        asked = [i for i in range(6) if ctx.needs >> i & 1]
        first = torch.autograd.grad(
            y, [leaves[i + 1] for i in asked], leaves[0], create_graph=True, allow_unused=True
        )
        pairs = [
            (f, grads[i])
            for i, f in zip(asked, first, strict=True)
            if f is not None and f.requires_grad and grads[i] is not None
        ]
        targets = [i for i in range(7) if ctx.needs_input_grad[i]]
        second: list[Tensor | None] = [None] * 7
        if pairs and targets:
            found = torch.autograd.grad(
                [f for f, _ in pairs],
                [leaves[i] for i in targets],
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
            for i, gradient in zip(targets, found, strict=True):
                second[i] = gradient
    return *second, *(None,) * 9


# Autocast


def _autocast(call: Callable[..., Any], device: str) -> Callable[..., Any]:
    """Cast x (unless float64) and weight to the autocast dtype, and nothing else."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def cast_and_call(x: Tensor, weight: Tensor | None, *rest: Any) -> Any:
        if x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            x = x.to(dtype)
            weight = None if weight is None else weight.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return call(x, weight, *rest)

    return cast_and_call


def register(stem: str) -> None:
    """Define the three operators of a backend, with everything but their implementation."""
    for kind, schema in _SCHEMAS.items():
        _LIBRARY.define(f"{stem}_{kind}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    fakes: dict[str, Callable[..., Any]] = {
        "inference": _fake_inference,
        "forward": _fake_forward,
        "backward": _fake_backward,
    }
    for kind, fake in fakes.items():
        torch.library.register_fake(f"fastac::{stem}_{kind}", fake, lib=_LIBRARY)

    forward, backward = operator(stem, "forward"), operator(stem, "backward")
    torch.library.register_autograd(
        f"fastac::{stem}_forward", _first_derivative(backward), setup_context=_save_forward, lib=_LIBRARY
    )
    torch.library.register_autograd(
        f"fastac::{stem}_backward", _second_derivative, setup_context=_save_backward, lib=_LIBRARY
    )
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        for kind, op in (("inference", operator(stem, "inference")), ("forward", forward)):
            _LIBRARY.impl(f"{stem}_{kind}", _autocast(op, device), key)


def operator(stem: str, kind: str) -> Callable[..., Any]:
    """`torch.ops.fastac.{stem}_{kind}`, kind one of inference, forward, backward."""
    overload: Callable[..., Any] = getattr(torch.ops.fastac, f"{stem}_{kind}").default
    return overload


# The Triton backend


@functools.cache
def _launch(kind: str) -> Callable[..., Any]:
    """A host function of the Triton kernels. Importing them needs Triton, so the first call does it."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.kernels.launch"), kind)
    return function


def _triton(kind: str) -> Callable[..., Any]:
    """The implementation of `triton_{kind}`: the host function of that name, on the operator's arguments."""

    def call(*arguments: Any) -> Any:
        # The dispatcher leaves out a last argument that equals its default.
        given = len(arguments) == _ARGUMENTS[kind]
        return _launch(kind)(*arguments, *(() if given else (None,)))

    return call


register("cpu")
register("triton")
register("cuda")
for _kind in _SCHEMAS:
    # CPU tensors are for Triton's interpreter.
    for _device in ("CUDA", "CPU"):
        _LIBRARY.impl(f"triton_{_kind}", _triton(_kind), _device)
