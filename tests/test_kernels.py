"""The fused kernels and their references against float64.

The Triton cases need CUDA, or Triton's interpreter, which has to be chosen before the kernels are imported: where there
is no CUDA, `test_kernels_in_the_interpreter` runs them in a process of their own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard as sylvester

from fluxfast.kernels import reference
from fluxfast.kernels.linear import RowwiseFloat8GeluLinear
from fluxfast.kernels.rowwise import E4M3, cast_e4m3, dequantize_rowwise, quantize_rowwise

embeddings = pytest.importorskip("diffusers.models.embeddings")

CUDA = torch.cuda.is_available()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
IN_REACH = TRITON and (CUDA or INTERPRETER)

OF_QUACK = (
    "gelu_linear_quantize",
    "gelu_linear_quantize_beside",
    "grouped_gelu_linear_quantize",
    "coded_attention_quantize",
)
TRANSPOSED = "qk_norm_rope_hadamard_quantize_transposed"
MIXED = "qk_norm_rope_hadamard_quantize_mixed"
BEHIND_VALUES = "qk_norm_rope_hadamard_quantize_without_values"
OPERATIONS = sorted(
    name for name in dir(reference) if "quantize" in name and name not in (*OF_QUACK, "quantize_rowwise")
)

# NumPy, which runs the interpreter, warns of the overflows and NaNs that these tests feed it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_kernels = pytest.mark.skipif(
    not IN_REACH, reason="no CUDA: run by test_kernels_in_the_interpreter (with Triton, from the extra 'dev')"
)
implementations = pytest.mark.parametrize("kind", ["reference", pytest.param("triton", marks=needs_kernels)])
needs_quack = pytest.mark.skipif(
    not CUDA or importlib.util.find_spec("quack") is None,
    reason="quack's GEMMs run on a GPU (extra 'gpu') and nowhere else",
)
quack_installed = pytest.mark.skipif(
    importlib.util.find_spec("quack") is None, reason="quack is not installed: pip install -e '.[dev]'"
)
epilogues = pytest.mark.parametrize("kind", ["reference", pytest.param("quack", marks=needs_quack)])


def test_kernels_in_the_interpreter():
    """Without CUDA, the Triton cases of this file pass in Triton's interpreter."""
    if not TRITON:
        pytest.skip("Triton is not installed: pip install -e '.[dev]'")
    if IN_REACH:
        pytest.skip("the Triton cases run in this process")
    names = ("test_kernels.py", "test_kernel_blocks.py", "test_group_norm.py")
    files = [os.path.join(os.path.dirname(__file__), name) for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "triton", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


def operation(kind: str, name: str):
    """The operation called `name`, from the reference or from the module of its kernel."""
    if kind == "reference":
        return getattr(reference, name)
    if kind == "quack":
        from fluxfast.kernels import dense, flash, gemm, projections

        return next(getattr(module, name) for module in (gemm, projections, dense, flash) if hasattr(module, name))
    from fluxfast.kernels import activations, group_norm, norms, qkv

    return next(getattr(module, name) for module in (activations, group_norm, norms, qkv) if hasattr(module, name))


@pytest.fixture(autouse=True)
def poisoned():
    """`torch.empty` returns NaN, so an element that a kernel forgets to write fails the comparison."""
    torch.manual_seed(torch.seed() % 2**31)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, spread: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * spread).to(dtype)


def assert_quantized(q: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor, atol: float = 0.0) -> None:
    """Codes within half a step of the float64 value, and the scale of its row maximum; `atol` of the value is free."""
    assert q.dtype == E4M3 and scale.dtype == torch.float32 and scale.shape == (*q.shape[:-1], 1)
    expected = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448
    torch.testing.assert_close(scale.double(), expected, rtol=2e-5, atol=atol / 448)
    # Half of e4m3's step is 2^-4 of the value's power of two, or 2^-10 scales below the normal range.
    bound = exact.abs() * (2**-4 + 1e-4) + expected * (2**-10 + 1e-4) + atol
    error = (dequantize_rowwise(q, scale).double() - exact).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max():.3g}"


def gelu64(x):
    """GELU(tanh) as x * sigmoid(2u): the tanh form loses every digit for x below -6, in float64 below -9."""
    x = x.double()
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def layernorm64(x, shift, scale, eps=1e-6):
    repeat = len(x) // len(shift)
    shift, scale = (v.double().repeat_interleave(repeat, 0) for v in (shift, scale))
    return F.layer_norm(x.double(), x.shape[-1:], eps=eps) * (1 + scale) + shift


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "d", "h"), [(3, 48, 192), (5, 7, 33), (1, 1, 1), (2, 3072, 12288), (4, 129, 511)])
def test_gelu_concat(kind, rows, d, h, dtype):
    """[attention, gelu(mlp)] is quantised with one scale a row, from strided rows too."""
    merged = normal(rows, 2 + d + h, dtype=dtype, spread=3.0)
    attn_out, mlp = merged[:, 2 : 2 + d], merged[:, 2 + d :]
    exact = torch.cat([attn_out.double(), gelu64(mlp)], -1)
    # PyTorch's float32 GELU takes the tanh form; the kernel does not.
    atol = 1e-5 if kind == "reference" else 0.0
    assert_quantized(*operation(kind, "gelu_concat_quantize")(attn_out, mlp), exact, atol)
    assert_quantized(*operation(kind, "gelu_quantize")(mlp), exact[:, d:], atol)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 48), (5, 7), (1, 1), (6, 1), (2, 3072), (4, 129), (2, 3, 65), (1, 5, 2, 16)])
def test_quantize_rows(kind, shape, dtype):
    """Rows of any number of axes, strided or not, far past 448: the scale is the reference's to the last bit."""
    x = normal(*shape[:-1], shape[-1] + 3, dtype=dtype, spread=3000.0)[..., 2:-1]
    for rows in (x, x.contiguous()):
        q, scale = operation(kind, "quantize_rows")(rows)
        assert q.shape == rows.shape and q.is_contiguous() and scale.is_contiguous()
        assert_quantized(q, scale, rows.double())
        assert torch.equal(scale, quantize_rowwise(rows)[1])


@implementations
def test_gelu_tails(kind):
    """The far negative tail, where 1 + tanh has no digits left, row by row of one element; and the positive one."""
    x = torch.tensor([[-0.5], [-3.0], [-5.0], [-6.5], [-30.0], [0.0], [8.0], [300.0]], device=DEVICE)
    assert_quantized(*operation(kind, "gelu_quantize")(x), gelu64(x), 1e-5 if kind == "reference" else 0.0)


def factors(rows: int, k: int, columns: int) -> tuple[torch.Tensor, ...]:
    """q, scale, weight, weight scale and bias of a row-wise float8 Linear."""
    weight, weight_scale = quantize_rowwise(normal(columns, k) / k**0.5)
    return *quantize_rowwise(normal(rows, k)), weight, weight_scale.t().contiguous(), normal(columns)


def product64(q, scale, weight, weight_scale, bias):
    return (q.double() @ weight.double().t()) * scale.double() * weight_scale.double() + bias.double()


