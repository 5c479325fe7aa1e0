"""Linear layers whose weights are laid out for the CPU's matrix unit.

oneDNN multiplies bfloat16 faster by a weight in its own blocked order, and fuses a GELU or an addition while
the result is still in cache. PyTorch has this only as internal operators of its compiler: where they are
missing, `pack_weight` returns the weight unchanged and the three functions below use the public operators. A
packed weight keeps its shape and values and can no longer train.

Legend of shapes: I, O length of the last axis before and after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(weight_OI: Tensor) -> bool:
    """Whether packing helps: a bfloat16 matrix on a CPU whose oneDNN multiplies bfloat16."""
    plain = weight_OI.layout == torch.strided and weight_OI.device.type == "cpu" and weight_OI.ndim == 2
    if not plain or weight_OI.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    operators = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in operators) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def pack_weight(weight_OI: Tensor) -> Tensor:
    """The matrix in oneDNN's order, or `weight_OI` itself unless `can_pack`."""
    if not can_pack(weight_OI):
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)


def unpack_weight(weight_OI: Tensor) -> Tensor:
    """The matrix in PyTorch's order."""
    return weight_OI.to_dense() if weight_OI.is_mkldnn else weight_OI


def linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """x W^T + b."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_I, weight_OI, bias_O, "none", [], "")
    return F.linear(x_I, weight_OI, bias_O)


def linear_gelu(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """GELU(x W^T + b), the exact GELU, by the error function."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_I, weight_OI, bias_O, "gelu", [], "none")
    return F.gelu(F.linear(x_I, weight_OI, bias_O))


def linear_add(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor, residual_O: Tensor) -> Tensor:
    """`residual_O` + x W^T + b."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.binary(x_I, residual_O, weight_OI, bias_O, "add")
    return residual_O + F.linear(x_I, weight_OI, bias_O)
