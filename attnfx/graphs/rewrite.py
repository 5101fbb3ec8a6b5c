"""Splice: the only code that edits a graph. It puts one attention node where a site was and removes what only served the
old one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from attnfx.algebra.integer_functions import foreign
from attnfx.algebra.integers import FloorDiv, Max, Min, Mod, PythonMod
from attnfx.graphs.mirror import Mirror, as_sympy, is_tensor
from attnfx.patterns.axes import Axis, Operand
from attnfx.patterns.matcher import Match
from attnfx.patterns.versions import Past, as_read, hidden_by

#: New nodes call operators and not methods: those a compiled graph can be cached with.
_ATEN: Any = torch.ops.aten
_COMBINED: dict[type, Callable[..., Any]] = {sympy.Add: operator.add, Max: torch.sym_max, Min: torch.sym_min}
#: Methods whose result depends on the strides of what they are called on.
_STRIDE_SENSITIVE = frozenset(("view", "view_as", "as_strided", "stride", "is_contiguous", "data_ptr", "storage_offset"))
#: Operations that give memory of their own, in an order that does not depend on what they read, or any view that there is.
_FRESH = frozenset((
    "matmul", "bmm", "mm", "baddbmm", "addmm", "linear", "einsum", "layer_norm", "rms_norm", "cat", "stack", "sum", "mean", "amax",
    "scaled_dot_product_attention", "attention", "vendor_attention",
))  # fmt: skip
#: Operations that copy or not, depending on the strides of what they are called on.
_PERHAPS_COPIES = frozenset(("reshape", "contiguous", "flatten", "reshape_as"))


class Splicer:
    """Edits one Dynamo graph by the matches of its mirror."""

    def __init__(self, gm: fx.GraphModule, mirror: Mirror) -> None:
        self.gm, self.graph, self.mirror = gm, gm.graph, mirror
        self.made: list[fx.Node] = []
        self.replaced: list[fx.Node] = []
        self.results: list[fx.Node] = []
        self.copies: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self.until: fx.Node
        #: Row sums and maxima of the last site, the model's and the new ones.
        self.rows: list[tuple[fx.Node, fx.Node]] = []

    def splice(self, match: Match, call: Callable[..., fx.Node]) -> fx.Node:
        """Replace the site by ``call(query, key, value, loads)``, made with canonical (B,H,M,D) operands. Returns the new node.

        Leaves the graph as it was if anything goes wrong. What only served the old site stays until :meth:`prune`.
        """
        old = self.mirror.dynamo_of.get(match.candidate.output)
        if old is None:
            maker = self.mirror.origin.get(match.candidate.output)
            raise LookupError(f"the result of the attention is inside another operation, {maker}")
        self.made, self.until, self.rows = [], match.candidate.output, []
        try:
            first = match.candidate.first
            with self.graph.inserting_before(old if first is None else self.mirror.origin[first]):
                core, result = self._build(match, call, old)
        except BaseException:
            self.copies = {k: copy for k, copy in self.copies.items() if copy not in self.made}
            for node in reversed(self.made):
                self.graph.erase_node(node)
            lost = set(self.made)
            self.mirror.dynamo_of = {m: d for m, d in self.mirror.dynamo_of.items() if d not in lost}
            raise
        for before, made in ((old, result), *self.rows):
            made.meta = {**before.meta, **{k: v for k, v in made.meta.items() if k not in ("example_value", "val")}}
        old.replace_all_uses_with(result)
        self.mirror.dynamo_of[match.candidate.output] = result
        self.replaced.append(old)
        self.results += [result, *(made for _, made in self.rows)]
        for row, made in self.rows:
            # what read a row before is a part of the site, or the model's own business still
            for user in [n for n in row.users if core < n]:
                user.replace_input_with(row, made)
            self.mirror.dynamo_of[self.mirror.value[row]] = made
            self.replaced.append(row)
        return core

    def _build(self, match: Match, call: Callable[..., fx.Node], old: fx.Node) -> tuple[fx.Node, fx.Node]:
        layout = match.layout
        heads = (*layout.heads, *layout.groups)
        query = self.arranged(match, match.query, (layout.batch, heads, (layout.i,), (layout.d,)))
        key = self.arranged(match, match.key, (layout.batch, layout.heads, (layout.j,), (layout.d,)))
        for more_query, more_key, d in match.further:
            beside = self.arranged(match, more_query, (layout.batch, heads, (layout.i,), (d,)))
            query = self.call(_ATEN.cat.default, [query, beside], -1)
            beside = self.arranged(match, more_key, (layout.batch, layout.heads, (layout.j,), (d,)))
            key = self.call(_ATEN.cat.default, [key, beside], -1)
        for factor, operand in match.factors:
            target = operator.truediv if factor.divides else operator.mul
            if factor.keys:
                by = self.arranged(match, operand, (layout.batch, layout.heads, (layout.j,), ()))
                key = self.scaled(target, key, by, match.key, operand)
            else:
                rows = (layout.batch, heads, (layout.i,), ())
                by = self.arranged(match, operand, rows) if operand.axes else self.held(factor.node, factor.node)
                query = self.scaled(target, query, by, match.query, operand)
        value = self.arranged(match, match.value, (layout.batch, layout.heads, (layout.j,), layout.width))
        # Under autocast the model's contractions read narrower operands than the graph shows.
        query, key, value = (
            node if operand.node.meta["val"].dtype == match.site.dtype else self.call(_ATEN.to.dtype, node, match.site.dtype)
            for node, operand in ((query, match.query), (key, match.key), (value, match.value))
        )
        loads = [self.kept(self.held(past.node, past.after), past.node, match) for past in match.loads]
        for operand, place in () if match.band is None else match.band.operands:
            made = self.kept(self.arranged(match, operand, place), operand.node, match)
            narrow = operand.node.meta["val"].dtype == match.site.dtype
            loads.append(made if narrow else self.call(_ATEN.to.dtype, made, match.site.dtype))
        core = called = call(query, key, value, loads)
        self.made.append(core)
        if match.rows:
            core = self.call(operator.getitem, called, 0)
        for name in ("nn_module_stack", "source_fn_stack", "stack_trace"):
            if name in old.meta:
                called.meta[name] = old.meta[name]
        if notes := {**(old.meta.get("custom") or {}), **called.meta.get("custom", {})}:
            called.meta["custom"] = notes
        axes: list[Axis] = [layout.batch, heads, (layout.i,)]
        for kind, row in match.rows:
            known = self.mirror.dynamo_of[row.node]
            part = self.call(operator.getitem, called, 1 if kind == "sum" else 2)
            self.rows.append((known, self.kept(self.restored(match, part, known, row, axes), row.node, match)))
        axes.append(layout.width)
        return called, self.kept(self.restored(match, core, old, match.output, axes), match.candidate.output, match)

    def scaled(self, target: Any, node: fx.Node, by: fx.Node, of: Operand, factor: Operand) -> fx.Node:
        """``node * by`` or ``node / by`` in the dtype of the operand ``of``."""
        made, dtype = self.call(target, node, by), of.node.meta["val"].dtype
        wider = bool(factor.axes) and torch.promote_types(dtype, factor.node.meta["val"].dtype) != dtype
        return self.call(_ATEN.to.dtype, made, dtype) if wider else made

    def kept(self, made: fx.Node, node: fx.Node, match: Match) -> fx.Node:
        """``made``, or a copy where the model writes to it later: the backward pass reads what the operator was given and gave."""
        later = match.site.requires_grad and self.mirror.written_after(node, match.candidate.output)
        return self.call(_ATEN.clone.default, made) if later else made

    # Operands -----------------------------------------------------------------------------------------------------------

    def arranged(self, match: Match, operand: Operand, target: Sequence[Axis]) -> fx.Node:
        """``operand`` as a four-dimensional tensor whose axes carry ``target``; views wherever its strides allow."""
        node = self.held(operand.node, operand.after or operand.node)
        if tuple(operand.axes) == tuple(target):
            return node
        named = [tuple(s for s in axis if any(s in group for group in target)) for axis in operand.axes]  # the others have size one
        parts = [part for axis in named for part in ([axis] if axis in target else [(s,) for s in axis]) if part]
        if parts != list(operand.axes):
            node = self.reshaped(node, match, parts)
        wanted = [part for group in target for part in ([group] if group in parts else [(s,) for s in group]) if part]
        order = [parts.index(part) for part in wanted if part in parts]
        if order != list(range(len(parts))):
            node = self.call(_ATEN.permute.default, node, order)
        for k, part in enumerate(wanted):
            if part not in parts:
                node = self.call(_ATEN.unsqueeze.default, node, k)
        if any(part not in parts and self.extent(match, part) != 1 for part in wanted):
            lengths = [-1 if part in parts else self.number(self.extent(match, part)) for part in wanted]
            node = self.call(_ATEN.expand.default, node, lengths)
        return node if wanted == list(target) else self.reshaped(node, match, target)

    def restored(self, match: Match, core: fx.Node, old: fx.Node, output: Operand, axes: list[Axis]) -> fx.Node:
        """The attention's result with ``axes``, (B,H,M,Dv) or (B,H,M), as the node it replaces: same axes, sizes and dtype, and
        strides where something looks at them."""
        # An axis that no operand has is one that the model broadcast, a query axis that vanished in a view: their sizes are one.
        target = [tuple(s for s in axis if any(s in group for group in axes)) for axis in output.axes]
        node = core
        if target != axes:
            parts = [part for group in axes for part in ([group] if group in target else [(s,) for s in group]) if part]
            if parts != axes:
                node = self.reshaped(node, match, parts)
            atoms = [part for axis in target for part in ([axis] if axis in parts else [(s,) for s in axis]) if part]
            order = [parts.index(part) for part in atoms] + [k for k, part in enumerate(parts) if part not in atoms]
            if order != list(range(len(parts))):
                node = self.call(_ATEN.permute.default, node, order)
            if [parts[k] for k in order] != list(output.axes):
                node = self.reshaped(node, match, output.axes)
        dtype = output.node.meta["val"].dtype
        if dtype != match.site.dtype or output is not match.output:
            node = self.call(_ATEN.to.dtype, node, dtype)
        if not (stride_sensitive(old) or self.shared_by_strides(old)):
            return node
        example, traced = old.meta.get("example_value", old.meta.get("val")), output.node.meta["val"]
        # An example whose axes the model changes in place later shows the later ones.
        same = isinstance(example, torch.Tensor) and example.dim() == traced.dim()
        return self.laid_out(node, memory_order(example if same else traced))

    def shared_by_strides(self, old: fx.Node) -> bool:
        """Whether strides decide that a later write to a reshaped ``old`` is one to ``old`` itself."""
        since, queue, seen = self.mirror.value[old], list(old.users), set[fx.Node]()
        while queue:
            user = queue.pop()
            value = self.mirror.value.get(user)
            if user in seen or value is None or _name(user) in _FRESH:
                continue
            seen.add(user)
            queue += user.users
            if _name(user) in _PERHAPS_COPIES and self.mirror.written_after(value, since):
                return True
        return False

    def laid_out(self, node: fx.Node, order: list[int]) -> fx.Node:
        """``node`` with its axes in memory in the given order, that of the model's own result."""
        if order == sorted(order):
            return self.call(_ATEN.contiguous.default, node)
        moved = self.call(_ATEN.contiguous.default, self.call(_ATEN.permute.default, node, order))
        return self.call(_ATEN.permute.default, moved, [order.index(k) for k in range(len(order))])

    def held(self, node: fx.Node, after: fx.Node) -> fx.Node:
        """``node`` as it was after the write ``after``: the tensor itself, or a copy taken before the first later write."""
        hidden = hidden_by(self.mirror, Past(node, after), self.until)
        if hidden is None:
            return self.value(node)
        writer = self.mirror.origin[hidden]
        if (node, writer) not in self.copies:
            with self.graph.inserting_before(writer):
                self.copies[node, writer] = self.call(_ATEN.clone.default, self.mirror.holder(node))
        return self.copies[node, writer]

    def value(self, node: fx.Node) -> fx.Node:
        """The Dynamo node that holds a mirror node's value; computed anew from ATen where it is inside another operation."""
        known = self.mirror.dynamo_of.get(node)
        if known is not None:
            return known
        if node.name.startswith("opaque_"):
            return self.mirror.origin[node]
        if not isinstance(node.target, torch._ops.OpOverload | type(operator.getitem)):
            raise LookupError(f"{node.name} cannot be reached from the graph")
        read = {n: as_read(self.mirror, n, node).after for n in node.all_input_nodes if is_tensor(n)}
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda n: self.held(n, read[n]) if n in read else self.value(n), (tuple(node.args), dict(node.kwargs))
        )
        made = self.call(node.target, *args, **kwargs)
        self.mirror.dynamo_of[node] = made
        return made

    # Sizes --------------------------------------------------------------------------------------------------------------

    def extent(self, match: Match, axis: Axis) -> sympy.Expr:
        return sympy.expand(sympy.Mul(*(match.extents.sizes[s] for s in axis)))

    def reshaped(self, node: fx.Node, match: Match, axes: Sequence[Axis]) -> fx.Node:
        return self.call(_ATEN.reshape.default, node, [self.number(self.extent(match, axis)) for axis in axes])

    def number(self, e: sympy.Expr) -> int | fx.Node:
        """A size as an int or as a node computed from the graph's SymInt inputs."""
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            return self._symbol(e)
        if foreign(e):
            raise LookupError(f"the size {e} cannot be computed in the graph")
        args = [self.number(a) for a in e.args]
        if isinstance(e, FloorDiv | Mod | PythonMod):
            return self.call(operator.floordiv if isinstance(e, FloorDiv) else operator.mod, *args)
        if e.is_Pow:
            args = [args[0]] * int(e.args[1])
        total = args[0]
        for a in args[1:]:
            total = self.call(_COMBINED.get(type(e), operator.mul), total, a)
        return total

    def _symbol(self, s: sympy.Symbol) -> fx.Node:
        user = self.mirror.to_user.get(s)
        for placeholder in self.graph.find_nodes(op="placeholder"):
            example = placeholder.meta.get("example_value")
            if isinstance(example, torch.SymInt) and as_sympy(example) == user:
                return placeholder  # type: ignore[no-any-return]
        for placeholder in self.graph.find_nodes(op="placeholder"):  # an exported graph has no inputs that are sizes
            example = placeholder.meta.get("val")
            for axis, size in enumerate(example.shape if isinstance(example, torch.Tensor) else ()):
                if isinstance(size, torch.SymInt) and as_sympy(size) == user:
                    return self.call(_ATEN.sym_size.int, placeholder, axis)
        raise LookupError(f"the size {s} is not an input of the graph")

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        self.made.append(self.graph.call_function(target, args, kwargs))
        return self.made[-1]

    # Removal ------------------------------------------------------------------------------------------------------------

    def prune(self) -> None:
        """Remove the replaced nodes, those of their ancestors that nothing reads any more, and what was made of these in vain.

        An in-place write goes only together with everything that shares its memory, once nobody outside reads any of it.
        """
        alive = list(self.graph.nodes)
        ancestors, idle = _with_ancestors(alive, set(self.replaced)), self._idle()
        while found := [n for n in alive if n in idle and n not in ancestors and not ancestors.isdisjoint(n.all_input_nodes)]:
            ancestors = _with_ancestors(alive, ancestors.union(found))
        written = {at for at, _ in self.mirror.mutations}
        writers = {self.mirror.origin[m] for m, at in self.mirror.position.items() if at in written and m in self.mirror.origin}
        dead: set[fx.Node] = set()
        while True:
            before = len(dead)
            for node in reversed(alive):
                if node in ancestors and node not in dead and node not in writers and self._pure(node) and set(node.users) <= dead:
                    dead.add(node)
            for group in self._memory(dead).values():
                inside = dead.union(group)
                if group & ancestors and all(self._pure(n) and n.op != "get_attr" and set(n.users) <= inside for n in group):
                    dead |= group
            if len(dead) == before:
                break
        for node in reversed(alive):
            if node in dead:
                self.graph.erase_node(node)
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for name in {str(node.target) for node in dead if node.op == "get_attr"} - read:
            if isinstance(getattr(self.gm, name, None), fx.GraphModule):
                delattr(self.gm, name)  # a function that only a removed call was given

    def _pure(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method", "get_attr") and node not in self.mirror.blind

    def _idle(self) -> set[fx.Node]:
        """The Dynamo nodes none of whose values ever reached an output of the graph."""
        live = {self.mirror.origin.get(m) for m in self.mirror.graph.nodes if self.mirror.live(m)}
        return set(self.mirror.makers) - live

    def _memory(self, dead: set[fx.Node]) -> dict[int, set[fx.Node]]:
        """The living nodes that share each storage that is written in place, and those that write it."""
        written = {storage for _, storage in self.mirror.mutations}
        groups: dict[int, set[fx.Node]] = {}
        moved = self._moved()
        for node, value in self.mirror.value.items():
            storage = self.mirror.storage.get(value)
            if storage in written and node not in dead and node not in moved:
                groups.setdefault(storage, set()).add(node)
        nodes = {self.mirror.position[n]: n for n in self.mirror.graph.nodes}  # a derived node stands before the one at its place
        writes: dict[fx.Node, set[int]] = {}
        for at, storage in self.mirror.mutations:
            if nodes[at] in self.mirror.origin:
                writes.setdefault(self.mirror.origin[nodes[at]], set()).add(storage)
        for writer, storages in writes.items():
            if len(storages) == 1 and writer not in dead and writer not in moved and not storages.isdisjoint(groups):
                groups[next(iter(storages))].add(writer)
        return groups

    def _moved(self) -> set[fx.Node]:
        """What shared memory with the result of a site and shares that of the new one now."""
        held = {self.mirror.storage.get(self.mirror.value[old]) for old in self.replaced} - {None}
        moved, queue = set[fx.Node](), list(self.results)
        while queue:
            for user in queue.pop().users:
                value = self.mirror.value.get(user)
                if user not in moved and value is not None and self.mirror.storage.get(value) in held:
                    moved.add(user)
                    queue.append(user)
        return moved


def _with_ancestors(order: Sequence[fx.Node], chosen: set[fx.Node]) -> set[fx.Node]:
    found = set(chosen)
    for node in reversed(order):
        if node in found:
            found.update(node.all_input_nodes)
    return found


def memory_order(example: object) -> list[int]:
    """The axes of a tensor from the slowest to the fastest in memory; nothing is asked of symbolic strides but their hints."""
    if not isinstance(example, torch.Tensor):
        return []

    def hint(x: Any) -> int:
        return int(x.node.hint or 0) if isinstance(x, torch.SymInt) else int(x)

    axes = [k for k in range(example.dim()) if hint(example.shape[k]) != 1]  # the stride of an axis of size one means nothing
    ordered = iter(sorted(axes, key=lambda k: -hint(example.stride(k))))
    return [next(ordered) if k in axes else k for k in range(example.dim())]


def stride_sensitive(node: fx.Node) -> bool:
    """Whether something reads the strides of ``node``, or of what keeps them (a view, an operation element by element)."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            name = _name(user)
            if user.op == "output" or name in _STRIDE_SENSITIVE:
                return True
            if user not in seen and name not in _FRESH and name not in _PERHAPS_COPIES:
                seen.add(user)
                queue.append(user)
    return False


def _name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