def bound_of(weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    linear = RowwiseFloat8GeluLinear(weight.float() * weight_scale.t(), bias, operation=reference.gelu_linear_quantize)
    torch.testing.assert_close(linear.weight.float() * linear.weight_scale.t(), weight.float() * weight_scale.t())
    return linear.bound


@epilogues
@pytest.mark.parametrize(("rows", "k", "columns", "d"), [(5, 32, 48, 0), (257, 96, 160, 32), (130, 3072, 336, 16)])
def test_gelu_linear(kind, rows, k, columns, d):
    """Codes are within half a step of the float64 value, under scales that were known before the product."""
    given, left = factors(rows, k, columns), normal(rows, d + 3)[:, 1 : 1 + d] if d else None
    bound = bound_of(*given[2:])
    q, scale = operation(kind, "gelu_linear_quantize")(*given, bound, left)
    exact = gelu64(product64(*given))
    exact = exact if left is None else torch.cat([left.double(), exact], -1)
    torch.testing.assert_close(scale, given[1] * bound[0] + bound[1])
    # The GPU's tanh has a relative error of 2^-11; tensor cores keep 13 bits of the sum that every 32 columns add to.
    atol = (k / 32 * 2**-11 + 2e-3) if kind == "quack" else 1e-5
    allowed = exact.abs() * (2**-4 + 1e-4) + scale.double() * (2**-10 + 1e-4) + atol
    assert bool(((dequantize_rowwise(q, scale).double() - exact).abs() <= allowed).all())


@epilogues
def test_gelu_linear_never_saturates(kind):
    """Where all of a row's products add up, the output reaches the bound and not the largest code, which is 448."""
    given = list(factors(4, 64, 32))
    given[0] = (given[2][0].float().sign() * 448).to(E4M3).expand(4, 64).contiguous()
    given[4] = given[4].abs()
    bound = bound_of(*given[2:])
    q, scale = operation(kind, "gelu_linear_quantize")(*given, bound)
    largest = product64(*given)[:, :1]
    sums = (given[2].double() * given[3].t().double()).abs().sum(-1)
    assert bool((largest <= 448.01 * scale).all()) and q.float().max() <= 448
    assert bool((largest >= 448 * scale * (sums[0] / sums.max()) - given[4].max()).all())


@epilogues
def test_gelu_linear_of_special_rows(kind):
    """A row that holds NaN or an infinity is NaN, one of zeros is GELU of the bias, and none touches another."""
    x = normal(5, 64)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0.0
    weight, weight_scale, bias = factors(1, 64, 32)[2:]
    for left in (None, torch.zeros(5, 16, device=DEVICE)):
        bound = bound_of(weight, weight_scale, bias)
        got = operation(kind, "gelu_linear_quantize")(*quantize_rowwise(x), weight, weight_scale, bias, bound, left)
        value = dequantize_rowwise(*got)[:, 0 if left is None else 16 :]
        assert value[1:3].isnan().all() and value[[0, 3, 4]].isfinite().all()
        torch.testing.assert_close(value[3].double(), gelu64(bias), rtol=2**-4, atol=got[1][3].item() * 2**-9 + 2e-3)


@epilogues
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("samples", "tokens", "k", "columns"), [(1, 5, 32, 48), (2, 129, 96, 208), (3, 1, 64, 16)])
def test_residual_linear(kind, samples, tokens, k, columns, dtype, rtol):
    """What each sample's gate lets in is added to the stream and rounded once."""
    given = factors(samples * tokens, k, columns)
    residual, gate = normal(samples * tokens, columns, dtype=dtype), normal(samples, 2 * columns, dtype=dtype)
    gate = gate[:, columns:]
    got = operation(kind, "residual_linear")(*given, residual, gate)
    exact = residual.double() + gate.double().repeat_interleave(tokens, 0) * product64(*given)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=5e-3)


sixteen_bits = pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
dense_sizes = pytest.mark.parametrize(
    ("rows", "k", "columns"), [(1, 32, 8), (5, 136, 48), (129, 96, 208), (256, 4096, 2560), (300, 64, 10248)]
)


@epilogues
@sixteen_bits
@dense_sizes
def test_gated_gelu_linear(kind, rows, k, columns, dtype, rtol):
    """Rows of the weight alternate: GELU of the first of two products times the second, rounded once."""
    x, weight = normal(rows, k, dtype=dtype), normal(2 * columns, k, dtype=dtype, spread=2 * k**-0.5)
    got = operation(kind, "gated_gelu_linear")(x, weight)
    gate, up = (x.double() @ part.double().t() for part in (weight[0::2], weight[1::2]))
    exact = gelu64(gate) * up
    assert got.dtype == dtype and got.is_contiguous()
    # The GPU's tanh has a relative error of 2^-11; sums differ by float32's.
    atol = 1e-4 + (2**-11 * (gate * up).abs() if kind == "quack" else 0.0)
    assert bool(((got.double() - exact).abs() <= rtol * exact.abs() + atol).all())


@epilogues
@sixteen_bits
@dense_sizes
def test_residual_dense_linear(kind, rows, k, columns, dtype, rtol):
    """A product is added to the stream and rounded once."""
    x, weight = normal(rows, k, dtype=dtype), normal(columns, k, dtype=dtype, spread=k**-0.5)
    stream = normal(rows, columns, dtype=dtype, spread=8)
    got = operation(kind, "residual_dense_linear")(x, weight, stream)
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), stream.double() + x.double() @ weight.double().t(), rtol=rtol, atol=1e-4)


@epilogues
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dense_linears_of_special_rows(kind, bad):
    """What is not finite stays in its row; padding, which T5 attends to, is like any other."""
    x, weight = normal(5, 64), normal(32, 64)
    x[2, 3] = bad
    for got in (
        operation(kind, "gated_gelu_linear")(x, weight),
        operation(kind, "residual_dense_linear")(x, weight, normal(5, 32)),
    ):
        assert not got[2].isfinite().any()
        assert got[[0, 1, 3, 4]].isfinite().all()


@epilogues
def test_gelu_linear_beside(kind):
    """The codes of `gelu_linear_quantize` for the same scales, and not a byte of what stands in front of them."""
    given = factors(130, 96, 160)
    bound = bound_of(*given[2:])
    want, scale = operation(kind, "gelu_linear_quantize")(*given, bound)
    codes = normal(130, 32 + 160).to(E4M3)
    left = codes[:, :32].float()
    operation(kind, "gelu_linear_quantize_beside")(*given, codes, scale)
    assert torch.equal(codes[:, 32:].float(), want.float()) and torch.equal(codes[:, :32].float(), left)


def both(batch: int, text: int, image: int, k: int, columns: int):
    """The operands of a grouped product, and for each group those of a plain one, of all samples' rows."""
    plain = [factors(batch * tokens, k, columns) for tokens in (text, image)]
    joint = [torch.cat([g[i].float().unflatten(0, (batch, -1)) for g in plain], 1) for i in (0, 1)]
    weights = [torch.stack([g[i].float().squeeze(0) if i == 3 else g[i] for g in plain]) for i in (2, 3, 4)]
    return (joint[0].to(E4M3), joint[1], *weights), plain


