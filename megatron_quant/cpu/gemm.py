"""Compute matrix products: one, and one per expert.

Operands are those of cuBLAS, column-major: ``gemm(A, B)`` is ``op(B) @ op(A)`` of row-major
tensors. So a linear layer's forward is A = weight (N, K) transposed, B = input (M, K). The product
is taken in the promoted dtype of operands and result, and rounded once to the result's.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_quant.errors import HostError

_DTYPES = {4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


def torch_dtype(te_dtype: Any) -> torch.dtype:
    """Return Transformer Engine's DType (an int enum) or a torch dtype as a torch dtype."""
    if isinstance(te_dtype, torch.dtype):
        return te_dtype
    if int(te_dtype) not in _DTYPES:
        raise HostError(f"dtype {te_dtype!r} on a CPU: use float32, bfloat16 or float16")
    return _DTYPES[int(te_dtype)]


def generic_gemm(
    A: torch.Tensor,
    transa: bool,
    B: torch.Tensor,
    transb: bool,
    D: torch.Tensor | None,
    quantizer: object,
    out_dtype: Any,
    bias: torch.Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: torch.Tensor | None,
    grad: bool,
    workspace: torch.Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: object = None,
    comm_type: object = None,
    extra_output: torch.Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, None, torch.Tensor | None]:
    """Compute ``alpha * op(B) @ op(A)`` (+ bias), into D if given; the bias gradient if ``grad``.

    Raises:
        HostError: For an fp8 operand or result, a fused gelu, overlapped communication.
    """
    _refuse("generic_gemm", A, B, gelu=gelu, quantizer=quantizer, comm_overlap=comm_overlap)
    result_dtype = _result_dtype(A, D, out_dtype)
    product = alpha * _product(A, transa, B, transb, result_dtype)
    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = _column_sum(B).to(torch_dtype(bias_dtype))
        else:
            product = product + bias.to(product.dtype)
    if D is not None:
        _store(D.view(product.shape), product, accumulate)
        return D, bias_grad, None, extra_output
    shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
    return product.to(result_dtype).reshape(shape), bias_grad, None, extra_output


def te_general_grouped_gemm(
    A: Sequence[torch.Tensor],
    transa: bool,
    B: Sequence[torch.Tensor],
    transb: bool,
    D: Sequence[torch.Tensor],
    D_type: Any,
    m_splits: Sequence[int],
    bias: Sequence[torch.Tensor],
    bias_dtype: Any,
    single_output: bool,
    pre_gelu_out: Sequence[torch.Tensor],
    grad: bool,
    workspace: Sequence[torch.Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int = 0,
) -> Sequence[torch.Tensor]:
    """Compute one product per expert into D; ``single_output`` stacks them all in D[0].

    ``bias`` is added, or with ``grad`` filled with its gradient; an empty tensor is no bias. An
    expert without rows gives a zero weight gradient.
    """
    _refuse("te_general_grouped_gemm", *A, *B)
    outs = torch.split(D[0], [int(m) for m in m_splits]) if single_output else D
    for a, b, out, bias_1 in zip(A, B, outs, bias, strict=True):
        product = _product(a, transa, b, transb, out.dtype)
        if bias_1.numel() and grad:
            bias_1.copy_(_column_sum(b))
        elif bias_1.numel():
            product = product + bias_1.to(product.dtype)
        _store(out, product, accumulate)
    return bias


def _product(
    A: torch.Tensor, transa: bool, B: torch.Tensor, transb: bool, result: torch.dtype
) -> torch.Tensor:
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), result)
    a = A.reshape(-1, A.shape[-1]).to(dtype)
    b = B.reshape(-1, B.shape[-1]).to(dtype)
    return (b.t() if transb else b) @ (a.t() if transa else a)


def _result_dtype(A: torch.Tensor, D: torch.Tensor | None, out_dtype: Any) -> torch.dtype:
    if D is not None:
        return D.dtype
    return A.dtype if out_dtype is None else torch_dtype(out_dtype)


def _column_sum(grad_output: torch.Tensor) -> torch.Tensor:
    return grad_output.reshape(-1, grad_output.shape[-1]).sum(0, dtype=torch.float32)


def _store(out: torch.Tensor, product: torch.Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(product.to(out.dtype))
    else:
        out.copy_(product)


def _refuse(kernel: str, *operands: object, **options: object) -> None:
    for operand in operands:
        if not isinstance(operand, torch.Tensor):
            raise HostError(f"{kernel} of {type(operand).__name__} on a CPU: switch off fp8")
    for option, value in options.items():
        if value is not None and value is not False:
            raise HostError(f"{kernel} with {option} on a CPU: switch it off, or run on a GPU")
