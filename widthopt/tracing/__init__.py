"""Any CNN to a `WidthGraph`, by running every operation on channel labels.

The network is traced with ``torch.fx`` and run once on the meta device, where only shapes
exist. Beside each tensor travel labels, one for each entry of its channel axis. A
convolution mints fresh labels, a sum ties those of its operands, a concatenation or a
shuffle rearranges them. In the end, labels that were tied form a class, and classes that
occur in exactly the same axes form a width variable.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx, nn

from widthopt.errors import InputError
from widthopt.tracing.assembly import assemble
from widthopt.tracing.labels import (
    NONE,
    Call,
    Channels,
    Ledger,
    ParameterValue,
    Rule,
    flat,
    place,
    refusal,
    same_channels,
    tied_channels,
    torch_function_name,
)
from widthopt.tracing.rules import FUNCTION_RULES, MODULE_RULES
from widthopt.widthgraph import Stage, WidthGraph


__all__ = ["Call", "Channels", "Rule", "on_meta", "same_channels", "tied_channels", "trace"]

NO_RULE = "there is no rule for what it does to channels"

Rules = Mapping[Any, Rule]
"""Rules of a user's own, by module type or by function."""


def trace(
    model: nn.Module,
    resolution: int = 224,
    *,
    stages: Sequence[tuple[str, Sequence[str]]] = (),
    rules: Rules | None = None,
) -> WidthGraph:
    """The width variables and MACs of a network; the network itself is left as it is.

    Args:
        model: Takes images of shape ``batch 3 height width`` and gives logits.
        resolution: Side of the square image that MACs are counted for, in pixels.
        stages: Where stages and blocks lie, for extrapolation over depth: names, each with
            the module names of its blocks in order.
        rules: Rules for operations that have none here or whose rule is wrong for this
            network: by module type or by function, see `Call`.

    Raises:
        InputError: ``torch.fx`` cannot follow the forward code, an operation has no rule, or
            the resolution is too small for the network's strides.

    Source: specification of MorphNet, part II, section 8.
    """
    rules = rules or {}
    traced = symbolic_trace(on_meta(model).eval(), rules)
    named = {name for name, _ in _values(model)}
    labeller = _Labeller(traced, rules, resolution, parameters=named)
    labeller.run(torch.empty(1, 3, resolution, resolution, device="meta"))
    return assemble(labeller.ledger, tuple(Stage(name, tuple(blocks)) for name, blocks in stages))


def symbolic_trace(model: nn.Module, rules: Rules | None = None) -> fx.GraphModule:
    """The network as a ``torch.fx`` graph whose nodes are torch's layers and functions.

    Raises:
        InputError: The forward code depends on values in a way that ``torch.fx`` cannot follow.
    """
    leaves = tuple(one for one in rules or {} if isinstance(one, type))
    tracer = _Tracer(leaves)
    try:
        return fx.GraphModule(model, tracer.trace(model))
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"network is {type(model).__name__}, but torch.fx cannot trace it ({reason}); move "
            "what depends on values into a module of its own and give that a rule"
        ) from error


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of a network whose parameters and buffers are shapes without values."""
    memo: dict[int, Any] = {}
    for _, value in _values(model):
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by every name that they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Tracer(fx.Tracer):
    """Enters every module but torch's own layers and those with a rule of the user's."""

    def __init__(self, leaves: tuple[type, ...]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


class _Labeller(fx.Interpreter):
    """Runs the traced network on the meta device, and the rules beside it."""

    def __init__(
        self, module: fx.GraphModule, rules: Rules, resolution: int, *, parameters: AbstractSet[str]
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # our messages are one line
        self.ledger = Ledger(resolution)
        self._rules = rules
        self._parameters = parameters
        self._labelled: dict[fx.Node, Any] = {}
        self._modules = dict(module.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        """One node: its shapes on the meta device, then its channels."""
        try:
            result = super().run_node(n)
        except (RuntimeError, ValueError, IndexError) as error:
            result = self._run_on_zeros(n, error)
        self._labelled[n] = self._channels(n, result)
        return result

    def _run_on_zeros(self, node: fx.Node, error: Exception) -> Any:
        """The shapes of a node with a rule of the user's, whose code may look at values."""
        module = self._module(node)
        if self._own_rule(node, module) is not None and node.op != "call_method":
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            args, kwargs = fx.node.map_aggregate((args, kwargs), _zeros)
            called: Any = copy.deepcopy(module).to_empty(device="cpu") if module else node.target
            try:
                return fx.node.map_aggregate(called(*args, **kwargs), _shape)
            except (RuntimeError, ValueError, IndexError) as again:
                error = again
        elif node.op.startswith("call") and self._rule(node, module) is None:
            raise refusal(node, module, NO_RULE) from error
        raise InputError(
            f"resolution is {self.ledger.resolution}, but node `{node.name}` in {place(node)} "
            f"cannot run on such an image ({str(error).splitlines()[0]}); use a larger resolution, "
            "or check that the network takes images of that size"
        ) from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A parameter or buffer, or a constant of the forward code, as a shape."""
        return _shape(super().get_attr(target, args, kwargs))

    def _channels(self, node: fx.Node, result: Any) -> Any:
        if node.op == "placeholder":
            labels = self.ledger.mint("image", result.shape[1])
            self.ledger.fixed.append(labels)
            return Channels(labels)
        if node.op == "get_attr":
            known = node.target in self._parameters
            return ParameterValue(str(node.target)) if known else NONE
        if node.op == "output":
            outputs = flat(fx.node.map_arg(node.args, self._labelled.get))
            self.ledger.fixed += [
                one.labels.ravel() for one in outputs if isinstance(one, Channels)
            ]
            return None
        if not any(isinstance(one, torch.Tensor) for one in flat(result)):
            return result  # sizes, and arithmetic on them
        return self._apply_rule(node, result)

    def _apply_rule(self, node: fx.Node, result: Any) -> Any:
        module = self._module(node)
        call = Call(
            ledger=self.ledger,
            node=node,
            module=module,
            args=tuple(fx.node.map_arg(node.args, self._labelled.__getitem__)),
            kwargs=dict(fx.node.map_arg(node.kwargs, self._labelled.__getitem__)),
            shapes=tuple(self._shape(one) for one in node.args),
            shape=tuple(result.shape) if isinstance(result, torch.Tensor) else (),
        )
        operands = list(flat((call.args, call.kwargs)))
        if not any(isinstance(one, Channels) and one is not NONE for one in operands):
            return NONE  # made by the forward code, or one number for all channels
        rule = self._rule(node, module)
        if rule is None:
            raise refusal(node, module, NO_RULE)
        return rule(call)

    def _shape(self, argument: Any) -> tuple[int, ...] | None:
        value = self.env.get(argument) if isinstance(argument, fx.Node) else None
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _own_rule(self, node: fx.Node, module: nn.Module | None) -> Rule | None:
        if module is None:
            return self._rules.get(node.target)
        return next((self._rules[one] for one in type(module).__mro__ if one in self._rules), None)

    def _rule(self, node: fx.Node, module: nn.Module | None) -> Rule | None:
        own = self._own_rule(node, module)
        if own is not None:
            return own
        if module is None:
            return FUNCTION_RULES.get(torch_function_name(node) or "")
        return next(
            (MODULE_RULES[one] for one in type(module).__mro__ if one in MODULE_RULES), None
        )


def _zeros(value: Any) -> Any:
    """A tensor of zeros for one without values."""
    return torch.zeros_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def _shape(value: Any) -> Any:
    """A tensor without values for one that may have them."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value