def by_group(x: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of text of all samples, and those of the image."""
    return x[:, :text].flatten(0, 1), x[:, text:].flatten(0, 1)


grouped_sizes = pytest.mark.parametrize(
    ("batch", "text", "image", "k", "columns"), [(1, 3, 5, 32, 48), (2, 129, 300, 96, 208), (1, 256, 512, 3072, 336)]
)


def sum_error(kind: str, k: int) -> float:
    """Of a product's sums: tensor cores keep 13 bits of the sum that every 32 columns add to, here of magnitude one."""
    return (k / 32 * 2**-11 + 2e-3) if kind == "quack" else 1e-3


@epilogues
@grouped_sizes
def test_grouped_linear(kind, batch, text, image, k, columns):
    """Each token is multiplied with the weights of its stream, wherever the border is."""
    given, plain = both(batch, text, image, k, columns)
    got = operation(kind, "grouped_linear")(*given, text)
    assert got.dtype == torch.bfloat16 and got.shape == (batch, text + image, columns) and got.is_contiguous()
    for rows, own in zip(by_group(got, text), plain, strict=True):
        torch.testing.assert_close(rows.double(), product64(*own), rtol=2**-8, atol=sum_error(kind, k))


def assert_values(got: torch.Tensor, largest: torch.Tensor, v: torch.Tensor, atol: float) -> None:
    """V's codes, transposed, within half a step of the float64 value (B, S, H, 128), and each sample's largest."""
    dim = v.shape[3]
    assert got.dtype == E4M3 and got.is_contiguous() and got.shape == reference.transposed_shape(*v.shape)
    place = torch.arange(v.numel(), device=DEVICE).view(v.shape)
    # Which element of V stands where, by way of numbers that the reference's e4m3 can hold: its digits.
    digits = [reference.transposed_values((place // 8**i % 8).to(E4M3), mixed=True).long() for i in range(9)]
    order = sum(digit * 8**i for i, digit in enumerate(digits))[:, :, :dim]
    exists = reference.transposed_values(torch.ones_like(v).to(E4M3), mixed=True).float() == 1
    # The rows of ones behind each head, and zeros: what is past the last token.
    assert torch.equal(got.float()[:, :, dim:], exists[:, :, dim:].float())
    assert bool((got.float()[~exists] == 0).all())
    exact = v.flatten()[order].clamp(-448, 448)
    allowed = exact.abs() * (2**-4 + 1e-4) + 2**-10 + 1e-4 + atol
    error = (got[:, :, :dim].double() - exact).abs()
    assert bool((error <= allowed)[exists[:, :, :dim]].all())
    assert largest.dtype == torch.float32 and largest.shape == (len(v),)
    assert torch.equal(largest, got.float()[:, :, :dim].abs().flatten(1).amax(1))


@epilogues
@pytest.mark.parametrize(
    ("samples", "tokens", "k", "heads"), [(1, 5, 32, 1), (2, 130, 96, 3), (1, 1000, 3072, 2), (3, 16, 64, 6)]
)
def test_qkv_linear(kind, samples, tokens, k, heads):
    """Q and K are rounded to bfloat16, and V to e4m3, transposed: of tiles that are full and of those that are not."""
    given = factors(samples * tokens, k, 3 * heads * 128)
    qk, values, largest = operation(kind, "qkv_linear")(*given, samples)
    exact = product64(*given).unflatten(-1, (3, heads, 128))
    atol = sum_error(kind, k)
    assert qk.dtype == torch.bfloat16 and qk.is_contiguous()
    torch.testing.assert_close(qk.double(), exact[:, :2].flatten(1), rtol=2**-8, atol=atol)
    assert_values(values, largest, exact[:, 2].unflatten(0, (samples, tokens)), atol)


@epilogues
@pytest.mark.parametrize(
    ("batch", "text", "image", "k", "heads"),
    [(1, 16, 5, 32, 1), (2, 144, 300, 96, 3), (1, 256, 512, 3072, 2), (1, 128, 128, 64, 6)],
)
def test_grouped_qkv_linear(kind, batch, text, image, k, heads):
    """Each token is multiplied with the weights of its stream, and stands in its place beside the other stream's."""
    given, plain = both(batch, text, image, k, 3 * heads * 128)
    qk, values, largest = operation(kind, "grouped_qkv_linear")(*given, text)
    atol = sum_error(kind, k)
    exact = [product64(*own).unflatten(0, (batch, -1)).unflatten(-1, (3, heads, 128)) for own in plain]
    exact = torch.cat(exact, 1)
    assert qk.dtype == torch.bfloat16 and qk.is_contiguous()
    torch.testing.assert_close(qk.double(), exact[:, :, :2].flatten(2), rtol=2**-8, atol=atol)
    assert_values(values, largest, exact[:, :, 2], atol)


@quack_installed
def test_source_of_an_epilogue_is_in_its_key(monkeypatch):
    """quack keeps kernels on disk, and tells operations of an epilogue by their names alone."""
    from fluxfast.kernels import projections

    product = projections.product
    operations = (*product.sinks.values(), *product.output_ops.values(), *product.extra_ops)
    assert [own.name for own in operations] == ["values", "qk", "largest"]
    before = [own.cache_key() for own in operations]
    monkeypatch.setattr(projections, "SOURCE", "another")
    assert all(own.cache_key() != old for own, old in zip(operations, before, strict=True))


@epilogues
def test_values_that_are_not_finite(kind):
    """NaN stays NaN in its token, what is past 448 saturates, and the largest is that of what is a number."""
    x = normal(2 * 40, 64)
    x[3], x[45] = float("nan"), 1e4
    given = (*quantize_rowwise(x), *factors(1, 64, 3 * 128)[2:])
    _, values, largest = operation(kind, "qkv_linear")(*given, 2)
    place = values.float()[0, 0, :128].isnan().all(0).nonzero().flatten().tolist()
    # The fourth of sixteen tokens: 0 8 1 9 2 10 3.
    assert place == [6] and values.float()[0].isnan().sum() == 128
    assert 0 < largest[0] < 10 and largest[1] == 448 and values.float().nan_to_num().abs().max() == 448


@quack_installed
def test_qkv_linears_refuse_what_does_not_fit():
    """Heads of another width, rows that samples cannot share, text that begins within sixteen tokens, and a CPU."""
    multiply, grouped = operation("quack", "qkv_linear"), operation("quack", "grouped_qkv_linear")
    with pytest.raises(ValueError, match="heads of 128 channels, got 336 columns"):
        multiply(*factors(4, 32, 336), 1)
    with pytest.raises(ValueError, match=r"a multiple of 16 tokens of text, got 3: .* max_sequence_length"):
        grouped(*both(1, 3, 5, 32, 384)[0], 3)
    if CUDA:
        with pytest.raises(ValueError, match="M must be a multiple of B"):
            multiply(*factors(5, 32, 384), 2)
        with pytest.raises(ValueError, match="got 16 of 16 that are text"):
            grouped(*both(1, 8, 8, 32, 384)[0], 16)
    else:
        with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
            multiply(*factors(4, 32, 384), 1)


@epilogues
@grouped_sizes
def test_grouped_gelu_linear(kind, batch, text, image, k, columns):
    """As each stream's own, under its own bound."""
    given, plain = both(batch, text, image, k, columns)
    bound = torch.stack([bound_of(*own[2:]) for own in plain])
    q, scale = operation(kind, "grouped_gelu_linear_quantize")(*given, bound, text)
    for group, (s, own) in enumerate(zip(by_group(scale, text), by_group(given[1], text), strict=True)):
        torch.testing.assert_close(s, own * bound[group, 0] + bound[group, 1])
    atol = sum_error(kind, k)
    for codes, s, own in zip(by_group(q, text), by_group(scale, text), plain, strict=True):
        exact = gelu64(product64(*own))
        allowed = exact.abs() * (2**-4 + 1e-4) + s.double() * (2**-10 + 1e-4) + atol
        assert bool(((dequantize_rowwise(codes, s).double() - exact).abs() <= allowed).all())


@epilogues
@grouped_sizes
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_grouped_residual_linear(kind, batch, text, image, k, columns, dtype, rtol):
    """Each stream's gate, of each sample, and a rounding of the stream's own type."""
    given, plain = both(batch, text, image, k, columns)
    residual, gate = normal(batch, text + image, columns).to(dtype), normal(batch, 2, 6, columns)[:, :, 3]
    got = operation(kind, "grouped_residual_linear")(*given, residual, gate, text)
    assert got.dtype == dtype and got.is_contiguous()
    for group, (rows, c, own) in enumerate(zip(by_group(got, text), by_group(residual, text), plain, strict=True)):
        its_gate = gate[:, group].double().repeat_interleave(len(rows) // batch, 0)
        exact = c.double() + its_gate * product64(*own)
        # No gate of this many normal numbers is past five.
        torch.testing.assert_close(rows.double(), exact, rtol=rtol, atol=5 * sum_error(kind, k))


@quack_installed
def test_grouped_linears_refuse_what_does_not_fit():
    """Streams without a token, shapes that are not both Linears', and a CPU, in one sentence each."""
    given, _ = both(1, 3, 5, 32, 48)
    multiply = operation("quack", "grouped_linear")
    for text in (0, 8):
        with pytest.raises(ValueError, match=f"tokens of text and of the image, got {text} of 8"):
            multiply(*given, text)
    with pytest.raises(ValueError, match=r"'bias': \(2, 48\).* for 8 rows and 48 outputs, got \{'bias': \(1, 48\)\}"):
        multiply(*given[:4], given[4][:1], 3)
    with pytest.raises(ValueError, match=r"expected a gate of \(1, 2, 48\), got \(1, 48\)"):
        operation("quack", "grouped_residual_linear")(*given, normal(1, 8, 48), normal(1, 48), 3)
    if not CUDA:
        with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
            multiply(*given, 3)


@quack_installed
@pytest.mark.parametrize(
    ("rows", "columns", "width", "takes_turns"),
    [
        (4352, 3072, 208, True),
        (4096, 3072, 192, True),
        (512, 3072, 96, False),
        (256, 3072, 48, False),
        (4352, 12288, 160, True),
        (4096, 12288, 160, True),
        (256, 12288, 192, False),
        (1, 16, 48, False),
    ],
)
def test_tiles_of_quack(rows, columns, width, takes_turns):
    """The widths that were the fastest on a Hopper, of few rows the narrowest with which one wave is enough."""
    from fluxfast.kernels import gemm

    cut = gemm.tiles(rows, columns, gemm.GELU_WIDTHS if columns == 12288 else gemm.WIDTHS, 132)
    assert (cut["tile_N"], cut["pingpong"]) == (width, takes_turns)


@quack_installed
def test_epilogues_refuse_what_does_not_fit():
    """Shapes that are not a Linear's, rows that samples cannot share, and a CPU, in one sentence each."""
    *given, bias = factors(4, 32, 48)
    gelu, residual = operation("quack", "gelu_linear_quantize"), operation("quack", "residual_linear")
    with pytest.raises(ValueError, match=r"'bias': \(48,\).* for 4 rows and 48 outputs, got \{'bias': \(47,\)\}"):
        gelu(*given, bias[1:], torch.ones(2))
    with pytest.raises(ValueError, match=r"got \{'residual': \(4, 32\)\}"):
        residual(*given, bias, normal(4, 32), normal(1, 48))
    if not CUDA:
        with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
            gelu(*given, bias, torch.ones(2))


@quack_installed
def test_dense_linears_refuse_what_does_not_fit():
    """A row without its other, shapes that are not a Linear's, and a CPU, in one sentence each."""
    gated, add = operation("quack", "gated_gelu_linear"), operation("quack", "residual_dense_linear")
    with pytest.raises(ValueError, match=r"for 4 rows and 8 outputs, got \{'weight': \(17, 32\)\}"):
        gated(normal(4, 32), normal(17, 32))
    with pytest.raises(ValueError, match=r"'residual': \(4, 16\).*, got \{'x': \(4, 24\), 'residual': \(3, 16\)\}"):
        add(normal(4, 24), normal(16, 32), normal(3, 16))
    if not CUDA:
        with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
            gated(normal(4, 32), normal(16, 32))
        with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
            add(normal(4, 32), normal(16, 32), normal(4, 16))


@quack_installed
@pytest.mark.parametrize(
    ("gated", "rows", "columns", "width", "takes_turns"),
    [(False, 256, 4096, 64, False), (True, 256, 20480, 160, True), (False, 512, 4096, 128, False),
     (True, 512, 20480, 160, True), (True, 256, 512, 64, False)],
)  # fmt: skip
def test_tiles_of_dense_linears(gated, rows, columns, width, takes_turns):
    """The widths that were the fastest on a Hopper for T5-XXL; with a gate, thirty-twos."""
    from fluxfast.kernels import dense, gemm

    cut = dense.tiles_of(rows, columns, 132, gated=gated)
    assert (cut["tile_N"], cut["pingpong"]) == (width, takes_turns)
    assert not any(width % 32 for width in (*gemm.GELU_WIDTHS, *dense.GATED_ONE_WAVE_WIDTHS))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("d", "h"), [(48, 192), (7, 33), (1, 1), (129, 2049)])
def test_triton_quantize_beside(d, h, dtype):
    """With a scale that is known it writes its own columns; too large a row enlarges the scale and all codes follow."""
    left, right = normal(6, d + 2, dtype=dtype, spread=3.0)[:, 1:-1], normal(6, h, dtype=torch.float32)
    left[2:] /= 1000
    left[2, 0], left[3, 0] = float("nan"), float("inf")
    scale = torch.full((6, 1), 2.0 / 448, device=DEVICE)
    left[1] = left[1].sign() * 1e4
    scale[5] = float("nan")
    codes = torch.cat([torch.full((6, d), 9.0, device=DEVICE), right.clamp(-2, 2) / scale.nan_to_num(1)], -1).to(E4M3)
    before, known = codes.clone(), scale.clone()
    operation("triton", "quantize_beside")(left, codes, scale)
    needed = quantize_rowwise(left)[1]
    # Eager PyTorch multiplies by the inverse of 448 on CUDA.
    torch.testing.assert_close(scale[[0, 1, 3, 4]], torch.maximum(known, needed)[[0, 1, 3, 4]], rtol=2**-22, atol=0.0)
    assert scale[2].isnan() and scale[5].isnan() and scale[3].isinf() and scale[1] > 20 * known[1]
    kept = codes.view(torch.uint8)[:, d:] == before.view(torch.uint8)[:, d:]
    assert kept[4].all() and kept[5].all() and not kept[1].all()
    exact = torch.cat([left.double(), dequantize_rowwise(before, known)[:, d:].double()], -1)[[0, 1, 4]]
    got = dequantize_rowwise(codes, scale).double()[[0, 1, 4]]
    bound = exact.abs() * (2**-4 + 1e-4) + scale[[0, 1, 4]].double() * (2**-10 + 1e-4)
    assert bool(((got - exact).abs() <= bound).all())
    assert codes.float()[3, 0].isnan() and (codes.float()[3, 1:].nan_to_num() == 0).all()


@needs_kernels
def test_triton_quantize_beside_refuses_what_does_not_fit():
    """Codes of other rows, narrower than what goes beside them, or in strided memory."""
    beside, scale = operation("triton", "quantize_beside"), torch.ones(2, 1, device=DEVICE)
    codes = torch.zeros(2, 8, device=DEVICE).to(E4M3)
    for wrong in (codes[:1], codes[:, :3].contiguous(), codes[:, ::2]):
        with pytest.raises(ValueError, match="expected"):
            beside(normal(2, 4), wrong, scale)


@implementations
def test_every_column_decides_the_scale(kind):
    """Wherever a row's largest element stands, first or last of a span or of the row, it makes the scale."""
    columns = [0, 31, 32, 46, 47, 48, 111, 112, 146]
    x = normal(len(columns), 147, dtype=torch.float32)
    x[range(len(columns)), columns] = 100.0
    expected = torch.full((len(columns), 1), 100.0 / 448, device=DEVICE)
    torch.testing.assert_close(operation(kind, "gelu_concat_quantize")(x[:, :47], x[:, 47:])[1], expected)
    torch.testing.assert_close(operation(kind, "gelu_quantize")(x)[1], expected)
    torch.testing.assert_close(operation(kind, "quantize_rows")(-x)[1], expected)
    shift, residual = x[:1] * 0, torch.zeros_like(x)
    value = F.layer_norm(x.double(), (147,), eps=1e-6).amax(-1, keepdim=True) / 448
    for got in (
        operation(kind, "layernorm_modulate_quantize")(x, shift, shift)[1],
        operation(kind, "residual_layernorm_modulate_quantize")(residual, x, shift + 1, shift, shift)[2],
    ):
        torch.testing.assert_close(got.double(), value, rtol=1e-5, atol=0.0)


stream_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@implementations
@stream_types
@pytest.mark.parametrize(("samples", "tokens", "d"), [(1, 5, 3072), (2, 3, 96), (3, 2, 100), (1, 1, 257)])
def test_layernorm_modulate(kind, samples, tokens, d, dtype):
    """LayerNorm, modulation by each sample's own vectors, and quantisation."""
    x = (normal(samples * tokens, d, spread=5.0) + 2).to(dtype)
    shift, scale = normal(samples, 2 * d).chunk(2, dim=-1)
    exact = layernorm64(x, shift, scale)
    assert_quantized(*operation(kind, "layernorm_modulate_quantize")(x, shift, scale), exact)
    *quantized, value = operation(kind, "layernorm_modulate_quantize_with_value")(x, shift, scale)
    assert_quantized(*quantized, exact)
    torch.testing.assert_close(value, exact.to(x.dtype), rtol=2**-7, atol=1e-4)


@implementations
@stream_types
@pytest.mark.parametrize(("samples", "text", "image", "d"), [(1, 2, 5, 3072), (2, 1, 3, 96), (3, 2, 1, 100)])
def test_grouped_layernorm_modulate(kind, samples, text, image, d, dtype):
    """Each token is modulated by the vectors of its stream and of its sample."""
    x, vectors = (normal(samples, text + image, d, spread=5.0) + 2).to(dtype), normal(samples, 2, 6, d)
    shift, scale = vectors[:, :, 0], vectors[:, :, 1]
    got = operation(kind, "grouped_layernorm_modulate_quantize")(x, shift, scale, text)
    for group, tokens in enumerate((slice(0, text), slice(text, None))):
        exact = layernorm64(x[:, tokens].flatten(0, 1), shift[:, group], scale[:, group])
        assert_quantized(*(part[:, tokens].flatten(0, 1) for part in got), exact)


@implementations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("samples", "tokens", "d"), [(1, 3, 3072), (2, 3, 23)])
def test_residual_layernorm_modulate(kind, samples, tokens, d, dtype):
    """The gated residual is rounded once, and the norm sees the rounded value."""
    x, y = normal(samples * tokens, d, dtype=dtype), normal(samples * tokens, d, dtype=dtype)
    gate, shift, scale = normal(samples, 3 * d, dtype=dtype).chunk(3, dim=-1)
    residual, q, q_scale = operation(kind, "residual_layernorm_modulate_quantize")(x, y, gate, shift, scale)
    exact = x.double() + gate.double().repeat_interleave(tokens, 0) * y.double()
    torch.testing.assert_close(residual.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    if dtype == torch.bfloat16:
        # The product of two bfloat16 is exact in float32, so nothing is left to the order of operations.
        assert torch.equal(residual, reference.gated_residual(x, y, gate))
    assert_quantized(q, q_scale, layernorm64(residual, shift, scale))


def hadamard64(x):
    """Of a head as (8, Dh / 64, 8), along the first and the last axis; then (8, Dh / 8) becomes (Dh / 8, 8)."""
    matrix = torch.tensor(sylvester(8), device=x.device).double()
    mixed = torch.einsum("ai,...imj,bj->...amb", matrix, x.double().unflatten(-1, (8, -1, 8)), matrix) / 8
    return mixed.flatten(-2).transpose(-1, -2).flatten(-2)


@implementations
@pytest.mark.parametrize(
    ("name", "batch", "text", "image", "heads", "dim"),
    [
        ("qk_norm_rope_quantize", 1, 3, 5, 24, 128),
        ("qk_norm_rope_quantize", 2, 0, 3, 3, 8),
        ("qk_norm_rope_quantize", 2, 2, 1, 9, 32),
        ("qk_norm_rope_hadamard_quantize", 1, 3, 5, 24, 128),
        ("qk_norm_rope_hadamard_quantize", 2, 0, 3, 3, 64),
        ("qk_norm_rope_hadamard_quantize", 2, 2, 1, 9, 256),
        (TRANSPOSED, 1, 3, 130, 24, 128),
        (TRANSPOSED, 2, 0, 16, 3, 64),
        (TRANSPOSED, 2, 16, 1, 9, 256),
        (MIXED, 1, 3, 130, 24, 128),
        (MIXED, 2, 0, 16, 3, 64),
        (MIXED, 3, 16, 1, 9, 256),
    ],
)
def test_qk_norm_rope(kind, name, batch, text, image, heads, dim):
    """QK RMSNorm and diffusers' RoPE, text first, cast without scales; v is only cast."""
    streams = [normal(batch, tokens, 3 * heads * dim + 8, spread=300.0)[..., 8:] for tokens in (text, image)]
    weights = [1 + normal(dim, dtype=torch.bfloat16) / 4 for _ in range(4)]
    cos, sin = (t.repeat_interleave(2, -1) for t in torch.rand(text + image, dim, device=DEVICE).chunk(2, -1))
    optional = () if text == 0 else (streams[0], *weights[2:])
    parts = operation(kind, name)(streams[1], *weights[:2], cos, sin, 1e-6, *optional)

    double = [s.double().unflatten(-1, (3, heads, dim)) for s in streams]
    for index, (part, image_weight, text_weight) in enumerate(zip(parts[:2], weights[:2], weights[2:], strict=True)):
        normed = [
            F.rms_norm(s[:, :, index], (dim,), w.double(), 1e-6)
            for s, w in zip(double, (text_weight, image_weight), strict=True)
        ]
        freqs = (cos.double(), sin.double())
        x = torch.cat(normed, 1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        exact = x * freqs[0][:, None] + turned * freqs[1][:, None]
        torch.testing.assert_close(exact.float(), embeddings.apply_rotary_emb(x.float(), (cos, sin), sequence_dim=1))
        if "hadamard" in name:
            exact = hadamard64(exact)
        if name in (TRANSPOSED, MIXED) and index == 0:
            exact = exact * 8 * math.log2(math.e) / dim**0.5
        torch.testing.assert_close(part.double(), exact, rtol=2**-4 + 1e-4, atol=2**-10 + 1e-4)
    v = cast_e4m3(torch.cat([s[:, :, 2] for s in double], 1))
    expected = reference.transposed_values(v, mixed=name == MIXED) if name in (TRANSPOSED, MIXED) else v
    assert torch.equal(parts[2].float(), expected.float()) and parts[2].float().abs().max() <= 448
    if name == MIXED:
        assert torch.equal(parts[3], v.float().abs().amax((1, 2, 3))) and len(parts) == 4


@implementations
def test_largest_value(kind):
    """Of the codes and not of what they round, wherever it stands, of each sample; NaN is none."""
    qkv, ones = normal(3, 200, 3 * 128) / 100, torch.ones(128, device=DEVICE)
    # The next codes are 52 and 448.
    qkv[0, 199, 2 * 128 + 127], qkv[1, 0, 2 * 128], qkv[2, 77, 300:302] = -51.0, float("-inf"), float("nan")
    qkv[2, 76, 300] = 7.0
    angles = torch.zeros(200, 128, device=DEVICE)
    largest = operation(kind, MIXED)(qkv, ones, ones, angles, angles)[3]
    assert largest.tolist() == [52.0, 448.0, 7.0]


@implementations
@pytest.mark.parametrize(("batch", "text", "image", "heads"), [(1, 3, 130, 24), (3, 16, 1, 9), (2, 0, 5, 2)])
def test_qk_norm_rope_behind_values(kind, batch, text, image, heads):
    """Q and K are those of the operation that has V too."""
    streams = [normal(batch, tokens, 3 * heads * 128) for tokens in (text, image)]
    weights = [1 + normal(128) / 4 for _ in range(4)]
    cos, sin = (t.repeat_interleave(2, -1) for t in torch.rand(text + image, 128, device=DEVICE).chunk(2, -1))
    without = [s[..., : 2 * heads * 128] for s in streams]
    both = []
    for name, (text_qkv, qkv) in ((MIXED, streams), (BEHIND_VALUES, without)):
        optional = () if text == 0 else (text_qkv, *weights[2:])
        both.append(operation(kind, name)(qkv, *weights[:2], cos, sin, 1e-6, *optional))
    (q, k, *_), (own_q, own_k) = both
    assert torch.equal(q.float(), own_q.float()) and torch.equal(k.float(), own_k.float())


@implementations
@pytest.mark.parametrize(("name", "lost"), [("qk_norm_rope_quantize", 2), ("qk_norm_rope_hadamard_quantize", 64)])
def test_special_heads(kind, name, lost):
    """What is not finite in q or k stays in its head, and in every product with it."""
    qkv, ones = normal(1, 2, 3 * 3 * 128), torch.ones(128, device=DEVICE)
    angles = torch.rand(2, 64, device=DEVICE).repeat_interleave(2, -1)
    qkv[0, 0, 128 + 5], qkv[0, 1, 3 * 128 + 7] = float("inf"), float("nan")
    q, k, v = (x.float() for x in operation(kind, name)(qkv, ones, ones, angles.cos(), angles.sin()))
    assert q[0, 0, 1].isnan().sum() == lost and k[0, 1, 0].isnan().all() and v.isfinite().all()
    q[0, 0, 1], k[0, 1, 0] = 0.0, 0.0
    assert q.isfinite().all() and k.isfinite().all()


def test_hadamard_keeps_products():
    """Of any two vectors; a channel that stands out does no more."""
    q, k = normal(3, 5, 2, 128, dtype=torch.float64), normal(3, 5, 2, 128, dtype=torch.float64)
    turned = reference.hadamard(q)
    torch.testing.assert_close((turned * reference.hadamard(k)).sum(-1), (q * k).sum(-1))
    torch.testing.assert_close(turned, hadamard64(q))
    alone = torch.zeros(128, dtype=torch.float64, device=DEVICE)
    alone[37] = 8.0
    assert reference.hadamard(alone).abs().max() == pytest.approx(8 / 64**0.5)


def test_transposed_values():
    """Every channel in a row, of 16 tokens each next to the one 8 further, then ones, then zeros."""
    v = torch.arange(18, device=DEVICE).to(E4M3).view(1, 18, 1, 1).expand(1, 18, 2, 3)
    rows = reference.transposed_values(v).float()
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    assert rows.shape == (1, 2, 11, 32)
    first, last = (v[0, tokens, 0, 0].float().tolist() for tokens in (order, [16, 17]))
    assert rows[0, 1, 2].tolist() == [*first, last[0], 0.0, last[1]] + [0.0] * 13
    assert rows[0, :, 3].sum(-1).tolist() == [18, 18] and not rows[:, :, 4:].any()


def test_mixed_channels():
    """Of 16 channels two and the two 2 further, which a thread would otherwise not hold, stand 8 apart."""
    v = torch.arange(32, device=DEVICE).to(E4M3).view(1, 1, 1, 32).float()
    rows = reference.transposed_values(v.to(E4M3), mixed=True).float()[0, 0, :, 0]
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert rows[:32].tolist() == v.flatten()[order + [16 + channel for channel in order]].tolist() and rows[32] == 1


def attention64(query, key, value):
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    weights = (query @ key.transpose(-1, -2) * (math.log(2) / 8)).softmax(-1)
    return (weights @ value).transpose(1, 2)


def heads_of(batch, tokens, heads, spread):
    """q, k and v of 128 channels in e4m3, and v as `coded_attention` takes it."""
    query, key, value = (normal(batch, tokens, heads, 128, spread=s).to(E4M3) for s in (spread, 1.0, 1.0))
    return query, key, value, reference.transposed_values(value)


@epilogues
@pytest.mark.parametrize(
    ("batch", "tokens", "heads"), [(1, 257, 1), (2, 512, 3), (1, 1000, 2), (3, 385, 1), (2, 77, 2)]
)
def test_coded_attention(kind, batch, tokens, heads):
    """Probabilities are within e4m3's rounding and 6 %, whether one decides a row, or all do."""
    for spread, allowed in ((0.0, 0.004), (1.0, 0.037), (4.0, 0.03), (20.0, 0.02)):
        *operands, value, transposed = heads_of(batch, tokens, heads, spread)
        got = operation(kind, "coded_attention")(*operands, transposed)
        assert got.dtype == torch.bfloat16 and got.shape == value.shape and got.is_contiguous()
        exact = attention64(*operands, value)
        assert (got.double() - exact).norm() < allowed * exact.norm()


@epilogues
def test_coded_attention_of_constant_values(kind):
    """What is the same for all tokens comes out as it went in, however many add up: sums are of the codes' values."""
    query, key, value, _ = heads_of(1, 1000, 1, 2.0)
    value = value[:, :1].expand_as(value)
    got = operation(kind, "coded_attention")(query, key, reference.transposed_values(value)).float()
    # Tensor cores keep 13 bits of a sum, and drop the rest from every product.
    torch.testing.assert_close(got, value.float(), rtol=0.03 if kind == "quack" else 2**-8, atol=1e-3)


@epilogues
def test_coded_attention_of_what_is_not_finite(kind):
    """NaN in q is lost with its row, in k with its head, in v with its channel; a score past half precision is NaN.

    The last keys, and the first, which are looked at last: they are of other blocks.
    """
    for token in (590, 9):
        query, key, value, _ = heads_of(1, 600, 4, 1.0)
        query[0, 7, 0, 5], key[0, token, 1, 5], value[0, token, 2, 5] = torch.full((3,), float("nan")).to(E4M3)
        query[0, 9, 3], key[0, token, 3] = (torch.tensor(448.0).to(E4M3) for _ in range(2))
        got = operation(kind, "coded_attention")(query, key, reference.transposed_values(value))[0].float()
        lost = got.isnan()
        assert lost[7, 0].all() and lost[:, 0].sum() == 128 and lost[:, 1].all() and lost[9, 3].all()
        assert lost[:, 2, 5].all() and lost[:, 2].sum() == 600


@epilogues
def test_coded_attention_of_scores_at_the_limits(kind):
    """Half precision has every code's place up to 2^256: past that a row is NaN, and far below a key has no weight."""
    query, key = (torch.zeros(1, 257, 4, 128, device=DEVICE) for _ in range(2))
    value = normal(1, 257, 4, 128).to(E4M3)
    query[0, 5] = 4.0
    # Products of 2304 and 1920: 2^288 and 2^240. The last key is a block of its own, the first to be looked at.
    key[0, 3, 0], key[0, 3, 1], key[0, 256, 2], key[0, :, 3] = 4.5, 3.75, -4.0, -4.0
    operands = query.to(E4M3), key.to(E4M3), reference.transposed_values(value)
    got, value = operation(kind, "coded_attention")(*operands)[0].float(), value[0].float()
    assert got[5, 0].isnan().all() and got[:, 0].isnan().sum() == 128 and got[:, 1:].isfinite().all()
    torch.testing.assert_close(got[5, 1], value[3, 1], rtol=2**-8, atol=0.0)
    torch.testing.assert_close(got[5, 2], value[:256, 2].mean(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(got[5, 3], value[:, 3].mean(0), rtol=0.01, atol=0.01)


def quantized_attention(kind, query, key, value, *args):
    """`coded_attention_quantize` of e4m3 heads, and its codes' values as (B, S, H, Dh)."""
    mixed, largest = reference.transposed_values(value, mixed=True), value.float().abs().nan_to_num().amax((1, 2, 3))
    codes, scale = operation(kind, "coded_attention_quantize")(query, key, mixed, largest, *args)
    assert codes.dtype == E4M3 and scale.dtype == torch.float32 and codes.is_contiguous() and scale.is_contiguous()
    heads = query.shape[2] * query.shape[3]
    assert codes.shape[0] == scale.shape[0] == query.shape[0] * query.shape[1] and scale.shape[1] == 1
    return codes, scale, dequantize_rowwise(codes[:, :heads], scale).view(query.shape)


@epilogues
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(1, 129, 1), (2, 256, 3), (1, 1000, 2), (3, 385, 1)])
def test_coded_attention_quantize(kind, batch, tokens, heads):
    """What `coded_attention` gives, each channel in its place, rounded to codes of V's scale or of a larger one."""
    query, key, value, transposed = heads_of(batch, tokens, heads, 1.0)
    want = operation(kind, "coded_attention")(query, key, transposed).double()
    unit = (value.float().abs().amax((1, 2, 3)) / 448).repeat_interleave(tokens)[:, None]
    row_scale, bound = torch.rand(batch * tokens, 1, device=DEVICE) / 448, torch.tensor([9.0, 1e-4], device=DEVICE)
    for args, expected in (
        ((), unit),
        ((row_scale, bound, 48), torch.maximum(unit, row_scale * bound[0] + bound[1])),
    ):
        codes, scale, got = quantized_attention(kind, query, key, value, *args)
        assert codes.shape[1] == heads * 128 + (args[2] if args else 0)
        torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0.0)
        steps = expected.view(batch, tokens, 1, 1).double() * 2**-10
        # Beside the code's rounding that of the bfloat16 which it is compared with.
        assert bool(((got.double() - want).abs() <= want.abs() * (2**-4 + 2**-8) + steps * 1.01).all())


@epilogues
def test_coded_attention_quantize_of_special_values(kind):
    """All values alike reach the largest code; zeros have a scale; NaN is in the codes, and in no other channel."""
    query, key, value, _ = heads_of(4, 200, 2, 1.0)
    value[0], value[1] = (torch.full((200, 2, 128), x, device=DEVICE).to(E4M3) for x in (-1.5, 0.0))
    want = operation(kind, "coded_attention")(query, key, reference.transposed_values(value)).float()
    value[2, 3, 1, 5] = query[3, 7, 0, 5] = torch.tensor(float("nan")).to(E4M3)
    codes, scale, got = quantized_attention(kind, query, key, value)
    assert bool((codes[:200].float() <= -416).all()) and not codes[200:400].float().any()
    assert scale.isfinite().all() and bool((scale > 0).all())
    lost = got.isnan()
    assert lost[2, :, 1, 5].all() and lost[2].sum() == 200 and lost[3, 7, 0].all() and lost[3].sum() == 128
    atol = scale.max().item() * 2**-9
    torch.testing.assert_close(got.where(~lost, 0), want.where(~lost, 0), rtol=2**-4 + 2**-7, atol=atol)


def bits(x: torch.Tensor) -> torch.Tensor:
    """As bytes, so that NaN equals itself."""
    return x.contiguous().view(torch.uint8)


@needs_quack
@pytest.mark.parametrize("name", ["coded_attention", "coded_attention_quantize", "gelu_linear_quantize",
                                  "gelu_linear_quantize_beside", "residual_linear", "grouped_linear",
                                  "grouped_gelu_linear_quantize", "grouped_residual_linear",
                                  "qkv_linear", "grouped_qkv_linear",
                                  "gated_gelu_linear", "residual_dense_linear"])  # fmt: skip
def test_quack_op_traces(name):
    """Each operation of quack's is what its schema and its fake say, so that compiled code may take it for that."""
    query, key, value, transposed = heads_of(1, 130, 2, 1.0)
    mixed, one = reference.transposed_values(value, mixed=True), torch.ones(1, device=DEVICE)
    row_scale, bound = torch.ones(130, 1, device=DEVICE), torch.ones(2, device=DEVICE)
    plain, (given, _) = factors(4, 32, 48), both(1, 3, 5, 32, 48)
    codes, ones = normal(4, 64).to(E4M3), torch.ones(4, 1, device=DEVICE)
    arguments = {
        "coded_attention": (query, key, transposed),
        "coded_attention_quantize": (query, key, mixed, one, row_scale, bound, 16),
        "gelu_linear_quantize": (*plain, bound, normal(4, 16)),
        "gelu_linear_quantize_beside": (*plain, codes, ones),
        "residual_linear": (*plain, normal(4, 48), normal(1, 48)),
        "grouped_linear": (*given, 3),
        "grouped_gelu_linear_quantize": (*given, bound.expand(2, 2), 3),
        "grouped_residual_linear": (*given, normal(1, 8, 48), normal(1, 2, 48), 3),
        "qkv_linear": (*factors(34, 32, 384), 2),
        "grouped_qkv_linear": (*both(2, 16, 5, 32, 384)[0], 16),
        "gated_gelu_linear": (normal(5, 32), normal(96, 32)),
        "residual_dense_linear": (normal(5, 32), normal(48, 32), normal(5, 96)[:, 48:]),
    }[name]
    operator = operation("quack", name)
    torch.library.opcheck(operator, arguments, test_utils=["test_faketensor"])
    # What its test of the schema would find, which multiplies what it compares, and no GPU multiplies e4m3.
    given = [x for x in arguments if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in given]
    returned = operator(*arguments)
    outputs = [x for x in (returned if isinstance(returned, tuple) else (returned,)) if x is not None]
    written = [x for x, old in zip(given, before, strict=True) if not torch.equal(bits(x), bits(old))]
    assert [x is codes for x in written] == ([True] if name == "gelu_linear_quantize_beside" else [])
    assert not {x.untyped_storage().data_ptr() for x in given} & {x.untyped_storage().data_ptr() for x in outputs}


@needs_quack
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1000), (1, 4352), (2, 513)])
def test_coded_attention_quantize_of_parts(batch, tokens):
    """The combining kernel gives rows of the last tiles the scales and codes that the attention would have given."""
    from fluxfast.kernels import flash
    from fluxfast.machine import processors

    heads = next(h for h in range(1, 200) if flash.parts_of(batch, tokens, h, processors())[0] > 1)
    query, key, value, transposed = heads_of(batch, tokens, heads, 1.0)
    want = flash.coded_attention(query, key, transposed).double()
    row_scale, bound = torch.rand(batch * tokens, 1, device=DEVICE) / 448, torch.tensor([9.0, 1e-4], device=DEVICE)
    unit = (value.float().abs().amax((1, 2, 3)) / 448).repeat_interleave(tokens)[:, None]
    for args, expected in (((), unit), ((row_scale, bound, 16), torch.maximum(unit, row_scale * 9 + 1e-4))):
        _, scale, got = quantized_attention("quack", query, key, value, *args)
        torch.testing.assert_close(scale, expected, rtol=1e-6, atol=0.0)
        error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
        assert error.max() < 0.04


@needs_quack
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1000), (1, 4352), (1, 513), (2, 513)])
def test_coded_attention_of_parts(batch, tokens):
    """The keys of the last wave of tiles are divided, and no row is another than that of the reference."""
    from fluxfast.kernels import flash
    from fluxfast.machine import processors

    heads = next(h for h in range(1, 200) if flash.parts_of(batch, tokens, h, processors())[0] > 1)
    query, key, _, transposed = heads_of(batch, tokens, heads, 1.0)
    got = flash.coded_attention(query, key, transposed).double()
    # The heads that are divided are the last of the last sample, one of them perhaps in part.
    for head in {0, max(heads - 2, 0), heads - 1}:
        own = [x[:, :, head : head + 1] for x in (query, key)]
        want = reference.coded_attention(*own, transposed[:, head : head + 1])[:, :, 0].double()
        error = (got[:, :, head] - want).norm(dim=-1) / want.norm(dim=-1)
        # A part may scale its codes by less than the row does, and so keep smaller ones.
        assert error.max() < 0.1 and error.square().mean().sqrt() < 0.02


