"""Fitting the networks of NeuralBias on what a model does: its pair representations and biases, captured from its own calls."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnfx import expr, patterns
from attnfx.api import fresh
from attnfx.biases.pair_bias import PairNodes, pair_behind
from attnfx.biases.pair_file import save
from attnfx.biases.pair_network import Layers, PairNetwork, factors, features
from attnfx.errors import AttnfxError
from attnfx.expr import Load
from attnfx.graphs.capture import capture
from attnfx.graphs.composites import expand_composites
from attnfx.graphs.origin import origin_of
from attnfx.policies.globs import Glob

#: Features (P, N, 3 C) and the row-centred bias (P, H, N, N) of one call.
Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Fitted:
    """What :func:`fit_neural_bias` wrote to ``path``: ``networks`` by module path, with their errors."""

    path: str
    networks: Mapping[str, PairNetwork]

    def __str__(self) -> str:
        return "\n".join(
            f"{module}: error {n.error:.3g} (at most {n.largest:.3g}) of a bias of {n.size:.3g}, row means apart"
            for module, n in self.networks.items()
        )


def fit_neural_bias(
    model: Any,
    inputs: Sequence[Any],
    layer: str,
    path: str | os.PathLike[str],
    *,
    rank: int = 96,
    width: int = 256,
    steps: int = 2000,
    rate: float = 1e-3,
    seed: int = 0,
) -> Fitted:
    """Fit networks to the pair biases of every attention whose module path matches the glob ``layer``, and write them to ``path``.

    ``inputs`` are the calls to learn from, each a tuple of arguments or a dict of named ones. The model runs on each, without
    gradients, and stays as it is. ``rank`` and ``width`` are the paper's. With four calls or more, the last quarter is kept back,
    and the errors are of that; else of what was learnt from. Raises AttnfxError where no such attention has a pair bias.
    """
    samples, reasons = _captured(model, inputs, Glob(layer))
    if not samples:
        why = " ".join(dict.fromkeys(reasons)) or f'No attention has a module path like "{layer}".'
        raise AttnfxError(f"There is nothing to fit. {why}")
    networks = {module: _fit(found, rank, width, steps, rate, seed) for module, found in samples.items()}
    save(path, networks)
    return Fitted(os.fspath(path), networks)


def _captured(model: Any, inputs: Sequence[Any], glob: Glob) -> tuple[dict[str, list[Sample]], list[str]]:
    """The samples of each module, in the order of ``inputs``; and why others have none."""
    samples: dict[str, list[Sample]] = {}
    reasons: list[str] = []

    def look(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        work, wanted, why = _wanted(gm, glob)
        reasons.extend(why)
        return _Recorder(work, wanted, samples).run

    with fresh(), torch.no_grad():
        seen: Any = torch.compile(model, backend=look, dynamic=False)
        for call in inputs:
            seen(**call) if isinstance(call, Mapping) else seen(*call)
    return samples, reasons


@dataclass(frozen=True)
class _Wanted:
    module: str
    pair: fx.Node
    bias: fx.Node
    order: tuple[int, ...]


def _wanted(gm: fx.GraphModule, glob: Glob) -> tuple[fx.GraphModule, list[_Wanted], list[str]]:
    """A graph that computes what ``gm`` does, and its nodes to be recorded."""
    work = fx.GraphModule(gm, _copied(gm.graph))
    mirror = capture(work)
    if expand_composites(work, mirror):
        mirror = capture(work)
    found, why = list[_Wanted](), list[str]()
    for match in patterns.recognise(mirror)[0]:
        module = origin_of(mirror, match.candidate.output).module
        if not glob.matches(module):
            continue
        loads = [n for n in expr.walk(match.site.score) if isinstance(n, Load)]
        pairs = [pair_behind(mirror, match, n) for n in loads if expr.depends_on(n, "i") and expr.depends_on(n, "j")]
        nodes = next((p for p in pairs if isinstance(p, PairNodes) and p.bias in mirror.dynamo_of), None)
        if nodes is None:
            reasons = [p for p in pairs if isinstance(p, str)] or ["nothing of query and key is added to its scores"]
            why.append(f"{module}: {'; '.join(reasons)}.")
            continue
        found.append(_Wanted(module, mirror.dynamo_of[nodes.node], mirror.dynamo_of[nodes.bias], nodes.order))
    return work, found, why


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


class _Recorder(fx.Interpreter):
    """Runs a graph eagerly, noting a sample at each projection of a bias."""

    def __init__(self, gm: fx.GraphModule, wanted: list[_Wanted], samples: dict[str, list[Sample]]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.at, self.samples = {w.bias: w for w in wanted}, samples

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if (wanted := self.at.get(n)) is not None:
            pair, bias = (t.detach().permute(wanted.order) for t in (self.env[wanted.pair], result))
            bias = bias.permute(0, 3, 1, 2).float()
            self.samples.setdefault(wanted.module, []).append((features(pair), bias - bias.mean(-1, keepdim=True)))
        return result


def _fit(samples: list[Sample], rank: int, width: int, steps: int, rate: float, seed: int) -> PairNetwork:
    kept_back = len(samples) // 4
    learnt, judged = samples[: len(samples) - kept_back], samples[-kept_back:] if kept_back else samples
    tokens = torch.cat([f.flatten(0, 1) for f, _ in learnt])
    mean, spread = tokens.mean(0), tokens.std(0).clamp_min(1e-6)
    heads, device = learnt[0][1].shape[1], tokens.device
    with torch.random.fork_rng([device.index or 0] if device.type == "cuda" else []), torch.enable_grad():
        torch.manual_seed(seed)
        nets = [[_layer(tokens.shape[1], width), _layer(width, width), _layer(width, heads * rank)] for _ in range(2)]
        layers = [[t.to(device).requires_grad_() for pair in net for t in pair] for net in nets]
        wanted = [t for each in layers for t in each]
        optimiser = torch.optim.Adam(wanted, lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for step in range(steps):
            found, bias = learnt[step % len(learnt)]
            u, v = factors(tuple(layers[0]), tuple(layers[1]), heads, (found - mean) / spread)
            loss = (u @ v.mT - bias).square().mean()
            for t, grad in zip(wanted, torch.autograd.grad(loss, wanted), strict=True):
                t.grad = grad
            optimiser.step()
            schedule.step()
    query, key = (_folded(each, mean, spread) for each in layers)
    left = torch.cat([_error(query, key, heads, *sample).flatten() for sample in judged])
    size = torch.cat([bias.flatten() for _, bias in judged])
    return PairNetwork(query, key, heads, _rms(left), float(left.abs().max()), _rms(size))


def _layer(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    made = nn.Linear(inputs, outputs)
    return made.weight.detach(), made.bias.detach()


def _folded(layers: list[Tensor], mean: Tensor, spread: Tensor) -> Layers:
    """Layers of features as they are, from layers of features whose mean and spread were taken out."""
    weight, bias, *rest = (t.detach() for t in layers)
    weight = weight / spread
    return weight, bias - weight @ mean, *rest


def _error(query: Layers, key: Layers, heads: int, found: Tensor, bias: Tensor) -> Tensor:
    u, v = factors(query, key, heads, found)
    return u @ v.mT - bias


def _rms(t: Tensor) -> float:
    return float(t.square().mean().sqrt())
