"""What tiles are said to be, against the predicate on every query and key; no tile may be called full or empty that is not."""

import os
import random

import pytest
import sympy
import torch
from torch import Tensor

from attnfx import expr
from attnfx.algebra.evaluate import evaluate, grid_of
from attnfx.algebra.intervals import enclose
from attnfx.algebra.tiling import Tiling, kinds
from attnfx.expr import Expr, Int, Load, index, integer

B, H, I, J = (index(n) for n in "bhij")
SIZE = sympy.Symbol("size", integer=True)
BATCH, HEADS, QUERIES, KEYS = 2, 2, 23, 29
BLOCKS = (expr.floordiv(I, integer(8)), expr.floordiv(J + integer(2), integer(9)))
#: ``ATTNFX_PREDICATES=20000`` tries that many.
COUNT = int(os.environ.get("ATTNFX_PREDICATES", "400"))


def judged(keep: Expr, loads: list[Tensor], rows: int, columns: int, size: int = 5) -> tuple[int, int, int]:
    """How many tiles are said to be full, empty and neither; fails where one that is said so is not."""
    values = {SIZE: size}
    grid = grid_of(BATCH, HEADS, range(QUERIES), range(KEYS), torch.device("cpu"))
    kept = evaluate(keep, grid, loads, values, clamp=True).expand(BATCH, HEADS, QUERIES, KEYS)
    tiling = Tiling(BATCH, HEADS, QUERIES, KEYS, rows, columns)
    must, may = kinds(enclose(keep), tiling, loads, values, torch.device("cpu"))
    height, width = -(-QUERIES // rows), -(-KEYS // columns)
    wide = torch.nn.functional.pad(kept, (0, width * columns - KEYS, 0, height * rows - QUERIES), value=True)
    every = wide.unflatten(3, (width, columns)).unflatten(2, (height, rows)).all(5).all(3)
    wide = torch.nn.functional.pad(kept, (0, width * columns - KEYS, 0, height * rows - QUERIES), value=False)
    some = wide.unflatten(3, (width, columns)).unflatten(2, (height, rows)).any(5).any(3)
    assert not bool((must & ~every).any()), f"not full: {keep}"
    assert not bool((~may & some).any()), f"not empty: {keep}"
    return int(must.sum()), int((~may).sum()), int((may & ~must).sum())


class Drawn:
    """Random formulas, and the tensors that they load."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.loads: list[Tensor] = []

    def load(self, dtype: torch.dtype) -> Expr:
        at = self.random.choice([(I,), (J,), (B, I), (B, J), (H, J), (B,), (I, J), (H, expr.floordiv(I, integer(2))), BLOCKS])
        shape = [{B: BATCH, H: HEADS, I: QUERIES, J: KEYS}.get(x, QUERIES) for x in at]
        values = torch.randint(-4, 5, shape, generator=self.generator)
        if self.random.random() < 0.5:  # runs of ids
            values = values.sort(-1).values
        if dtype.is_floating_point:
            odd = torch.tensor([0.5, float("nan"), float("inf"), float("-inf"), 3e38])
            if self.random.random() < 0.3:
                values = torch.where(values == 3, odd[self.random.randrange(5)], values.float())
            values = values * self.random.choice([1.0, 1.0, 0.37])
        elif dtype == torch.bool:
            values = values > self.random.randint(-5, 4)
        elif dtype in (torch.int64, torch.int32, torch.int8) and self.random.random() < 0.1:
            values = values * (torch.iinfo(dtype).max // 3)
        self.loads.append(values.to(dtype))
        return Load(len(self.loads) - 1, at, dtype)

    def whole(self, depth: int) -> Expr:
        """An integer of positions."""
        pick = self.random.randrange(9 if depth else 3)
        if pick < 2:
            return self.random.choice([I, J])
        if pick == 2:
            return self.random.choice([integer(self.random.randint(-7, 7)), Int(SIZE), B, H])
        a, b = self.whole(depth - 1), self.whole(depth - 1)
        if pick == 3:
            return expr.floordiv(a, self.divisor())
        if pick == 4:
            return expr.mod(a, self.divisor())
        return self.random.choice([expr.add, expr.sub, expr.mul, expr.sub, expr.add])(a, b)

    def divisor(self) -> Expr:
        return self.random.choice([integer(self.random.randint(1, 9)), Int(SIZE)])

    def number(self, depth: int) -> Expr:
        """An integer, loaded in parts."""
        pick = self.random.randrange(12 if depth else 2)
        if pick == 0:
            return self.load(self.random.choice([torch.int64, torch.int32, torch.int8]))
        if pick < 3:
            return self.whole(2)
        a, b = self.number(depth - 1), self.number(depth - 1)
        if pick == 3:
            return expr.call("abs", a)
        if pick == 4:
            return expr.where(self.predicate(depth - 1), a, b, torch.int64)
        if pick == 5:
            return expr.cast(self.predicate(depth - 1), torch.int64)
        if pick == 6:
            return expr.cast(self.real(depth - 1), self.random.choice([torch.int64, torch.int32, torch.uint8]))
        if pick == 7:
            return expr.floordiv(a, self.divisor())
        if pick == 8:
            return expr.mod(a, self.divisor())
        return self.random.choice([expr.add, expr.sub, expr.mul, expr.minimum, expr.maximum])(a, b)

    def real(self, depth: int) -> Expr:
        dtype = self.random.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
        pick = self.random.randrange(10 if depth else 2)
        if pick == 0:
            return self.load(dtype)
        if pick == 1:
            return expr.cast(self.number(max(depth - 1, 0)), dtype)
        a, b = self.real(depth - 1), self.real(depth - 1)
        if pick == 2:
            return expr.cast(a, dtype)
        if pick == 3:
            op = self.random.choice(["abs", "neg", "floor", "exp", "tanh", "sigmoid", "log", "sqrt", "exp2", "sin"])
            return expr.call(op, a)
        if pick == 4:
            return expr.where(self.predicate(depth - 1), a, b, dtype)
        op = self.random.choice(["add", "sub", "mul", "div", "min", "max"])
        same = self.random.random() < 0.2
        return expr.call(op, a, a if same else b)

    def predicate(self, depth: int) -> Expr:
        pick = self.random.randrange(8 if depth else 3)
        if pick == 0:
            return self.load(torch.bool)
        compare = self.random.choice([expr.le, expr.lt, expr.eq, expr.ne])
        if pick == 1:
            return compare(self.whole(2), self.whole(2))
        if pick == 2:
            return compare(self.number(depth), self.number(depth))
        if pick == 3:
            return compare(self.real(depth), self.real(depth))
        a, b = self.predicate(depth - 1), self.predicate(depth - 1)
        if pick == 4:
            return expr.logical_not(a)
        if pick == 5:
            return expr.where(self.predicate(depth - 1), a, b)
        return self.random.choice([expr.logical_and, expr.logical_or, lambda x, y: expr.call("xor", x, y, dtype=torch.bool)])(a, b)


@pytest.mark.parametrize("part", range(4))
def test_random_predicates_are_never_called_what_they_are_not(part: int) -> None:
    full = empty = 0
    for n in range(part, COUNT, 4):
        drawn = Drawn(n)
        keep = drawn.predicate(3)
        rows, columns = drawn.random.choice([1, 4, 7]), drawn.random.choice([1, 3, 8])
        found = judged(keep, drawn.loads, rows, columns, drawn.random.choice([1, 3, 5, 64, 0 if "size" not in str(keep) else 2]))
        full, empty = full + found[0], empty + found[1]
    assert full > 20 * COUNT // 4
    assert empty > 20 * COUNT // 4


def test_documents_are_decided_exactly() -> None:
    ids = torch.tensor([[0] * 8 + [1] * 15, [0] * 4 + [1] * 4 + [2] * 15])
    keep = expr.logical_and(expr.eq(Load(0, (B, I), torch.int64), Load(0, (B, J), torch.int64)), expr.le(J, I))
    wide = torch.cat([ids, ids[:, -1:].expand(2, 6)], 1)
    assert judged(keep, [wide], 4, 4)[2] == 2 * (6 + 6)  # only tiles on the diagonal are neither full nor empty


def test_neighbourhood_of_whole_rows_is_decided() -> None:
    width = integer(8)

    def near(f: object) -> Expr:
        return expr.le(expr.call("abs", expr.sub(f(I, width), f(J, width))), integer(1))  # type: ignore[operator]

    keep = expr.logical_and(near(expr.floordiv), near(expr.mod))
    # 3 x 4 tiles, of which those two rows apart are empty: (0, 2), (0, 3), (1, 3), (2, 0)
    assert judged(keep, [], 8, 8) == (0, BATCH * HEADS * 4, BATCH * HEADS * 8)


def test_a_nan_decides_nothing() -> None:
    data = torch.zeros(KEYS)
    data[3] = float("nan")
    keep = expr.le(Load(0, (J,), torch.float32), expr.lift(1.0))
    full, _, partial = judged(keep, [data], 8, 4)
    assert partial == 2 * 2 * 3
    assert full == 2 * 2 * 3 * 7


def test_what_depends_on_data_of_both_sides_is_not_decided() -> None:
    found = enclose(Load(0, (I, J), torch.bool))
    assert not found.decides
    assert enclose(expr.logical_or(Load(0, (I, J), torch.bool), expr.le(J, I))).decides