@needs_kernels
@pytest.mark.parametrize(("batch", "tokens", "heads", "tiles", "parts"), [(2, 130, 3, 5, 3), (1, 257, 1, 3, 2)])
def test_triton_combine_parts(batch, tokens, heads, tiles, parts):
    """The last tiles are the means of their parts, whatever the weights' size; one without weight may be NaN."""
    pytest.importorskip("quack", reason="quack is not installed: pip install -e '.[dev]'")
    from fluxfast.kernels import flash

    partial = normal(tiles * parts, flash.QUERIES, 128)
    weights = 100 * torch.randn(tiles * parts, flash.QUERIES, device=DEVICE)
    partial[0, 7], weights[0, 7] = float("nan"), float("-inf")
    out = torch.zeros(batch, tokens, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    flash.combine_parts(partial, weights, out, parts)
    shares = weights.double().unflatten(0, (tiles, parts)).mul(math.log(2)).softmax(1)[..., None]
    means = (shares * partial.double().nan_to_num().unflatten(0, (tiles, parts))).sum(1)
    tall = flash.tall_of(tokens)
    expected = torch.zeros(batch * heads * tall, flash.QUERIES, 128, device=DEVICE, dtype=torch.double)
    expected[-tiles:] = means
    expected = expected.view(batch, heads, -1, 128)[:, :, :tokens].transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("is_bounded", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "heads", "tiles", "parts"), [(2, 130, 3, 5, 3), (1, 257, 1, 3, 2)])
