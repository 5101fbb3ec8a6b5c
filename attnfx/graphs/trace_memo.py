"""Equal operations are traced once: what a Dynamo node became in the mirror is written down again for every node like it.

A model repeats its layers, and tracing an operation costs many times what writing its result down costs. Two nodes are alike if
everything that tracing looks at is equal: the operation, its numbers, the sizes, strides, types and shared memory of its tensors,
and the modes around it. A replayed value has no tensor of its own until an operation is traced on it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_slot, track_tensor_tree
from torch.utils import _pytree as pytree

from attnfx.graphs.world import storage_of


class Unlike(Exception):
    """This node is compared with no other."""


@dataclass(frozen=True)
class Form:
    """What tracing looks at in a tensor; sizes and strides are sympy expressions."""

    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    bits: tuple[bool, bool]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.shape, self.stride, self.dtype, self.requires_grad)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    @staticmethod
    def of(t: torch.Tensor) -> Form:
        if t.layout != torch.strided:
            raise Unlike
        exact = tuple(map(_exact, t.shape)), tuple(map(_exact, t.stride()))
        return Form(*exact, t.dtype, t.device, t.requires_grad, (t.is_conj(), t.is_neg()))


def _exact(size: int | torch.SymInt) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


@dataclass(eq=False)
class Twin:
    """The value of a Dynamo node in the mirror: ``node`` holds it (an in-place operation moves it to a newer one), ``memory`` is
    one number for all values that share a storage, ``like`` a fake tensor of its form."""

    form: Form
    like: torch.Tensor
    node: fx.Node
    memory: int
    tensor: torch.Tensor | None = None


@dataclass(frozen=True)
class Ref:
    """In a template: input number ``at``, or node number ``at`` of those made."""

    made: bool
    at: int


@dataclass(frozen=True)
class Made:
    """One mirror node of a template. ``memory``: whose storage its tensor shares, where it has one."""

    target: Any
    args: Any
    kwargs: Any
    value: Any
    memory: Ref | None


@dataclass(frozen=True)
class Template:
    """What one operation is traced to. ``moved``: the inputs that it wrote to, with their newer node and form."""

    made: tuple[Made, ...]
    result: Any
    moved: tuple[tuple[int, int, Form], ...]
    forms: Mapping[int, Form]


@dataclass
class TraceMemo:
    """The templates of one capture, and the values that were replayed from them.

    ``aliases`` gives the memory of storages that were made for replayed values; any other storage is its own memory.
    """

    templates: dict[Hashable, Template | None] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    aliases: dict[int, int] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)

    def key(self, n: fx.Node, env: Mapping[fx.Node, Any], kind: Hashable) -> tuple[Hashable, list[Twin]] | None:
        """What tracing ``n`` to a result of this ``kind`` depends on, and its tensor inputs; None where it may depend on more."""
        if n.op not in ("call_function", "call_method") or torch._C._functorch.peek_interpreter_stack() is not None:
            return None
        if n.op == "call_function" and str(getattr(n.target, "__module__", "torch")).partition(".")[0] not in _PURE:
            return None
        twins: dict[Twin, int] = {}
        try:
            call = n.op, n.target, _spelled(n.args, env, twins), _spelled(n.kwargs, env, twins)
        except Unlike:
            return None
        memories = [t.memory for t in twins]
        shared = tuple(memories.index(m) for m in memories)
        return (*call, kind, tuple(t.form for t in twins), shared, _modes()), list(twins)

    def replay(self, template: Template, inputs: Sequence[Twin], graph: fx.Graph) -> tuple[Any, list[fx.Node]]:
        """The value of a node like the one that ``template`` was made from, and its new mirror nodes."""
        made: list[fx.Node] = []
        memories: dict[int, int] = {}

        def put(leaf: Any) -> Any:
            return leaf if not isinstance(leaf, Ref) else made[leaf.at] if leaf.made else nodes[leaf.at]

        nodes = [t.node for t in inputs]
        for k, step in enumerate(template.made):
            args, kwargs = fx.node.map_aggregate(step.args, put), fx.node.map_aggregate(step.kwargs, put)
            node = graph.create_node("call_function", step.target, args, kwargs)
            node.meta["val"] = step.value
            if step.memory is not None:
                fresh = -1 - len(self.memory)  # storages of real tensors are positive numbers
                owner = step.memory
                memories[k] = inputs[owner.at].memory if not owner.made else memories.get(owner.at, fresh)
                self.memory[node.name] = memories[k]
            made.append(node)
        for at, newer, form in template.moved:
            moved = inputs[at]
            moved.node, moved.like, moved.form, moved.tensor = made[newer], made[newer].meta["val"], form, None

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            if not leaf.made:
                return inputs[leaf.at]
            return Twin(template.forms[leaf.at], made[leaf.at].meta["val"], made[leaf.at], memories[leaf.at])

        return pytree.tree_map(value, template.result), made

    def learn(self, key: Hashable, result: Any, inputs: Sequence[Twin], before: Sequence[fx.Node], made: Sequence[fx.Node]) -> None:
        """Keep what a node was traced to. ``result`` holds twins, ``before`` the nodes of the inputs before the operation."""
        try:
            self.templates[key] = self._template(result, inputs, before, made)
        except Unlike:
            self.templates[key] = None

    def _template(self, result: Any, inputs: Sequence[Twin], before: Sequence[fx.Node], made: Sequence[fx.Node]) -> Template:
        number = {node: Ref(False, k) for k, node in reversed(list(enumerate(before)))}
        number.update({node: Ref(True, k) for k, node in enumerate(made)})
        owners = {t.memory: Ref(False, k) for k, t in reversed(list(enumerate(inputs)))}

        def refer(node: fx.Node) -> Any:
            if node not in number and not isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat):
                raise Unlike
            return number.get(node, node)  # a size is the same number wherever it was computed

        steps = []
        for k, node in enumerate(made):
            if node.op != "call_function":
                raise Unlike
            value = node.meta.get("val")
            memory = owners.setdefault(self.memory_of(node), Ref(True, k)) if isinstance(value, torch.Tensor) else None
            args, kwargs = fx.node.map_arg(node.args, refer), fx.node.map_arg(node.kwargs, refer)
            steps.append(Made(node.target, args, kwargs, value, memory))
        moved = tuple(
            (k, number[t.node].at, t.form) for k, (t, old) in enumerate(zip(inputs, before, strict=True)) if t.node is not old
        )
        forms: dict[int, Form] = {}

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, Twin):
                if isinstance(leaf, torch.Tensor | torch.SymInt | torch.SymFloat | torch.SymBool):
                    raise Unlike
                return leaf
            for k, t in enumerate(inputs):
                if t is leaf:
                    return Ref(False, k)
            forms[number[leaf.node].at] = leaf.form
            return number[leaf.node]

        return Template(tuple(steps), pytree.tree_map(place, result), moved, forms)

    def memory_of(self, node: fx.Node) -> int:
        """The memory that the tensor of a mirror node lies in."""
        if node.name in self.memory:
            return self.memory[node.name]
        storage = storage_of(node.meta["val"])
        return self.aliases.get(storage, storage)

    def tensor(self, twin: Twin, tracer: Any) -> torch.Tensor:
        """The tensor of a value, followed by the tracer as the node that holds it."""
        if twin.tensor is None:
            twin.tensor = _empty(twin.like, twin.form.requires_grad)
            self.kept.append(twin.tensor)
            self.aliases[storage_of(twin.tensor)] = twin.memory
        slot = get_proxy_slot(twin.tensor, tracer, None)
        if slot is None or slot.proxy.node is not twin.node:
            value = twin.node.meta["val"]
            track_tensor_tree(twin.tensor, fx.Proxy(twin.node, tracer), constant=None, tracer=tracer)
            twin.node.meta["val"] = value
        return twin.tensor

    def twins(self, result: Any, inputs: Sequence[Twin], tracer: Any) -> Any:
        """A traced result with every tensor that the tracer follows as a twin: that of an input where the operation returned it."""
        known = {id(t.tensor): t for t in inputs if t.tensor is not None}
        for t in inputs:
            slot = None if t.tensor is None else get_proxy_slot(t.tensor, tracer, None)
            if slot is not None and slot.proxy.node is not t.node:
                t.node, t.form = slot.proxy.node, Form.of(t.tensor)  # type: ignore[arg-type]
                t.like = t.node.meta["val"]

        def twin(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided:
                return leaf
            slot = get_proxy_slot(leaf, tracer, None)
            if slot is None:
                return leaf
            if id(leaf) not in known:
                node = slot.proxy.node
                known[id(leaf)] = Twin(Form.of(leaf), node.meta["val"], node, self.memory_of(node), leaf)
            return known[id(leaf)]

        return pytree.tree_map(twin, result)


def inputs_of(n: fx.Node, env: Mapping[fx.Node, Any]) -> list[Twin]:
    """The values that ``n`` reads."""
    leaves = (leaf for node in n.all_input_nodes for leaf in pytree.tree_leaves(env[node]))
    return list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Twin)))


#: Packages whose functions compute from their arguments alone.
_PURE = ("torch", "_operator", "operator", "math", "builtins", "einops")
_PLAIN = (bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(Ellipsis))


def _spelled(value: Any, env: Mapping[fx.Node, Any], twins: dict[Twin, int]) -> Hashable:
    if isinstance(value, fx.Node):
        value = env[value]
    if isinstance(value, Twin):
        return Ref(False, twins.setdefault(value, len(twins)))
    if isinstance(value, tuple | list):
        return (isinstance(value, tuple), *(_spelled(v, env, twins) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _spelled(v, env, twins)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", *(_spelled(v, env, twins) for v in (value.start, value.stop, value.step)))
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return "symbol", value.node.expr
    if isinstance(value, float):
        return "float", repr(value)
    if isinstance(value, _PLAIN):
        return type(value), value
    raise Unlike


def _modes() -> Hashable:
    autocast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def _empty(like: torch.Tensor, requires_grad: bool) -> torch.Tensor:
    """A fake tensor with memory of its own, which no tracer sees being made."""
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction():
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        if not requires_grad:
            return made
        leaf = made.requires_grad_()
        with torch.enable_grad():
            inner = leaf.clone()  # a leaf cannot be written to in place
        return inner if all(map(_same, inner.stride(), leaf.stride())) else leaf


def _same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return bool(_exact(a) == _exact(b))


def kind(example: Any) -> tuple[Any, ...]:
    """What :func:`difference` compares, of what Dynamo saw."""
    if not isinstance(example, torch.Tensor):
        return (type(example),)
    return torch.Tensor, example.dtype, example.device.type, example.dim()


def difference(result: Any, example: Any, *, ranked: bool = True) -> str | None:
    """How a traced result differs from what Dynamo saw: then tracing missed something, and the result is opaque."""
    if not (isinstance(result, torch.Tensor) and isinstance(example, torch.Tensor)):
        return None
    same = (result.dtype, result.device.type) == (example.dtype, example.device.type)
    if same and (result.dim() == example.dim() or not ranked):
        return None
    return f"it was traced as {result.dtype} of rank {result.dim()} and is {example.dtype} of rank {example.dim()}"
