"""Runs the cases of few queries in Triton's interpreter (TRITON_INTERPRET=1) and prints one JSON line each; names select."""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any

import torch
from decode_cases import catalogue, few_queries, run

from attnfx.lowering.decode import Tile


def main(names: list[str]) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)  # poisons torch.empty with NaN
    for number, case in enumerate([*catalogue(), *few_queries()]):
        # Triton 3.7's interpreter multiplies the bits of bfloat16 as integers: that case is for a GPU
        if case.dtype == torch.bfloat16 or not any(case.name.startswith(part) for part in names):
            continue
        try:
            # 1, 3, or more shares than there are tiles of keys: some get none
            splits = (3, 1, 20)[number % 3]
            errors = run(case, torch.device("cpu"), splits, Tile(32, 4, 2), gradients=case.name.startswith("few -1e4 added"))
            row: dict[str, Any] = {"case": case.name, "errors": errors}
        except Exception:
            row = {"case": case.name, "failure": traceback.format_exc()[-3000:]}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