def test_triton_combine_parts_quantized(batch, tokens, heads, tiles, parts, is_bounded):
    """Codes beside other columns, channels in order again, and a scale for each row of the first head that is there."""
    pytest.importorskip("quack", reason="quack is not installed: pip install -e '.[dev]'")
    from fluxfast.kernels import flash

    partial, weights = normal(tiles * parts, flash.QUERIES, 128), torch.randn(tiles * parts, flash.QUERIES).to(DEVICE)
    plain = torch.zeros(batch, tokens, heads, 128, dtype=torch.bfloat16, device=DEVICE)
    flash.combine_parts(partial, weights, plain, parts)
    order = reference._channel_order(128, DEVICE)
    largest = torch.tensor([5.0, 7.0], device=DEVICE)[:batch]
    row_scale, bound = torch.rand(batch * tokens, 1, device=DEVICE) / 40, torch.tensor([0.5, 1e-4], device=DEVICE)
    codes = torch.zeros(batch * tokens, heads * 128 + 16, device=DEVICE).to(E4M3)
    scale = torch.full((batch * tokens, 1), -1.0, device=DEVICE)
    scales = {"row_scale": row_scale, "bound": bound} if is_bounded else {}
    out = codes[:, : heads * 128].view(plain.shape)
    flash.combine_parts(partial[..., order], weights, out, parts, largest=largest, out_scale=scale, **scales)
    unit = (largest / 448).repeat_interleave(tokens)[:, None]
    unit = torch.maximum(unit, row_scale * 0.5 + 1e-4) if is_bounded else unit
    got = out.float() * unit.view(batch, tokens, 1, 1)
    torch.testing.assert_close(got, plain.float(), rtol=2**-4 + 2**-7, atol=unit.max().item() * 2**-9)
    # Of heads in the last tiles: the first one is there if they reach back to it.
    tall = flash.tall_of(tokens)
    first = torch.arange(batch * heads * tall).view(batch, heads, tall)[:, 0] >= batch * heads * tall - tiles
    written = first.repeat_interleave(flash.QUERIES, 1)[:, :tokens].flatten()[:, None].to(DEVICE)
    torch.testing.assert_close(scale, torch.where(written, unit, -1.0), rtol=1e-6, atol=0.0)
    assert not codes[:, heads * 128 :].float().any()


