"""Run as a script under TRITON_INTERPRET=1: each function of one number as the printer writes it, against torch."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

import torch

from attnfx import expr
from attnfx.algebra.evaluate import evaluate
from attnfx.algebra.integers import Ranges
from attnfx.expr import Expr, Load, index
from attnfx.lowering.codegen_print import Body, _bare

REAL = Load(0, (index("j"),), torch.float32)
WHOLE = Load(1, (index("j"),), torch.int64)
EXACT = {
    **{op: expr.call(op, REAL) for op in ("floor", "ceil", "trunc", "round", "abs", "neg")},
    **{op: expr.call(op, WHOLE, expr.integer(12)) for op in ("bitand", "bitor", "bitxor")},
    "quotient": expr.call("floor", expr.div(REAL, expr.constant(3.0, torch.float32))),
    "quotient of numbers": expr.cast(expr.div(expr.cast(WHOLE, torch.float32), expr.constant(7.0, torch.float32)), torch.int64),
}
CLOSE = {
    "log1p": expr.call("log1p", REAL),
    "log2": expr.call("log2", expr.call("abs", REAL)),
    "erf": expr.call("erf", REAL),
}
KERNEL = """
@triton.jit
def kernel(real, whole, out, N: tl.constexpr):
    at = tl.arange(0, N)
    real_, whole_ = tl.load(real + at), tl.load(whole + at)
    {lines}
    tl.store(out + at, {text})
"""


def printed(e: Expr, real: torch.Tensor, whole: torch.Tensor, folder: Path) -> torch.Tensor:
    body = Body({}, {}, {}, Ranges())
    body.names.update({REAL: "real_", WHOLE: "whole_"})
    body.count(e)
    text = _bare(body.text(e))
    path = folder / "written.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n" + KERNEL.format(lines="\n    ".join(body.lines) or "pass", text=text)
    )
    spec = importlib.util.spec_from_file_location(f"written_{abs(hash(e))}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = torch.empty(real.shape, dtype=e.dtype)
    module.kernel[(1,)](real, whole, out, N=real.numel())
    return out


def main() -> None:
    real = torch.cat([torch.linspace(-9, 9, 108), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, 1e-9, -1e-9, 0.0])])
    real = torch.cat([real, torch.tensor([float("inf"), -0.75, 1e-4, -1e-4, 0.1, 3e38, float("nan"), 7, 6, 14, 21])])
    whole = torch.arange(-64, 64)
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        for name, e in {**EXACT, **CLOSE}.items():
            want = evaluate(e, {"j": torch.arange(128)}, [real, whole], {})
            got = printed(e, real, whole, Path(folder))
            if name in EXACT:
                same = (
                    torch.equal(got.nan_to_num(7.5), want.nan_to_num(7.5)) if want.is_floating_point() else torch.equal(got, want)
                )
            else:
                same = torch.allclose(got, want, rtol=2e-6, atol=1e-12, equal_nan=True)
            bad = (
                ""
                if same
                else str([(a, b, c) for a, b, c in zip(real.tolist(), got.tolist(), want.tolist(), strict=True) if a != b])
            )
            print(json.dumps({"name": name, "same": same, "why": bad[:500]}), flush=True)


if __name__ == "__main__":
    main()
