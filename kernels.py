"""Matrix products on a CPU, by the library that measures faster on this machine: MKL or oneDNN.

torch sends fp32 products to MKL, which is slow on some CPUs. oneDNN's kernels are reached through
operators that torch keeps for its compiler; this file alone knows them, and goes back to F.linear
where they are missing, on GPUs, and in precisions for which there is nothing to choose.

Training multiplies by the weights as they are. Generation multiplies few rows by the same weights
many times, so it packs them: layers that read the same input side by side, in oneDNN's own layout.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

LIBRARIES = ("mkl", "onednn")
USES = ("generation", "training")
ROWS = 32  # the batch that packed weights are laid out for; others work as well
SHAPE, LAYERS = (1536, 576), 16  # of the probe: more weights than a cache holds, as in a model
PROBE_SECONDS = 0.06  # a library and number of rows
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
    """Layers [out_i, in] of the same input as one product in oneDNN's layout; no gradient."""

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
    found, why = library, "as the run was begun"
    if not available():
        found, why = dict.fromkeys(USES, "mkl"), "this torch has no oneDNN operators"
    elif library == "auto":
        found, why = probe()
    elif isinstance(library, str):
        found, why = dict.fromkeys(USES, library), "as asked"
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
    plain = [partial(F.linear, weight=weight) for weight in weights]
    ways = {"generation": (plain, [Packed([weight], [None]) for weight in weights], (1, 32)),
            "training": (plain[:1], [lambda x: (product(x, weights[0]),)], (1024,))}  # fmt: skip
    found, words = {}, []
    for what, (mkl, onednn, sizes) in ways.items():
        inputs = [torch.randn(rows, SHAPE[1], generator=generator) for rows in sizes]
        exact = [F.linear(x.double(), weights[0].double()) for x in inputs]
        gaps = [(onednn[0](x)[0] - y).norm() / y.norm() for x, y in zip(inputs, exact)]
        error, ratio = float(max(gaps)), sum(seconds(mkl, x) / seconds(onednn, x) for x in inputs)
        ratio /= len(inputs)
        found[what] = "onednn" if ratio > 1 and error < MAX_ERROR else "mkl"
        words.append(f"{what} {ratio:.1f}x" + f", error {error:.0e}" * (error >= MAX_ERROR))
    return found, f"onednn against mkl: {', '.join(words)}"


def seconds(products: list[Callable[[Tensor], object]], x: Tensor) -> float:
    """The least time in which all of these were done, one after the other."""
    known, threads = {"products": products, "x": x}, torch.get_num_threads()
    timer = Timer("for product in products: product(x)", globals=known, num_threads=threads)
    return min(timer.blocked_autorange(min_run_time=PROBE_SECONDS).times)
