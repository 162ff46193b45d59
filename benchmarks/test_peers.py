"""The contenders: what they compute is what they say, the gate closes on each, and reasons are kept."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import correctness
from .measure import make_ready
from .peers import (
    ANOTHER,
    PEERS,
    SAME,
    Compiled,
    Eager,
    Flex,
    MaxAutotune,
    Mean,
    NetVlad,
    Prepared,
    PreparedPooling,
    SetTransformer,
    TimmStyle,
    Unavailable,
    latent_attention,
    reason_of,
)
from .timing import Staged
from .workloads import MODES, Case, Workload, make_case

SMALL = Workload("small", 4, 7, 32, 5, "tests")
RAGGED = replace(SMALL, name="small ragged", ragged=True)
GIVEN = replace(SMALL, name="small given", scores="given")
CASES = [SMALL, RAGGED, GIVEN]

POOLINGS = [TimmStyle, NetVlad, Mean]
"""Those that need nothing but torch and this package."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def reasons_of(case: Case, prepared: dict[str, Prepared]) -> dict[tuple[str, str], str]:
    failures: dict[tuple[str, str], str] = {}
    correctness.check(case, prepared, MODES, failures=failures)
    return failures


def test_every_contender_says_what_it_computes() -> None:
    assert {name: c.computes for name, c in PEERS.items()} == {
        "eager": SAME,
        "compile": SAME,
        "compile-max-autotune": SAME,
        "sdpa": SAME,
        "flex": SAME,
        "timm-style": ANOTHER,
        "set-transformer": ANOTHER,
        "netvlad": ANOTHER,
        "mean": ANOTHER,
    }
    assert all(c.note and name == c.name for name, c in PEERS.items())


@pytest.mark.parametrize("workload", CASES, ids=lambda w: w.name)
@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda p: p.name)
def test_other_poolings_pass_the_gate(pooling: Any, workload: Workload) -> None:
    case = make_case(workload)
    failures = reasons_of(case, {pooling.name: pooling().prepare(case)})
    assert list(failures) == ([("mean", "frozen")] if pooling is Mean else [])


@pytest.mark.parametrize("workload", CASES, ids=lambda w: w.name)
def test_the_set_transformer_passes_the_gate(workload: Workload) -> None:
    pytest.importorskip("torch_geometric", reason="torch-geometric is not installed")
    case = make_case(workload)
    assert reasons_of(case, {"set-transformer": SetTransformer().prepare(case)}) == {}


def test_sizes_of_the_results() -> None:
    case = make_case(RAGGED)
    shapes = {p.name: tuple(p().prepare(case).closure("forward")()[0].shape) for p in POOLINGS}
    assert shapes == {"timm-style": (4, 5, 32), "netvlad": (4, 5 * 32), "mean": (4, 32)}


def test_the_mean_is_that_of_the_valid_rows() -> None:
    case = make_case(RAGGED)
    assert case.offsets is not None
    sets = torch.split(case.x, case.offsets.diff().tolist())
    (y,) = Mean().prepare(case).closure("forward")()
    torch.testing.assert_close(y, torch.stack([s.mean(0) for s in sets]))


def test_latent_attention_is_multihead_attention() -> None:
    m, heads = 24, 4
    torch.manual_seed(0)
    x, latents = torch.randn(3, 9, m, dtype=torch.float64), torch.randn(5, m, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1]])
    q, kv, out = (nn.Linear(m, k, dtype=torch.float64) for k in (m, 2 * m, m))
    theirs = nn.MultiheadAttention(m, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat((q.weight, kv.weight)))
        theirs.in_proj_bias.copy_(torch.cat((q.bias, kv.bias)))
    theirs.out_proj = out
    expected, _ = theirs(latents.expand(3, -1, -1), x, x, key_padding_mask=~mask)
    torch.testing.assert_close(latent_attention(x, latents, q, kv, out, heads, mask), expected)


Spoil = Callable[[Any, Tensor, Tensor | None], Tensor]


def spoiled(change: Callable[[PreparedPooling], Spoil], workload: Workload = RAGGED) -> None:
    case = make_case(workload)
    prepared = TimmStyle().prepare(case)
    correctness.check(case, {"timm-style": replace(prepared, call=change(prepared))}, MODES)


