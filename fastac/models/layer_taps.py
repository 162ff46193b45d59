"""The feature maps of layers of a CNN, by name: forward hooks that go away."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from difflib import get_close_matches
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_SHOWN = 20


def _unknown(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=5)
    if close:
        return f"layers must be modules of the CNN, got {name!r}; close are {', '.join(close)}"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"layers must be modules of the CNN, got {name!r}; known are {', '.join(known[:_SHOWN])}{more}"


def checked_layers(cnn: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """The modules of a CNN by their names, in the order given.

    Raises: TypeError for what is no sequence of str; ValueError for none, a repeated or an unknown name.
    """
    if not isinstance(cnn, nn.Module):
        raise TypeError(f"cnn must be a torch.nn.Module, got {type(cnn).__name__}")
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a sequence of names, got {type(layers).__name__}")
    if not layers:
        raise ValueError("layers must have at least one name, got none")
    # A module that stands at several places has several names.
    known = {name: module for name, module in cnn.named_modules(remove_duplicate=False) if name}
    found: dict[str, nn.Module] = {}
    for name in layers:
        if not isinstance(name, str):
            raise TypeError(f"layers must be names of type str, got {name!r}")
        if name not in known:
            raise ValueError(_unknown(name, list(known)))
        if name in found:
            raise ValueError(f"layers must be distinct, got {name!r} twice")
        found[name] = known[name]
    return found


class LayerTaps:
    """Keeps what layers of a CNN put out, from now until ``remove``, or for a ``with`` statement.

        with LayerTaps(cnn, ["layer3", "layer4"]) as taps:
            cnn(frames)
            maps = taps.maps()

    A map is a copy, differentiable: a later layer that works in place does not change it. The taps see the
    forwards of the thread that made them, one at a time; other threads may have their own on the same CNN.
    What a statement in the ``with`` raises leaves no hook either.

    Args:
        cnn: any module.
        layers: names as in ``cnn.named_modules()``.

    Raises: TypeError for a wrong type; ValueError for no name, a repeated one, or an unknown one, with the
        close or known names.
    """

    def __init__(self, cnn: nn.Module, layers: Sequence[str]) -> None:
        modules = checked_layers(cnn, layers)
        self._thread = threading.get_ident()  # hooks are the module's, whoever calls it
        self._outputs: dict[str, list[Any]] = {name: [] for name in modules}
        self._handles: list[RemovableHandle] = [cnn.register_forward_pre_hook(self._begin)]
        for name, module in modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def _begin(self, *_: object) -> None:
        if threading.get_ident() == self._thread:
            self._clear()

    def _clear(self) -> None:
        for outputs in self._outputs.values():
            outputs.clear()

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            if threading.get_ident() != self._thread:
                return
            outputs = self._outputs[name]
            # The first is enough to say that a second one came.
            outputs.append(output.clone() if isinstance(output, Tensor) and not outputs else output)

        return keep

    def maps(self) -> list[Tensor]:
        """The maps (F, C, H, W) of the CNN's last forward, in the order of the names, given out once.

        Raises: RuntimeError, with the name, for a layer that did not run or ran more than once; ValueError or
            TypeError for one whose output is no tensor (F, C, H, W).
        """
        maps: list[Tensor] = []
        for name, outputs in self._outputs.items():
            if not outputs:
                raise RuntimeError(f"layer {name!r} must run once in a forward of the CNN, it did not run")
            if len(outputs) > 1:
                raise RuntimeError(
                    f"layer {name!r} must run once in a forward of the CNN, it ran {len(outputs)} times"
                )
            output = outputs[0]
            if not isinstance(output, Tensor):
                raise TypeError(f"layer {name!r} must put out a tensor, got {type(output).__name__}")
            if output.dim() != 4:
                raise ValueError(
                    f"layer {name!r} must put out maps of shape (F, C, H, W), got {tuple(output.shape)}"
                )
            maps.append(output)
        self._clear()
        return maps

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._clear()

    def __enter__(self) -> LayerTaps:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
