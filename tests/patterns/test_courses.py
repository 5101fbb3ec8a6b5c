"""What is done around a softmax is read exactly, in value and every gradient, or left alone with one reason."""

import pytest
import torch
from courses import CASES
from graphs import assert_same, compiled
from torch.utils import _pytree as pytree


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_exactly_or_left_alone(name: str) -> None:
    f, args, formula = CASES[name]
    ours = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    theirs = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
    got, report = compiled(f, *ours)
    want = f(*theirs)
    found = [str(site.site).split("  [")[0] for site in report.sites if site.rewritten]
    assert found == ([f"{formula} v"] if formula else []), [m.reason for m in report.missed]
    assert_same(got, want, 1e-11)
    outputs, expected = pytree.tree_leaves(got), pytree.tree_leaves(want)
    weights = [torch.randn_like(o) for o in expected]
    wanted = [k for k, a in enumerate(theirs) if a.requires_grad]
    mine = torch.autograd.grad(outputs, [ours[k] for k in wanted], weights, allow_unused=True)
    model = torch.autograd.grad(expected, [theirs[k] for k in wanted], weights, allow_unused=True)
    assert [g is None for g in mine] == [g is None for g in model]
    assert_same([g for g in mine if g is not None], [g for g in model if g is not None], 1e-10)


@pytest.mark.parametrize("name", [name for name, (_, _, formula) in CASES.items() if not formula])
def test_what_is_left_alone_has_one_reason(name: str) -> None:
    f, args, _ = CASES[name]
    report = compiled(f, *args)[1]
    assert len({m.node for m in report.missed}) == len(report.missed)
    assert len(report.missed) >= 1 or any(not s.rewritten for s in report.sites)
    assert all(m.reason and m.source for m in report.missed)