@quack_installed
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "expected"),
    [
        (1, 4352, 24, (5, 24)),  # 816 tiles: six waves of 132
        (1, 4608, 24, (1, 0)),  # 864: 72 are left, more than half a wave
        (1, 4224, 24, (5, 24)),  # the same: they come in pairs
        (1, 4096, 33, (1, 0)),  # 1056: none is left
        (1, 1000, 24, (2, 60)),  # 192
        (1, 512, 24, (1, 0)),  # not one wave
        (2, 129, 99, (1, 0)),  # 396: three waves
        (1, 257, 34, (2, 4)),  # 136: four left, of two blocks of keys
        (1, 200, 67, (1, 0)),  # 134: two left, of one block
        (1, 100, 67, (1, 0)),  # the same
    ],
)
def test_parts_of_the_last_wave(batch, tokens, heads, expected):
    """As many as find room at once, of a block of keys each at least."""
    from fluxfast.kernels import flash

    assert flash.parts_of(batch, tokens, heads, 132) == flash.parts_of(batch, tokens, heads, 133) == expected


@quack_installed
def test_coded_attention_refuses_what_does_not_fit():
    """Shapes, head sizes, lengths, types and a CPU, in one sentence each."""
    from fluxfast.kernels import flash

    query, key, value, transposed = heads_of(1, 130, 2, 1.0)
    attend = flash.coded_attention
    with pytest.raises(ValueError, match=r"'value': \(1, 2, 136, 144\)\} beside .* got .*'value': .*1, 130, 2, 128"):
        attend(query, key, value)
    with pytest.raises(ValueError, match="expected heads of 128, got 64"):
        attend(query[..., :64], key[..., :64], reference.transposed_values(value[..., :64]))
    with pytest.raises(ValueError, match=r"expected e4m3 q, k and v, got torch\.bfloat16"):
        attend(query.bfloat16(), key, transposed)
    with pytest.raises(ValueError, match="tensors on cpu; it runs on CUDA"):
        attend(*(x.cpu() for x in (query, key, transposed)))
    mixed, one = reference.transposed_values(value, mixed=True), torch.ones(1, device=DEVICE)
    with pytest.raises(ValueError, match=r"'largest': \(1,\)\} .* got \{'largest': \(2,\)\}"):
        flash.coded_attention_quantize(query, key, mixed, one.expand(2))
    with pytest.raises(ValueError, match="together or not at all"):
        flash.coded_attention_quantize(query, key, mixed, one, torch.ones(130, 1))


