"""Tracing of a CNN to a `WidthGraph`, by running every operation on channel labels.

The network is traced with ``torch.fx`` and run once on the meta device, where tensors have
shapes but no values. Each tensor has labels, one for each entry of its channel axis. A
convolution creates new labels, a sum ties the labels of its operands, and a concatenation or a
shuffle rearranges them. At the end, labels that are tied form a class, and classes that occur
in exactly the same axes form a width variable.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx, nn

from widthopt.errors import AxisError, InputError
from widthopt.tracing.assembly import assemble
from widthopt.tracing.labels import (
    NONE,
    Call,
    Channels,
    Ledger,
    ParameterValue,
    Rule,
    flat,
    has_channels,
    module_of,
    refusal,
    same_channels,
    tied_channels,
    torch_function_name,
)
from widthopt.tracing.rules import FUNCTION_RULES, MODULE_RULES
from widthopt.widthgraph import Stage, WidthGraph


__all__ = ["Call", "Channels", "Rule", "on_meta", "same_channels", "tied_channels", "trace"]

NO_RULE = "no rule describes what it does to channels"

Rules = Mapping[Any, Rule]
"""Rules of the user, by module type or by function."""


def trace(
    model: nn.Module,
    resolution: int = 224,
    *,
    stages: Sequence[tuple[str, Sequence[str]]] = (),
    rules: Rules | None = None,
) -> WidthGraph:
    """Return the width variables and MACs of a network, which is not changed.

    Args:
        model: A network that maps images of shape ``batch 3 height width`` to logits.
        resolution: Side of the square image that MACs are counted for, in pixels.
        stages: The stages, for extrapolation over depth: for each its name and the module names
            of its blocks, in order.
        rules: Rules for operations that have no built-in rule, or a wrong one for this network,
            by module type or by function; see `Call`.

    Raises:
        InputError: ``torch.fx`` cannot trace the forward code, or an operation has no rule.
        AxisError: The resolution is too small for the strides of the network.

    Source: docs/algorithms/morphnet.md, 8.
    """
    rules = rules or {}
    traced = symbolic_trace(on_meta(model).eval(), rules)
    named = {name for name, _ in _values(model)}
    labeller = _Labeller(traced, rules, resolution, parameters=named)
    labeller.run(torch.empty(1, 3, resolution, resolution, device="meta"))
    return assemble(labeller.ledger, tuple(Stage(name, tuple(blocks)) for name, blocks in stages))


def symbolic_trace(model: nn.Module, rules: Rules | None = None) -> fx.GraphModule:
    """Return the network as a ``torch.fx`` graph whose nodes are layers and functions of torch.

    Raises:
        InputError: ``torch.fx`` cannot trace the forward code, because it depends on values.
    """
    leaves = tuple(target for target in rules or {} if isinstance(target, type))
    tracer = _Tracer(leaves)
    try:
        return fx.GraphModule(model, tracer.trace(model))
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"network is {type(model).__name__}, but torch.fx cannot trace it ({reason}); move "
            "the code that depends on values into a separate module and add a rule for it"
        ) from error


def on_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a network on the meta device, without values."""
    memo: dict[int, Any] = {}
    for _, value in _values(model):
        empty = torch.empty_like(value, device="meta")
        memo[id(value)] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def _values(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers with every name that they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


class _Tracer(fx.Tracer):
    """Traces into every module except the layers of torch and those with a rule of the user."""

    def __init__(self, leaves: tuple[type, ...]) -> None:
        super().__init__()
        self._leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)


class _Labeller(fx.Interpreter):
    """Runs the traced network on the meta device, and the rule of each node."""

    def __init__(
        self, module: fx.GraphModule, rules: Rules, resolution: int, *, parameters: AbstractSet[str]
    ) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False  # messages are one line
        self.ledger = Ledger(resolution)
        self._rules = rules
        self._parameters = parameters
        self._labelled: dict[fx.Node, Any] = {}
        self._modules = dict(module.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        """Run one node on the meta device, then its rule."""
        try:
            result = super().run_node(n)
        except (RuntimeError, ValueError, IndexError) as error:
            result = self._run_on_zeros(n, error)
        self._labelled[n] = self._channels(n, result)
        return result

    def _run_on_zeros(self, node: fx.Node, error: Exception) -> Any:
        """Return the shapes of a node with a rule of the user, whose code may read values."""
        module = self._module(node)
        if self._user_rule(node, module) is not None and node.op != "call_method":
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            args, kwargs = fx.node.map_aggregate((args, kwargs), _zeros)
            function: Any = copy.deepcopy(module).to_empty(device="cpu") if module else node.target
            try:
                return fx.node.map_aggregate(function(*args, **kwargs), _to_meta)
            except (RuntimeError, ValueError, IndexError) as second_error:
                error = second_error
        elif node.op.startswith("call") and self._rule(node, module) is None:
            raise refusal(node, module, NO_RULE) from error
        raise AxisError(
            "resolution",
            f"{self.ledger.resolution}, but node `{node.name}` in {module_of(node)} fails on "
            f"images of this size ({str(error).splitlines()[0]}); use a larger resolution, or "
            "check that the network accepts images of this size",
        ) from error

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a parameter, a buffer or a constant of the forward code on the meta device."""
        return _to_meta(super().get_attr(target, args, kwargs))

    def _channels(self, node: fx.Node, result: Any) -> Any:
        if node.op == "placeholder":
            labels = self.ledger.create("image", result.shape[1])
            self.ledger.fixed.append(labels)
            return Channels(labels)
        if node.op == "get_attr":
            known = node.target in self._parameters
            return ParameterValue(str(node.target)) if known else NONE
        if node.op == "output":
            outputs = flat(fx.node.map_arg(node.args, self._labelled.get))
            self.ledger.fixed += [
                output.labels.ravel() for output in outputs if isinstance(output, Channels)
            ]
            return None
        if not any(isinstance(value, torch.Tensor) for value in flat(result)):
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
            shapes=tuple(self._shape(argument) for argument in node.args),
            shape=tuple(result.shape) if isinstance(result, torch.Tensor) else (),
        )
        if not any(has_channels(operand) for operand in flat((call.args, call.kwargs))):
            return NONE  # created by the forward code, or a single number for all channels
        rule = self._rule(node, module)
        if rule is None:
            raise refusal(node, module, NO_RULE)
        return rule(call)

    def _shape(self, argument: Any) -> tuple[int, ...] | None:
        value = self.env.get(argument) if isinstance(argument, fx.Node) else None
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[str(node.target)] if node.op == "call_module" else None

    def _user_rule(self, node: fx.Node, module: nn.Module | None) -> Rule | None:
        return self._rules.get(node.target) if module is None else _by_type(self._rules, module)

    def _rule(self, node: fx.Node, module: nn.Module | None) -> Rule | None:
        rule = self._user_rule(node, module)
        if rule is not None:
            return rule
        if module is None:
            return FUNCTION_RULES.get(torch_function_name(node) or "")
        return _by_type(MODULE_RULES, module)


def _by_type(rules: Rules, module: nn.Module) -> Rule | None:
    """Return the rule of the most derived type of a module that has a rule."""
    return next((rules[kind] for kind in type(module).__mro__ if kind in rules), None)


def _zeros(value: Any) -> Any:
    """Return a tensor of zeros in place of a tensor without values."""
    return torch.zeros_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def _to_meta(value: Any) -> Any:
    """Return a tensor without values in place of a tensor."""
    return value.to("meta") if isinstance(value, torch.Tensor) else value
