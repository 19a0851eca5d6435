"""3×3 convolutions by Winograd's algorithm, for the compiled training step on a CPU.

F(4×4, 3×3) computes 4×4 outputs of a 3×3 convolution from 6×6 inputs (Lavin & Gray 2016, "Fast Algorithms for
Convolutional Neural Networks"). With d a tile of the input, g the filter, ⊙ the product of elements:

    Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

Summed over the input channels the products are 36 matrix products, a quarter of the multiplications of the direct way.
The transforms are sums of a few neighbours, fast only where a compiler fuses them into one loop that works on a vector of
channels at a time: without `torch.compile` these layers are ordinary ones. The gradients take the same way: that of the
input is a convolution with the turned filters, that of the filters a sum over tiles between the same transforms.

The transforms are compiled by themselves, once for each shape, and the step's own graph holds them as operators: written out
in every layer they would take the compiler minutes.

The error is some four times that of the direct way, and still rounding: 2e-6 of the result's norm in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUT, IN = 4, 6  # sides of an output and of an input tile
CHANNELS = 64
"""Fewest channels in and out: below, the transforms cost what the products save."""

# Interpolation at 0, 1, -1, 2, -2 and infinity.
# fmt: off
_INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)
_FILTER = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
# fmt: on


class WinogradConv2d(nn.Conv2d):
    """A convolution that takes Winograd's way where it is compiled and the map is whole tiles in float32.

    Made by `adopt` from an ordinary one; parameters, names and state stay what they were.
    """

    transformed: Tensor | None = None
    """The filters in the transform's domain [36,O,I], where they never change."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the base class calls it so
        sides = input.shape[2:]
        if not torch.compiler.is_compiling() or input.dtype != torch.float32 or any(side % OUT for side in sides):
            return super().forward(input)
        learned = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if self.transformed is None or learned:  # a frozen layer may stand behind a learned one: TAS's assistants
            result = _Convolution.apply(input, self.weight)
        else:
            result = _convolution(input, self.transformed)
        return result if self.bias is None else result + self.bias[:, None, None]


def adopt(network: nn.Module, *, frozen: bool) -> int:
    """Let every convolution of `network` take Winograd's way that gains by it; gives their number.

    Args:
        network: on the CPU, to be compiled; it computes the same to rounding, and is the same network in every other way.
        frozen: its weights never change again: the filters are transformed once, now.
    """
    found = [module for module in network.modules() if type(module) is nn.Conv2d and _gains(module)]
    for layer in found:
        layer.__class__ = WinogradConv2d
        if frozen:
            with torch.no_grad():
                layer.transformed = filters_of(layer.weight)  # type: ignore[assignment]
    return len(found)


def _gains(layer: nn.Conv2d) -> bool:
    plain = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    wide = min(layer.in_channels, layer.out_channels) >= CHANNELS
    return (
        plain and wide and layer.groups == 1 and layer.padding_mode == "zeros" and layer.weight.dtype == torch.float32
    )


class _Convolution(torch.autograd.Function):
    """x [B,I,H,W] and filters [O,I,3,3] to [B,O,H,W]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolution(x, _transformed(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        turned = weight.flip(2, 3).transpose(0, 1)
        to_x = _convolution(gradient, _transformed(turned)) if ctx.needs_input_grad[0] else None
        to_weight = _weight_gradient(gradient, x) if ctx.needs_input_grad[1] else None
        return to_x, to_weight


@torch.library.custom_op("kdcli::winograd", mutates_args=())
def _convolution(x: Tensor, filters: Tensor) -> Tensor:
    """x [B,I,H,W] and transformed filters [36,O,I] to [B,O,H,W], channels last."""
    return _compiled(convolve, x, filters)(x, filters)


@_convolution.register_fake
def _(x: Tensor, filters: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return x.new_empty(b, h, w, filters.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("kdcli::winograd_filters", mutates_args=())
def _transformed(weight: Tensor) -> Tensor:
    """Filters [O,I,3,3] to [36,O,I]."""
    return _compiled(filters_of, weight)(weight)


@_transformed.register_fake
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(IN * IN, *weight.shape[:2])


@torch.library.custom_op("kdcli::winograd_weight_gradient", mutates_args=())
def _weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of the outputs [B,O,H,W] and inputs [B,I,H,W] to that of the filters [O,I,3,3]."""
    return _compiled(weight_gradient, gradient, x)(gradient, x)


