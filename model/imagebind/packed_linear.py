"""Products with weights, and weights laid out as the CPU's matrix unit wants them.

oneDNN multiplies bfloat16 faster by a weight in its own blocked order, and does a GELU or an addition on the
result while that is still in cache. PyTorch offers this through operators that its compiler uses and that are
no public interface: where they are missing, `packed` gives the weight back as it came and the three products
below are the plain ones. A packed weight has the shape and the values it had; it learns nothing more.

Legend of shapes: I, O length of the last axis before and after.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def can_pack(weight_OI: Tensor) -> bool:
    """Whether there is something to gain: a bfloat16 matrix on a CPU whose oneDNN multiplies it."""
    plain = weight_OI.layout == torch.strided and weight_OI.device.type == "cpu" and weight_OI.ndim == 2
    if not plain or weight_OI.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    found = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(torch.ops.mkldnn, name) for name in found) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def pack_weight(weight_OI: Tensor) -> Tensor:
    """The same matrix in oneDNN's order, or `weight_OI` itself where `can_pack` says no."""
    if not can_pack(weight_OI):
        return weight_OI
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach().contiguous(), None)


def unpack_weight(weight_OI: Tensor) -> Tensor:
    """The matrix in PyTorch's order, whichever it is in."""
    return weight_OI.to_dense() if weight_OI.is_mkldnn else weight_OI


def linear(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """x W^T + b."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_I, weight_OI, bias_O, "none", [], "")
    return F.linear(x_I, weight_OI, bias_O)


def linear_gelu(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor) -> Tensor:
    """GELU(x W^T + b), the exact one, with the error function."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x_I, weight_OI, bias_O, "gelu", [], "none")
    return F.gelu(F.linear(x_I, weight_OI, bias_O))


def linear_add(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor, onto_O: Tensor) -> Tensor:
    """`onto_O` + x W^T + b."""
    if weight_OI.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise.binary(x_I, onto_O, weight_OI, bias_O, "add")
    return onto_O + F.linear(x_I, weight_OI, bias_O)