@implementations
def test_special_rows(kind):
    """NaN makes a row NaN, an infinity an infinite scale and NaN; zeros stay zeros; 1e30 survives."""
    x = normal(6, 40, dtype=torch.float32)
    x[1, 3], x[2, 5], x[3], x[4, 7], x[5] = float("nan"), float("inf"), 0.0, 1e30, x[5] * 1e-14
    concatenated = operation(kind, "gelu_concat_quantize")(x, torch.zeros_like(x))
    for q, scale in (concatenated, operation(kind, "quantize_rows")(x)):
        q = q.float()
        assert q[1].isnan().all() and scale[1].isnan()
        assert scale[2].isinf() and q[2, 5].isnan() and (q[2].nan_to_num() == 0).all()
        assert (q[3] == 0).all() and scale[3].isfinite() and scale[3] > 0
        assert q[4, 7] == 448 and (q[4].abs().sum() == 448)
        assert scale[5].isfinite() and q[[0, 5]].isfinite().all()
    assert operation(kind, "gelu_quantize")(x)[0][1].float().isnan().all()
    vectors = torch.zeros(1, 40, device=DEVICE), torch.zeros(1, 40, device=DEVICE)
    q, scale = operation(kind, "layernorm_modulate_quantize")(x, *vectors)
    assert q.float()[1:3].isnan().all() and scale[1:3].isnan().all() and (q.float()[3] == 0).all()


