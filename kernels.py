"""Matrix products on a CPU, by the library that measures faster on this machine: MKL or oneDNN.

torch sends fp32 products to MKL, which is slow on some CPUs. oneDNN's kernels are reached through
operators that torch keeps for its compiler; this file alone knows them, and goes back to F.linear
where they are missing, on GPUs, and in precisions for which there is nothing to choose.

Training multiplies by the weights as they are. Generation multiplies few rows by the same weights
many times, so it packs them: layers that read the same input side by side, in oneDNN's own layout.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARIES = ("mkl", "onednn")
USES = ("generation", "training")
ROWS = 32  # the batch that packed weights are laid out for; others work as well
SHAPE, LAYERS = (1536, 576), 16  # of the probe: more weights than a cache holds, as in a model
PROBE_ROWS = {"generation": (1, 32), "training": (1024,)}
PROBE_SECONDS = 0.06  # a library and size
MAX_ERROR = 1e-5  # against fp64, relative: more means that products are not computed in fp32

chosen = dict.fromkeys(USES, "mkl")  # what this process uses; set by `use`
operators = torch.ops.mkldnn


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN; x [T, in] and W [out, in], transposed views allowed, or W packed."""
    return operators._linear_pointwise.default(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`product` with its gradient, both products of which are oneDNN's too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (product(grad, weight.t()) if wanted[0] else None,
                product(grad.t(), x.t()) if wanted[1] else None,
                grad.sum(0) if wanted[2] else None)  # fmt: skip


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b by the library chosen for training; x [T, in], W [out, in]."""
    if chosen["training"] == "mkl" or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return OneDNNLinear.apply(x, weight, bias)


class Packed:
    """Layers [out_i, in] that read the same input as one product in oneDNN's layout; no gradient."""

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None]):
        self.widths = [len(weight) for weight in weights]
        joined = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.weight = operators._reorder_linear_weight(joined.detach(), ROWS)
        self.bias = torch.cat(biases).detach() if biases[0] is not None else None

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return product(x, self.weight, self.bias).split(self.widths, dim=-1)


def packable(weight: Tensor) -> bool:
    """Whether generation with these weights wants them packed."""
    return chosen["generation"] == "onednn" and weight.device.type == "cpu"


def use(library: str | dict[str, str]) -> str:
    """Choose "mkl", "onednn", by a measurement ("auto"), or as a run's file says, {use: library}.

    Returns a line that says what is used and why.
    """
    if library == "auto" and available():
        found, why = probe()
    elif isinstance(library, dict):
        found, why = library, "as the run was begun"
    else:
        found, why = dict.fromkeys(USES, library), "as asked"
    if not available() and library != "mkl":
        found, why = dict.fromkeys(USES, "mkl"), "this torch has no oneDNN operators"
    chosen.update(found)
    return f"matrix products: {', '.join(f'{chosen[use]} in {use}' for use in USES)} ({why})"


def available() -> bool:
    """Whether this torch has the operators."""
    return hasattr(operators, "_linear_pointwise") and hasattr(operators, "_reorder_linear_weight")


def half_is_fast() -> bool:
    """Whether this CPU multiplies in bf16 by instructions of its own."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.no_grad()
def probe() -> tuple[dict[str, str], str]:
    """The faster library for each use, and the measurement in words; takes half a second or so."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(SHAPE, generator=generator) for _ in range(LAYERS)]
    packed = [Packed([weight], [None]) for weight in weights]
    found, words = {}, []
    for what, sizes in PROBE_ROWS.items():
        mkl, onednn, error = 0.0, 0.0, 0.0
        for rows in sizes:
            x = torch.randn(rows, SHAPE[1], generator=generator)
            if what == "generation":
                mkl += seconds(lambda x: [F.linear(x, weight) for weight in weights], x)
                onednn += seconds(lambda x: [layers(x) for layers in packed], x)
                result = packed[0](x)[0]
            else:
                mkl += seconds(lambda x: F.linear(x, weights[0]), x)
                onednn += seconds(lambda x: product(x, weights[0]), x)
                result = product(x, weights[0])
            exact = F.linear(x.double(), weights[0].double())
            error = max(error, float((result - exact).norm() / exact.norm()))
        found[what] = "onednn" if onednn < mkl and error < MAX_ERROR else "mkl"
        words.append(f"{what} {mkl / onednn:.1f}x" + f", error {error:.0e}" * (error >= MAX_ERROR))
    return found, f"onednn against mkl: {', '.join(words)}"


def seconds(work: Callable[[Tensor], object], x: Tensor) -> float:
    """The fastest of the calls that fit into the probe's time, after one that is not counted."""
    work(x)
    best, end = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        begun = time.perf_counter()
        work(x)
        best = min(best, time.perf_counter() - begun)
    return best
