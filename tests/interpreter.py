"""Triton's interpreter, put right where it computes something else than a GPU.

With TRITON_INTERPRET=1 kernels run in NumPy. That has no bfloat16: the interpreter keeps its bits in uint16,
and Triton 3.6 to 3.9 then
- multiply those bits, as integers, in `tl.dot`;
- truncate float32 -> bfloat16 where a GPU rounds to nearest even, get subnormals wrong in both directions,
  and convert float64 and integers to whatever number has their integer part as its bits;
- give the result of a comparison the dtype of its operands: a scalar one broadcast to a block becomes
  integers, which 3.9 refuses as a mask, or floats, which no `&` takes;
- (3.6) turn the bound of a `range` into an int in a way that NumPy 2.3 deprecates and 2.4 refuses.
`install` replaces these operations. All other arithmetic on bfloat16 is still done on the bits: a kernel
converts to float32 first, as those of fastac do.

It also makes the interpreter about twice as fast on kernels that are split into functions. Every call of one,
`tl.sum` and `tl.zeros` included, patches `triton.language` again, which takes 160 µs; once per launch does.
And it silences NumPy's floating-point warnings inside kernels: NaN and Inf are operands like any other there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

originals: dict[str, Callable[..., Any]] = {}
"""What `install` replaced, by names of ours, for the tests of the patches."""


def install() -> None:
    """Make Triton interpret, and patch its interpreter. Does nothing the second time.

    Raises:
        RuntimeError: triton was imported before without TRITON_INTERPRET=1, so its functions want a compiler.
        ImportError: triton is not installed.
    """
    if originals:
        return
    if "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise RuntimeError(
            "triton was imported without TRITON_INTERPRET=1; "
            "set it, or call interpreter.install(), before anything imports triton"
        )
    os.environ["TRITON_INTERPRET"] = "1"  # read again by every @triton.jit
    builder = interpreter.InterpreterBuilder
    function = interpreter.InterpretedFunction
    executor = interpreter.GridExecutor
    originals.update(
        cast=builder.cast_impl,
        dot=builder.create_dot,
        binary=builder.binary_op,
        patch_tensor=interpreter._patch_lang_tensor,
        call=function.__call__,
        launch=executor.__call__,
    )
    handle = interpreter.TensorHandle

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            src = handle(widen(src.data), tl.float32)
        elif target == tl.bfloat16 and source != tl.bfloat16:
            return handle(round_to_bfloat16(src.data.astype(np.float32)), tl.bfloat16)
        return originals["cast"](self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (handle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return originals["dot"](self, a, b, *rest)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = originals["binary"](self, lhs, rhs, op)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    def patch_tensor(tensor: Any, scope: Any) -> None:
        originals["patch_tensor"](tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    patched: set[int] = set()

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        with np.errstate(all="ignore"):
            return originals["launch"](self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    _cache_types(tl, interpreter)
    builder.cast_impl = cast_impl
    builder.create_dot = create_dot
    builder.binary_op = binary_op
    interpreter._patch_lang_tensor = patch_tensor
    executor.__call__ = launch
    function.__call__ = call


def _cache_types(tl: Any, interpreter: Any) -> None:
    """Describe each shape and dtype once: half of the interpreter's time goes into saying it again."""
    core = tl.core
    make_tensor, make_block = core.tensor.__init__, core.block_type.__init__
    shapes: dict[str, tuple[Any, Any]] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name in shapes:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.numel, self.shape = shapes[type.name]
        else:
            make_tensor(self, handle, type)
            shapes[type.name] = (self.numel, self.shape)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(int, shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    core.tensor.__init__ = tensor
    core.block_type.__init__ = block_type
    numpy_types: dict[str, Any] = {}
    numpy_type = interpreter._get_np_dtype

    def get_np_dtype(type: Any) -> Any:
        name = type.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(type)
        return numpy_types[name]

    interpreter._get_np_dtype = get_np_dtype


def widen(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """The float32 numbers whose upper halves are `bits`: bfloat16 -> float32 is exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the bfloat16 numbers nearest to `x`, ties to even; NaN stays NaN and is quiet."""
    bits = x.view(np.uint32)
    # A carry out of the mantissa is the next power of two, or Inf: what rounding up should give.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x0040, nearest).astype(np.uint16)