@_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(gradient.shape[1], x.shape[1], 3, 3)


def _compiled(function: Callable[..., Tensor], *tensors: Tensor) -> Callable[..., Tensor]:
    return _compiled_for(function, *((tuple(x.shape), x.stride(), x.dtype) for x in tensors))


@functools.cache
def _compiled_for(function: Callable[..., Tensor], *_: object) -> Callable[..., Tensor]:
    # A code object of its own for each shape: the compiler gives up on one that it has met in eight shapes.
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, dynamic=False)


def convolve(x: Tensor, filters: Tensor) -> Tensor:
    """x [B,I,H,W] and transformed filters [36,O,I] to [B,O,H,W], channels last."""
    return _outputs(torch.bmm(_tiles(x), filters.transpose(1, 2)), x.shape)


def filters_of(weight: Tensor) -> Tensor:
    """G g Gᵀ: filters [O,I,3,3] → [36,O,I]."""
    values = _both(_FILTER, [[weight[:, :, i, j] for j in range(3)] for i in range(3)])
    return torch.stack([value for line in values for value in line])


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradient of the outputs [B,O,H,W] and inputs [B,I,H,W] to Gᵀ u G, that of the filters [O,I,3,3]."""
    products = torch.bmm(_output_gradient(gradient).transpose(1, 2), _tiles(x))
    u = products.view(IN, IN, *products.shape[1:])
    values = _both(_columns(_FILTER), [[u[i, j] for j in range(IN)] for i in range(IN)])
    return torch.stack([torch.stack(line, -1) for line in values], -2)


def _tiles(x: Tensor) -> Tensor:
    """Bᵀ d B of every tile: [B,C,H,W] → [36,T,C] with T = B·H/4·W/4 tiles."""
    b, c, h, w = x.shape
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    row, column = (w + 2) * c, c
    # As strides of one buffer the tiles overlap, and the compiler reads them without an index to check.
    shape, strides = (b, h // OUT, w // OUT, IN, IN, c), ((h + 2) * row, OUT * row, OUT * column, row, column, 1)
    tiles = padded.contiguous().as_strided(shape, strides)
    values = _both(_INPUT, [[tiles[:, :, :, i, j] for j in range(IN)] for i in range(IN)])
    return torch.stack([value for line in values for value in line]).reshape(IN * IN, -1, c)


def _outputs(products: Tensor, shape: Sequence[int]) -> Tensor:
    """Aᵀ m A of every tile's products: [36,T,O] → [B,O,H,W], channels last."""
    b, _, h, w = shape
    c = products.shape[-1]
    m = products.view(IN, IN, b, h // OUT, w // OUT, c)
    values = _both(_OUTPUT, [[m[i, j] for j in range(IN)] for i in range(IN)])
    rows = [torch.stack(line, 3).reshape(b, h // OUT, w * c) for line in values]
    return torch.stack(rows, 2).view(b, h, w, c).permute(0, 3, 1, 2)


def _output_gradient(gradient: Tensor) -> Tensor:
    """A y Aᵀ of every tile: [B,O,H,W] → [36,T,O], what `_outputs` is the adjoint of."""
    b, c, h, w = gradient.shape
    tiles = gradient.permute(0, 2, 3, 1).contiguous().view(b, h // OUT, OUT, w // OUT, OUT, c)
    values = _both(_columns(_OUTPUT), [[tiles[:, :, i, :, j] for j in range(OUT)] for i in range(OUT)])
    return torch.stack([value for line in values for value in line]).reshape(IN * IN, -1, c)


def _both(matrix: Sequence[Sequence[float]], grid: list[list[Tensor]]) -> list[list[Tensor]]:
    """M x Mᵀ for a square x of tensors."""
    half = [[_combined(row, column) for column in zip(*grid, strict=True)] for row in matrix]
    return [[_combined(row, line) for row in matrix] for line in half]


def _columns(matrix: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    return tuple(zip(*matrix, strict=True))


def _combined(factors: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    terms = [
        tensor if factor == 1 else tensor * factor for factor, tensor in zip(factors, tensors, strict=True) if factor
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
