"""The rules: how torch's own operations treat channels.

A rule gets a `Call` and returns the `Channels` of the result. Rules never conclude
anything from sizes that happen to be equal; what they cannot be sure of they refuse.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from operator import itemgetter
from typing import Any

import numpy as np
from torch import nn

from widthopt.errors import InputError
from widthopt.tracing.labels import (
    NONE,
    Call,
    Channels,
    LabelledRewrite,
    Labels,
    ParameterValue,
    Rule,
    flat,
    same_channels,
    tie_operands,
    tied_channels,
)


PAIR = 2
"""Axes that the channels lie on between the two views of a channel shuffle."""


def _convolution(call: Call) -> Channels:
    """A dense, depthwise or grouped convolution (specification of MorphNet, section 1.2)."""
    module, reads = call.module, call.args[0]
    assert isinstance(module, nn.modules.conv._ConvNd)  # noqa: SLF001 (their shared base class)
    if reads is NONE or reads.dim != 1 or reads.labels.ndim != 1:
        raise call.refuse("its input has no channels on axis 1")
    _check_strides(call, 1 if module.transposed else module.stride)
    positions = call.before if module.transposed else call.shape
    coefficient = math.prod(positions[2:]) * math.prod(module.kernel_size)
    groups = module.groups
    if groups == 1:
        return call.layer("dense", coefficient, reads)
    if groups == module.in_channels:
        writes = replace(reads, repeat=reads.repeat * (module.out_channels // groups))
        return call.layer("depthwise", coefficient, reads, writes)
    if reads.repeat > 1:
        raise call.refuse("its groups are made of channels that fill several entries")
    writes = call.layer("grouped", coefficient * (module.in_channels // groups), reads)
    for inside, outside in zip(
        reads.labels.reshape(groups, -1), writes.labels.reshape(groups, -1), strict=True
    ):
        both = np.concatenate([inside, outside])  # a group lives or dies as a whole
        call.ledger.tie(both[:-1], both[1:])
    return writes


def _linear(call: Call) -> Channels:
    reads = call.args[0]
    if reads is NONE or reads.dim != len(call.before) - 1 or reads.labels.ndim != 1:
        raise call.refuse("its input has no channels on the last axis")
    return call.layer("dense", math.prod(call.before[1:-1]), reads)


def _check_strides(call: Call, stride: int | Sequence[int]) -> None:
    """A stride needs more than one entry to stride over, else the image is too small."""
    sides = call.before[2:]
    strides = [stride] * len(sides) if isinstance(stride, int) else stride
    for side, step in zip(sides, strides, strict=False):
        if step > 1 and side == 1:
            raise InputError(
                f"resolution is {call.ledger.resolution}, but `{call.name}` strides over a map "
                "of one pixel then; use a larger resolution"
            )


def _pooling(call: Call) -> Any:
    stride = call.module.stride if call.module is not None else call.argument(2, "stride")
    if isinstance(stride, (int, tuple, list)):
        _check_strides(call, stride)
    return call.args[0]


def _normalisation(call: Call) -> Any:
    module, channels = call.module, call.args[0]
    assert module is not None
    if channels is NONE or channels.labels.ndim != 1:
        raise call.refuse("its input's channels are not on one axis")
    if isinstance(module, nn.GroupNorm):
        grouped = channels.labels.reshape(module.num_groups, -1)
        call.ledger.tie(grouped[:-1], grouped[1:])  # as many channels in every group
    last = (
        channels.dim == len(call.shape) - 1 and len(getattr(module, "normalized_shape", " ")) == 1
    )
    if isinstance(module, nn.LayerNorm) and not last:
        raise call.refuse("it normalises other axes than the channels")
    for name, _, earlier in call.ledger.norms:
        if name == call.name:  # called again with the same scales
            tie_operands(call, earlier, channels)
    batch = isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 (their base class)
    call.ledger.norms.append((call.name, batch and bool(module.affine), channels))
    return channels


def _functional_layer_norm(call: Call) -> Any:
    channels = call.args[0]
    if channels is NONE or channels.dim != len(call.shape) - 1:
        raise call.refuse("it normalises other axes than the channels")
    for one in flat((call.args[1:], call.kwargs)):
        if isinstance(one, ParameterValue):
            call.parameter(one.name, 0, channels)
    return channels


def _prelu(call: Call) -> Any:
    module = call.module
    assert isinstance(module, nn.PReLU)
    if module.num_parameters > 1:
        call.parameter(f"{call.name}.weight", 0, call.args[0])
    return call.args[0]


def _concatenation(call: Call) -> Channels:
    parts = call.argument(0, "tensors")
    if any(not isinstance(one, Channels) or one is NONE for one in parts):
        raise call.refuse("it joins tensors with channels to tensors without")
    first: Channels = parts[0]
    if any((one.dim, one.labels.ndim, one.repeat) != (first.dim, 1, first.repeat) for one in parts):
        raise call.refuse("it joins tensors whose channels are laid out differently")
    if call.argument(1, "dim", 0) % len(call.shape) == first.dim:
        return Channels(np.concatenate([one.labels for one in parts]), first.repeat, first.dim)
    for one in parts[1:]:
        tie_operands(call, first, one)
    return first


def _reduction(call: Call) -> Channels:
    channels: Channels = call.args[0]
    dims = call.dims(call.argument(1, "dim"))
    if channels is NONE or channels.dim in dims:
        return NONE  # one number for all channels
    kept = call.argument(2, "keepdim", default=False)
    gone = 0 if kept else sum(dim < channels.dim for dim in dims)
    return replace(channels, dim=channels.dim - gone)


def _permutation(call: Call) -> Channels:
    order = call.argument(1, "dims")
    order = list(order) if isinstance(order, (tuple, list)) else list(call.args[1:])
    return _reorder(call, [dim % len(call.shape) for dim in order])


def _transposition(call: Call) -> Channels:
    one, other = call.dims([call.argument(1, "dim0"), call.argument(2, "dim1")])
    order = list(range(len(call.shape)))
    order[one], order[other] = order[other], order[one]
    return _reorder(call, order)


def _reorder(call: Call, order: Sequence[int]) -> Channels:
    channels: Channels = call.args[0]
    if channels is NONE:
        return NONE
    dim = order.index(channels.dim)
    if channels.labels.ndim == 1:
        return replace(channels, dim=dim)
    second = order.index(channels.dim + 1)
    if abs(second - dim) != 1:
        raise call.refuse("it tears the two axes of a channel shuffle apart")
    if second > dim:
        return replace(channels, dim=dim)
    assert channels.places is not None
    return replace(channels, labels=channels.labels.T, places=channels.places.T, dim=second)


def _reshape(call: Call) -> Channels:
    """A view, reshape or flatten: channels are flattened with what follows, or shuffle."""
    channels: Channels = call.args[0]
    after = call.shape
    if channels is NONE:
        return NONE
    size = call.before[channels.dim]
    place, ahead = 0, math.prod(call.before[: channels.dim])
    while place < len(after) and math.prod(after[:place]) < ahead:
        place += 1
    while place < len(after) - 1 and after[place] == 1 and size > 1:
        place += 1
    if place == len(after) or math.prod(after[:place]) != ahead:
        raise call.refuse("it joins the channels with an axis before them")
    if channels.labels.ndim == PAIR:
        if after[place] != channels.labels.size or channels.places is None:
            raise call.refuse("it splits the channels in a way that is no channel shuffle")
        return call.select(channels.source, channels.places.reshape(-1), place)
    behind = math.prod(call.before[channels.dim + 1 :])
    if after[place] in {channels.entries, channels.entries * behind}:
        return _flatten(call, channels, place)
    pair = after[place : place + PAIR]
    if channels.repeat == 1 and math.prod(pair) == channels.entries:
        call.ledger.sources[call.source] = channels
        places = np.arange(channels.entries).reshape(pair)
        return Channels(channels.labels.reshape(pair), 1, place, call.source, places)
    raise call.refuse("it splits the channels in a way that is no channel shuffle")


def _flatten(call: Call, channels: Channels, place: int) -> Channels:
    """Channels on axis ``place`` of the result, alone or with all that was behind them."""
    size = call.shape[place]
    repeat = channels.repeat * (size // channels.entries)
    result = replace(channels, dim=place, repeat=repeat)
    if any(one == size for one in flat(call.node.args[1:]) if type(one) is int):
        if place != len(call.shape) - 1:
            raise call.refuse("it has a channel count written into it: write -1 there")
        call.ledger.rewrites.append(
            LabelledRewrite(call.node.name, "flatten", call.source, channels, result, np.arange(0))
        )
    return result


def _pick(call: Call, pick: Callable[[Labels], Labels]) -> Channels:
    """Some of the channels of the first argument, in the order that ``pick`` puts them."""
    channels: Channels = call.args[0]
    if channels.labels.ndim != 1:
        raise call.refuse("it cuts through a channel shuffle")
    entries = pick(np.repeat(np.arange(channels.labels.size), channels.repeat))
    places = entries[:: channels.repeat]
    if not np.array_equal(np.repeat(places, channels.repeat), entries):
        raise call.refuse("it cuts a flattened channel in two")
    call.ledger.sources[call.source] = channels
    return Channels(channels.labels[places], channels.repeat, channels.dim, call.source, places)


def _record(call: Call, channels: Channels) -> Channels:
    if channels.places is None:
        return channels
    return call.select(channels.source, channels.places, channels.dim)


def _channel_shuffle(call: Call) -> Channels:
    module: Any = call.module
    groups: int = module.groups if module is not None else call.argument(1, "groups")

    def shuffle(entries: Labels) -> Labels:
        return entries.reshape(groups, -1).T.ravel()

    return _record(call, _pick(call, shuffle))


def _parts(call: Call, ends: Sequence[int], dim: int) -> tuple[Channels, ...]:
    """The pieces of a split; each is recorded where the forward code takes it out."""
    channels: Channels = call.args[0]
    if channels is NONE or dim != channels.dim:
        return tuple(channels for _ in ends)
    pieces = [slice(start, end) for start, end in pairwise([0, *ends])]
    return tuple(_pick(call, itemgetter(piece)) for piece in pieces)


def _chunk(call: Call) -> tuple[Channels, ...]:
    dim = call.dims(call.argument(2, "dim", 0))[0]
    size = call.before[dim]
    step = -(-size // call.argument(1, "chunks"))
    return _parts(call, [min(start + step, size) for start in range(0, size, step)], dim)


def _split(call: Call) -> tuple[Channels, ...]:
    dim = call.dims(call.argument(2, "dim", 0))[0]
    size = call.before[dim]
    lengths = call.argument(1, "split_size_or_sections", call.kwargs.get("split_size"))
    if isinstance(lengths, int):
        ends = [min(start + lengths, size) for start in range(0, size, lengths)]
    else:
        ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
    return _parts(call, ends, dim)


def _item(call: Call) -> Any:
    """Indexing: one of a tuple of tensors, or a slice of one tensor."""
    whole, index = call.args[0], call.args[1]
    if not isinstance(whole, Channels):
        part = whole[index]
        return _record(call, part) if isinstance(part, Channels) else part
    if whole is NONE:
        return NONE
    indices = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in indices:
        at = indices.index(Ellipsis)
        indices[at : at + 1] = [slice(None)] * (len(call.before) - len(indices) + 1)
    indices += [slice(None)] * (len(call.before) - len(indices))
    if not all(isinstance(one, (int, slice)) for one in indices):
        raise call.refuse("it indexes with something other than numbers and slices")
    mine = indices[whole.dim]
    if isinstance(mine, int):
        raise call.refuse("it takes single channels out")
    if mine == slice(None):
        gone = sum(isinstance(one, int) for one in indices[: whole.dim])
        return replace(whole, dim=whole.dim - gone)
    if any(one != slice(None) for one in indices[: whole.dim] + indices[whole.dim + 1 :]):
        raise call.refuse("it slices channels and positions at once")
    return _record(call, _pick(call, lambda entries: entries[mine]))


def _unsqueeze(call: Call) -> Channels:
    channels: Channels = call.args[0]
    if channels is NONE:
        return NONE
    dim = call.argument(1, "dim") % len(call.shape)
    return replace(channels, dim=channels.dim + (dim <= channels.dim))


def _squeeze(call: Call) -> Channels:
    channels: Channels = call.args[0]
    dims = [dim for dim in call.dims(call.argument(1, "dim")) if call.before[dim] == 1]
    if channels is NONE:
        return NONE
    if channels.dim in dims:
        raise call.refuse("it drops the channel axis of one channel")
    return replace(channels, dim=channels.dim - sum(dim < channels.dim for dim in dims))


def _padding(call: Call) -> Any:
    channels: Channels = call.args[0]
    if channels is not NONE and call.shape[channels.dim] != call.before[channels.dim]:
        raise call.refuse("it pads the channels")
    return channels


_SAME_MODULES: tuple[type[nn.Module], ...] = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU,
    nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold, nn.LogSigmoid,
    nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.LocalResponseNorm,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d,
    nn.ConstantPad2d, nn.CircularPad2d,
)  # fmt: skip

MODULE_RULES: dict[type[nn.Module], Rule] = {
    **dict.fromkeys(_SAME_MODULES, same_channels),
    nn.MaxPool1d: _pooling,
    nn.MaxPool2d: _pooling,
    nn.MaxPool3d: _pooling,
    nn.AvgPool1d: _pooling,
    nn.AvgPool2d: _pooling,
    nn.AvgPool3d: _pooling,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _convolution,
    nn.ConvTranspose2d: _convolution,
    nn.ConvTranspose3d: _convolution,
    nn.BatchNorm1d: _normalisation,
    nn.BatchNorm2d: _normalisation,
    nn.BatchNorm3d: _normalisation,
    nn.SyncBatchNorm: _normalisation,
    nn.InstanceNorm1d: _normalisation,
    nn.InstanceNorm2d: _normalisation,
    nn.InstanceNorm3d: _normalisation,
    nn.GroupNorm: _normalisation,
    nn.LayerNorm: _normalisation,
    nn.Linear: _linear,
    nn.PReLU: _prelu,
    nn.Flatten: _reshape,
    nn.ChannelShuffle: _channel_shuffle,
}
"""Rules of torch's layers, by type; a subclass has its base's rule unless it is entered."""

_SAME_FUNCTIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish softplus softsign "
    "sigmoid sigmoid_ tanh tanh_ hardtanh hardtanh_ hardswish hardsigmoid logsigmoid threshold "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
    "adaptive_max_pool2d adaptive_max_pool3d interpolate softmax log_softmax contiguous clone "
    "detach to float half bfloat16 double type_as clamp clamp_ clip neg abs exp log sqrt rsqrt "
    "square local_response_norm"
)

ELEMENTWISE = (
    "add add_ iadd radd sub sub_ isub rsub mul mul_ imul rmul multiply div div_ truediv itruediv "
    "divide maximum minimum max min pow"
)

FUNCTION_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SAME_FUNCTIONS.split(), same_channels),
    **dict.fromkeys(ELEMENTWISE.split(), tied_channels),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"), _pooling),
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenation),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduction),
    **dict.fromkeys(("view", "reshape", "flatten"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes"), _transposition),
    "permute": _permutation,
    "chunk": _chunk,
    "split": _split,
    "getitem": _item,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "pad": _padding,
    "layer_norm": _functional_layer_norm,
    "channel_shuffle": _channel_shuffle,
}
"""Rules of torch's functions and tensor methods, by name."""