def test_the_gate_closes_on_another_pooling_that_rounds() -> None:
    def change(prepared: PreparedPooling) -> Spoil:
        def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
            y = prepared.call(module, x, mask)
            return y.to(torch.bfloat16).to(y.dtype) if y.dtype == torch.float32 else y

        return call

    with pytest.raises(correctness.Red, match="y of timm-style"):
        spoiled(change)


def test_the_gate_closes_on_another_pooling_with_a_wrong_gradient() -> None:
    def change(prepared: PreparedPooling) -> Spoil:
        def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
            y = prepared.call(module, x, mask)
            return y.detach() + 1.01 * (y - y.detach()) if y.dtype == torch.float32 else y

        return call

    with pytest.raises(correctness.Red, match="backward: dx of timm-style"):
        spoiled(change)


def test_the_gate_closes_where_excluded_rows_count() -> None:
    def change(prepared: PreparedPooling) -> Spoil:
        return lambda module, x, mask: prepared.call(module, x, None)

    spoiled(change, SMALL)
    with pytest.raises(correctness.Red, match="y with other excluded rows of timm-style"):
        spoiled(change, RAGGED)


def test_the_gate_closes_on_a_gradient_of_an_excluded_row() -> None:
    def change(prepared: PreparedPooling) -> Spoil:
        def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
            touched = x.sum() - x.detach().sum()  # 0, with a gradient of 1 everywhere
            return prepared.call(module, x, mask) + touched

        return call

    with pytest.raises(correctness.Red, match="excluded rows have a gradient"):
        spoiled(change)


@pytest.mark.full
@pytest.mark.parametrize("workload", [SMALL, RAGGED], ids=lambda w: w.name)
def test_flex_computes_the_same_and_says_what_it_cannot(workload: Workload) -> None:
    flex = Flex()
    if flex.why_not is not None:
        pytest.skip(flex.why_not)
    case = make_case(workload)
    prepared = flex.prepare(case)
    failures = reasons_of(case, {"flex": prepared})
    assert ("flex", "forward") not in failures
    assert all("backward" in why for why in failures.values())
    compiled = torch._dynamo.utils.counters["stats"]
    before = compiled["unique_graphs"]
    prepared.closure("forward")()  # the modes that failed have undone nothing
    assert compiled["unique_graphs"] == before
    wrong = flex.prepare(case)
    right = wrong.call
    wrong = replace(wrong, call=lambda *operands: right(*operands) * 1.01)
    with pytest.raises(correctness.Red, match="forward: y of flex"):
        correctness.check(case, {"flex": wrong}, ["forward"])


def test_scores_that_are_given_are_no_work_for_flex() -> None:
    with pytest.raises(Unavailable, match="scores are given"):
        Flex().prepare(make_case(GIVEN))


def test_tuning_has_a_budget() -> None:
    tuned = MaxAutotune(budget=0)
    with pytest.raises(Unavailable, match=r"the 0 s a run has for tuning are spent|does not work here"):
        tuned.prepare(make_case(SMALL))


def test_tuning_notes_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without compiling: one mode that fails leaves the others, and the next workload goes without."""

    def compiled(self: Compiled, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, *others: Tensor) -> Tensor:
            if x.requires_grad:
                raise RuntimeError("no tile fits\n  and more")
            return function(x, *others)

        return call

    monkeypatch.setattr(Compiled, "compiled", compiled)
    tuned = MaxAutotune(budget=1e-9)
    if tuned.why_not is not None:
        pytest.skip(tuned.why_not)
    case = make_case(SMALL)
    prepared = tuned.prepare(case)
    reason = "RuntimeError: no tile fits"
    assert prepared.reasons == {"training": reason, "backward": reason}
    assert "compile-max-autotune: compiling and tuning took" in capsys.readouterr().err
    assert reasons_of(case, {"tuned": prepared}) == {
        ("tuned", mode): reason for mode in ("training", "backward")
    }
    with pytest.raises(Unavailable, match="tuning are spent"):
        tuned.prepare(case)


def test_what_is_compiled_for_a_case_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of earlier cases is forgotten, that of another contender of the same case is not."""
    resets: list[None] = []
    monkeypatch.setattr(torch, "compile", lambda function, **more: function)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(None))
    for k in (1, 2):
        case = make_case(SMALL)
        for contender in (Compiled(), MaxAutotune(), Flex()):
            contender.prepare(case)
        assert len(resets) == k