@implementations
def test_casts(kind):
    """The unscaled cast agrees with PyTorch's for every magnitude: ties, carries, subnormals, saturation, NaN."""
    dim = 4096
    v = torch.randn(dim, device=DEVICE) * torch.exp(4 * torch.randn(dim, device=DEVICE))
    v[:9] = torch.tensor([448.0, 464.0, 465.0, 1e9, float("inf"), float("-inf"), float("nan"), -0.0, 2**-10])
    v[9:1025] = torch.arange(1016, device=DEVICE).float() * 2**-10
    qkv, ones = torch.cat([v, v, v])[None, None], torch.ones(dim, device=DEVICE)
    cast = operation(kind, "qk_norm_rope_quantize")(qkv, ones, ones, *(2 * [torch.zeros(1, dim, device=DEVICE)]))[2]
    expected = v.clamp(-448, 448).to(E4M3)
    assert torch.equal(cast.flatten().view(torch.uint8)[~v.isnan()], expected.view(torch.uint8)[~v.isnan()])
    assert torch.equal(cast.flatten().float().isnan(), v.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_is_torchaos(dtype):
    """Codes and scales equal torchao's per-row ones bit for bit on float32, up to its rounded scale on bfloat16."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x = normal(64, 96, dtype=dtype)
    q, scale = quantize_rowwise(x)
    theirs = primitives._choose_scale_float8(x, block_size=[1, 96])
    codes = primitives._quantize_affine_float8(x, theirs)
    if dtype == torch.float32:
        assert torch.equal(scale, theirs) and torch.equal(q.view(torch.uint8), codes.view(torch.uint8))
    torch.testing.assert_close(scale, theirs, rtol=2**-8, atol=0.0)


def example_arguments(name: str) -> tuple:
    rows, vectors = normal(4, 64), [normal(2, 64) for _ in range(3)]
    heads = (normal(1, 4, 384), *(normal(64) for _ in range(2)), *(normal(4, 64) for _ in range(2)))
    return {
        "gelu_concat_quantize": (rows, normal(4, 96)),
        "gelu_quantize": (rows,),
        "quantize_rows": (normal(2, 3, 64),),
        "layernorm_modulate_quantize": (rows, *vectors[:2]),
        "layernorm_modulate_quantize_with_value": (rows, *vectors[:2]),
        "residual_layernorm_modulate_quantize": (rows, normal(4, 64), *vectors),
        "qk_norm_rope_quantize": heads,
        "qk_norm_rope_hadamard_quantize": heads,
        "grouped_layernorm_modulate_quantize": (normal(2, 5, 64), *normal(2, 2, 2, 64).unbind(2), 2),
        TRANSPOSED: heads,
        MIXED: heads,
        BEHIND_VALUES: (heads[0][..., :256], *heads[1:]),
    }[name]


@needs_kernels
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton_op_traces(name):
    """Each operation passes opcheck, compiles as one graph and exports, with the same codes as eagerly."""
    op, arguments = operation("triton", name), example_arguments(name)
    checks = ["test_schema", "test_faketensor"] + (["test_aot_dispatch_dynamic"] if CUDA else [])
    torch.library.opcheck(op, arguments, test_utils=checks)
    expected = [t.float() for t in op(*arguments)]

    class Calls(torch.nn.Module):
        def forward(self, *args):
            return op(*args)

    # All operations are called by the same line, and Dynamo compiles that for no more than eight.
    torch._dynamo.reset()
    compiled = torch.compile(Calls(), fullgraph=True, backend="inductor" if CUDA else "eager")
    exported = torch.export.export(Calls(), arguments).module()
    for call in (compiled, exported):
        assert all(torch.equal(a.float(), b) for a, b in zip(call(*arguments), expected, strict=True))


@implementations
def test_rows_that_samples_cannot_share(kind):
    """Rows that do not divide among the samples raise instead of being modulated by someone else's vectors."""
    with pytest.raises(ValueError, match="multiple of B"):
        operation(kind, "layernorm_modulate_quantize")(normal(5, 8), normal(2, 8), normal(2, 8))


@needs_kernels
def test_triton_ops_refuse_what_does_not_fit():
    """Shapes and strides that a kernel cannot take raise before anything is launched."""
    with pytest.raises(ValueError, match="expected"):
        operation("triton", "gelu_concat_quantize")(normal(2, 4), normal(3, 4))
    with pytest.raises(ValueError, match="contiguous"):
        operation("triton", "gelu_quantize")(normal(4, 6).t())
    with pytest.raises(ValueError, match="contiguous"):
        operation("triton", "quantize_rows")(normal(4, 6).t())
    with pytest.raises(ValueError, match="two axes or more"):
        operation("triton", "quantize_rows")(normal(4))
    heads_of_four = normal(1, 2, 24), normal(4), normal(4), normal(2, 4), normal(2, 4)
    operation("triton", "qk_norm_rope_quantize")(*heads_of_four)
    with pytest.raises(ValueError, match="a power of 2, at least 64"):
        operation("triton", "qk_norm_rope_hadamard_quantize")(*heads_of_four)