def test_the_reason_is_what_was_raised() -> None:
    def refuse(x: Tensor) -> Tensor:
        raise NotImplementedError("no backward on this device")

    for call in (refuse, torch.compile(refuse, fullgraph=True, backend="eager")):
        with pytest.raises(Exception, match="no backward") as raised:
            call(torch.ones(2))
        assert re.fullmatch(r"NotImplementedError\W+no backward on this device\W*", reason_of(raised.value))
    assert reason_of(Unavailable("no scores")) == "no scores"
    assert reason_of(RuntimeError("")) == "RuntimeError"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("torch_geometric"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **more)

    for name in [n for n in sys.modules if n.startswith("torch_geometric")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    ready = make_ready(make_case(SMALL), {"ours": Eager(), "set-transformer": SetTransformer()}, MODES)
    why = "torch-geometric is not installed (pip install 'fastac[peers]')"
    assert ready.reasons == {("set-transformer", mode): why for mode in MODES}


def test_a_contender_that_fails_in_one_mode_is_there_in_the_others() -> None:
    class Half(Eager):
        def prepare(self, case: Case) -> Prepared:
            prepared = super().prepare(case)
            right = prepared.call

            def call(x: Tensor, *others: Tensor) -> Tensor:
                if x.requires_grad:
                    raise NotImplementedError("no gradient of x\nsecond line")
                return right(x, *others)

            return replace(prepared, call=call)

    ready = make_ready(make_case(SMALL), {"ours": Eager(), "half": Half()}, MODES)
    why = "NotImplementedError: no gradient of x"
    assert ready.reasons == {("half", "training"): why, ("half", "backward"): why}
    assert {mode: list(ready.closures(mode, SAME)) for mode in MODES} == {
        "forward": ["ours", "half"],
        "training": ["ours"],
        "frozen": ["ours", "half"],
        "backward": ["ours"],
    }


def test_what_ours_raises_is_never_a_reason() -> None:
    class Broken(Eager):
        def prepare(self, case: Case) -> Prepared:
            def call(*operands: Tensor) -> Tensor:
                raise RuntimeError("broken")

            return replace(super().prepare(case), call=call)

    for name in ("ours", "ours (mask)"):
        with pytest.raises(RuntimeError, match="broken"):
            make_ready(make_case(SMALL), {name: Broken()}, MODES)


def test_ours_by_another_name_is_held_to_the_bounds_of_ours() -> None:
    case = make_case(SMALL)
    right = Eager().prepare(case)
    off = replace(right, call=lambda *operands: right.call(*operands) * (1 + 1e-5))
    correctness.check(case, {"peer": off}, ["forward"])
    with pytest.raises(correctness.Red, match=r"y of ours \(mask\)"):
        correctness.check(case, {"ours (mask)": off}, ["forward"])


def test_the_backward_alone_gives_the_gradients_of_training() -> None:
    for prepared in (Eager().prepare(make_case(RAGGED)), TimmStyle().prepare(make_case(RAGGED))):
        backward = prepared.closure("backward")
        assert isinstance(backward, Staged)
        for a, b in zip(backward(), prepared.closure("training")()[1:], strict=True):
            assert torch.equal(a, b)
        state = backward.setup()
        assert state.grad_fn is not None
        with pytest.raises(RuntimeError, match="second time"):
            backward.run(state), backward.run(state)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of forward, .* got 'sideways'"):
        Eager().prepare(make_case(SMALL)).closure("sideways")


def test_a_wrong_peer_has_no_figures_and_says_why() -> None:
    case = make_case(RAGGED)
    prepared = TimmStyle().prepare(case)

    def call(module: Any, x: Tensor, mask: Tensor | None) -> Tensor:
        y = prepared.call(module, x, mask)
        return 1.01 * y if y.dtype == torch.float32 else y

    found = reasons_of(case, {"timm-style": replace(prepared, call=call)})
    assert set(found) == {("timm-style", mode) for mode in MODES}
    for why in found.values():
        assert re.match(r"wrong result, (y|dx) of timm-style: rms error 1.00e-02", why)
