"""The fused FLUX blocks against diffusers', unquantised and in float8, on a small transformer with random weights."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fluxfast.build import build, generate
from fluxfast.compilation import Compiler, compile_transformer
from fluxfast.kernels import fuse, reference
from fluxfast.kernels.blocks import FusedFluxSingleTransformerBlock, Pending, _ModulatedBlock, add_pending
from fluxfast.kernels.fuse import fuse_blocks
from fluxfast.kernels.linear import (
    DenseLinear,
    GroupedRowwiseFloat8Linear,
    RowwiseFloat8GeluLinear,
    RowwiseFloat8Linear,
    RowwiseFloat8ResidualLinear,
)
from fluxfast.kernels.modulation import PrecomputedModulation
from fluxfast.kernels.ops import EXACT, REFERENCE, BlockOps, GroupedOps, epilogue_linears, triton_ops, with_values
from fluxfast.kernels.rowwise import dequantize_rowwise, quantize_rowwise
from fluxfast.levels import get_level
from fluxfast.workloads import TINY

diffusers = pytest.importorskip("diffusers")
transformer_flux = pytest.importorskip("diffusers.models.transformers.transformer_flux")

WIDTH, TEXT, GRID = 256, 6, 4

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None,
    reason="run by test_kernels.py in Triton's interpreter",
)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention on (B, S, H, Dh) in float32, whatever the type of its inputs."""
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_bf16(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention(q, k, v).bfloat16()


@pytest.fixture
def transformer() -> nn.Module:
    """Two double and two single blocks."""
    return make_transformer(2, 2)


def make_transformer(double: int, single: int) -> nn.Module:
    """FLUX's shape with head dimension 128 and 2 heads, every parameter random, norm weights around 1.

    The same ones in every test and run: two ways of rounding differ by a few per cent of their error, and among all
    weights there are some with which they differ by more than a bound that would find a mistake.
    """
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
    ).eval()
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if "norm_" in name and name.endswith("weight") and parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            elif parameter.dim() == 1:
                # Gates of magnitude one, or the residual stream would hide what the blocks compute.
                parameter.normal_(0.0, 1.0 if ".linear." in name else 0.1)
    return model.requires_grad_(False)


def run(model: nn.Module, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """One forward pass with inputs that depend on `batch` and `seed` only."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    ids = torch.zeros(GRID * GRID, 3)
    ids[:, 1:] = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(batch, GRID * GRID, 16, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(batch, TEXT, 32, generator=generator).to(dtype),
            pooled_projections=torch.randn(batch, 24, generator=generator).to(dtype),
            timestep=torch.rand(batch, generator=generator).to(dtype),
            img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3),
            return_dict=False,
        )[0].float()


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def fused(model: nn.Module, **options) -> nn.Module:
    model = copy.deepcopy(model)
    fuse_blocks(model, **options)
    return model


@pytest.mark.parametrize("chain", [{}, {"chained": True}, {"chained": True, "fused_residuals": True}], ids=len)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_unquantised_blocks_equal_diffusers(transformer, batch, merged, chain):
    """Without quantisation the fused blocks are diffusers' up to float32 rounding, in every arrangement."""
    model = fused(transformer, attention=attention, ops=EXACT, merged_projections=merged, **chain)
    assert relative_error(run(model, batch), run(transformer, batch)) < 1e-5


class _ExactEpilogues(DenseLinear):
    """An unquantised Linear with GELU or the gated residual behind it."""

    def forward_gelu(self, x: torch.Tensor, scale: None, left: torch.Tensor | None = None) -> tuple[torch.Tensor, None]:
        y = F.gelu(self.forward_quantized(x, scale), approximate="tanh")
        return y if left is None else torch.cat([left, y], dim=-1), None

    def forward_residual(
        self, x: torch.Tensor, scale: None, residual: torch.Tensor, gate: torch.Tensor
    ) -> torch.Tensor:
        return reference.gated_residual(residual, self.forward_quantized(x, scale), gate)


EPILOGUES = [("gelu_linear",), ("residual_linear",), ("gelu_linear", "residual_linear")]


@pytest.mark.parametrize("chained", [False, True])
@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
@pytest.mark.parametrize("batch", [1, 3])
def test_unquantised_blocks_with_epilogues_equal_diffusers(transformer, batch, names, chained):
    """Wherever a GEMM does what a kernel behind it did, every gate, residual and half of a row is where it was."""
    operations = dataclasses.replace(EXACT, **dict.fromkeys(names, _ExactEpilogues.from_linears))
    model = fused(transformer, attention=attention, ops=operations, chained=chained)
    assert relative_error(run(model, batch), run(transformer, batch)) < 1e-5


@pytest.mark.parametrize("names", EPILOGUES, ids="+".join)
def test_float8_epilogues_lose_no_more_than_the_kernels(transformer, names):
    """Scales from a bound cost nothing that shows, and a residual that is rounded once less gains nothing that does."""
    exact = run(transformer, batch=2)
    transformer.to(torch.bfloat16)
    options = {"attention": attention_bf16, "chained": True}
    error = relative_error(run(fused(transformer, ops=REFERENCE, **options), batch=2), exact)
    made = {
        "gelu_linear": epilogue_linears(RowwiseFloat8GeluLinear, operation=reference.gelu_linear_quantize),
        "residual_linear": epilogue_linears(RowwiseFloat8ResidualLinear, operation=reference.residual_linear),
    }
    model = fused(transformer, ops=dataclasses.replace(REFERENCE, **{name: made[name] for name in names}), **options)
    assert 0.01 < relative_error(run(model, batch=2), exact) < 1.1 * error


@pytest.fixture
def with_epilogues() -> BlockOps:
    """What is quantised behind a product, and what its gate lets in, in the product's epilogue, on a CPU."""
    gelu = {"operation": reference.gelu_linear_quantize, "beside": reference.gelu_linear_quantize_beside}
    return dataclasses.replace(
        REFERENCE,
        gelu_linear=epilogue_linears(RowwiseFloat8GeluLinear, **gelu),
        residual_linear=epilogue_linears(RowwiseFloat8ResidualLinear, operation=reference.residual_linear),
        qk_norm_rope=reference.qk_norm_rope_hadamard_quantize_transposed,
    )


@pytest.fixture
def with_attention_epilogue(with_epilogues: BlockOps) -> BlockOps:
    """And the attention's output in the attention's."""
    return dataclasses.replace(
        with_epilogues,
        qk_norm_rope=reference.qk_norm_rope_hadamard_quantize_mixed,
        attention_quantize=reference.coded_attention_quantize,
    )


GROUPED = GroupedOps(
    layernorm_modulate=reference.grouped_layernorm_modulate_quantize,
    linear=reference.grouped_linear,
    gelu_linear=reference.grouped_gelu_linear_quantize,
    residual_linear=reference.grouped_residual_linear,
)


@pytest.mark.parametrize("chained", [False, True])
def test_attention_epilogue_loses_no_more(transformer, with_epilogues, with_attention_epilogue, chained):
    """One scale for all rows of a sample, V's, costs nothing that shows, nor does the larger one beside an MLP."""
    exact = run(transformer, batch=2)
    transformer.to(torch.bfloat16)
    options = {"attention": reference.coded_attention, "chained": chained}
    error = relative_error(run(fused(transformer, ops=with_epilogues, **options), batch=2), exact)
    got = run(fused(transformer, ops=with_attention_epilogue, **options), batch=2)
    assert 0.01 < relative_error(got, exact) < 1.1 * error


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("attention_epilogue", [False, True])
def test_grouped_blocks_are_those_of_two_streams(
    transformer, with_epilogues, with_attention_epilogue, batch, attention_epilogue, monkeypatch
):
    """Text's tokens meet text's weights, vectors and gates, and the image's its own; but for sums' order, no more."""

    def forward_quantized(linear: RowwiseFloat8Linear, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        weights = linear.weight, linear.weight_scale, linear.bias
        return reference.scaled_product(q, scale, *weights).to(torch.bfloat16)

    # PyTorch's own sums are of another order, and an element that rounds to the next code moves all behind it.
    monkeypatch.setattr(RowwiseFloat8Linear, "forward_quantized", forward_quantized)
    exact = run(transformer, batch)
    transformer.to(torch.bfloat16)
    ops = with_attention_epilogue if attention_epilogue else with_epilogues
    options = {"attention": reference.coded_attention, "chained": True}
    want = run(fused(transformer, ops=ops, **options), batch)
    model = fused(transformer, ops=dataclasses.replace(ops, grouped=GROUPED), **options)
    assert relative_error(run(model, batch), want) < 0.2 * relative_error(want, exact)
    tembs = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: tembs.append(kwargs["temb"]), with_kwargs=True
    )
    got = run(model, batch)
    hook.remove()
    modulate(PrecomputedModulation([*model.transformer_blocks, *model.single_transformer_blocks]), tembs[0][None])
    torch.testing.assert_close(run(model, batch), got)


@pytest.mark.parametrize(("double", "single"), [(2, 0), (0, 2), (1, 1)])
def test_grouped_blocks_of_one_kind(with_epilogues, double, single):
    """Streams are joined in front of the first block and taken apart behind the last, of whichever kind they are."""
    transformer = make_transformer(double, single).to(torch.bfloat16)
    options = {"attention": reference.coded_attention, "chained": True}
    want = run(fused(transformer, ops=with_epilogues, **options))
    got = run(fused(transformer, ops=dataclasses.replace(with_epilogues, grouped=GROUPED), **options))
    assert relative_error(got, want) < 0.03


@pytest.mark.parametrize("batch", [1, 2])
def test_gemms_that_write_what_attention_takes(transformer, with_attention_epilogue, batch):
    """V that is written transposed loses no more than what a kernel behind transposes."""
    exact = run(transformer, batch)
    transformer.to(torch.bfloat16)
    options = {"attention": reference.coded_attention, "chained": True}
    kernels = dataclasses.replace(with_attention_epilogue, grouped=GROUPED)
    error = relative_error(run(fused(transformer, ops=kernels, **options), batch), exact)
    changes = with_values(reference.qk_norm_rope_hadamard_quantize_without_values, reference.qkv_linear)
    grouped = dataclasses.replace(GROUPED, linear=reference.grouped_qkv_linear)
    ops = dataclasses.replace(with_attention_epilogue, **changes, grouped=grouped)
    assert 0.01 < relative_error(run(fused(transformer, ops=ops, **options), batch), exact) < 1.1 * error


def streams(transformer: nn.Module, size: float, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The joint stream that the last block leaves, and the image's behind all hooks, as float32.

    Args:
        size: how many times as large the embeddings are. dtype: to hold the stream in another type.
    """

    def enlarge(embedder, args, output):
        return output * size

    def enter(block, args, kwargs):
        x = kwargs["hidden_states"]
        return args, kwargs | {"hidden_states": x if dtype is None else x.to(dtype)}

    def leave(block, args, output):
        seen.append(output[1].float())
        return output if dtype is None else (output[0], output[1].bfloat16())

    def arrive(norm, args):
        seen.append(args[0].float())

    blocks, seen = [*transformer.transformer_blocks, *transformer.single_transformer_blocks], []
    embedders = (transformer.x_embedder, transformer.context_embedder)
    hooks = [embedder.register_forward_hook(enlarge) for embedder in embedders]
    hooks.append(blocks[0].register_forward_pre_hook(enter, with_kwargs=True))
    hooks.append(blocks[-1].register_forward_hook(leave, prepend=True))
    hooks.append(transformer.norm_out.register_forward_pre_hook(arrive))
    run(transformer)
    for hook in hooks:
        hook.remove()
    return seen[0], seen[1]


@pytest.mark.parametrize("kinds", [(1, 0), (0, 1), (3, 3)])
@pytest.mark.parametrize("size", [1.0, 1e5])
def test_float16_stream_is_the_stream(with_epilogues, kinds, size):
    """As near to a float32 one as bfloat16 comes, nearer where only its rounding differs; float16 itself overflows."""
    transformer = make_transformer(*kinds).to(torch.bfloat16)
    options = {"attention": reference.coded_attention, "chained": True}
    options["ops"] = dataclasses.replace(with_epilogues, grouped=GROUPED)
    plain, narrow = fused(transformer, **options), fused(transformer, **options, float16_stream=True)
    want, image = streams(plain, size, torch.float32)
    (joint, its_image), (other_joint, other_image) = streams(narrow, size), streams(plain, size)
    error, other = relative_error(joint * fuse.STREAM_UNIT, want), relative_error(other_joint, want)
    assert (want.abs().max() > 65504) == (size > 1)
    # Behind one single block nothing differs but the rounding of its sums, which are those of embeddings alone if these
    # are large; behind more the codes do.
    assert error < (other / 6 if (kinds, size) == ((0, 1), 1.0) else 1.2 * other) and other < 0.05
    # Rounded to bfloat16 in the end.
    assert relative_error(its_image, image) < 1.2 * relative_error(other_image, image) + 2**-9


def test_float16_stream_is_one_that_gemms_add_to(transformer, with_epilogues):
    """Two streams, and residuals that something else adds, are refused in one sentence."""
    with pytest.raises(ValueError, match="float16_stream is for grouped blocks"):
        fuse_blocks(transformer, attention=attention, ops=with_epilogues, chained=True, float16_stream=True)


def test_grouped_blocks_refuse_streams_that_are_taken_apart(transformer, with_epilogues):
    """Single blocks that join their streams themselves would get a joint one, and Linears of two sizes have no GEMM."""
    ops = dataclasses.replace(with_epilogues, grouped=GROUPED)
    with pytest.raises(ValueError, match="need chained"):
        fuse_blocks(transformer, attention=attention, ops=ops)
    linears = (RowwiseFloat8Linear(torch.randn(size, 32), None) for size in (16, 32))
    with pytest.raises(ValueError, match="two Linears of one size"):
        GroupedRowwiseFloat8Linear(*linears, operation=reference.grouped_linear)


def test_epilogues_refuse_what_they_replace(transformer):
    """One GEMM for QKV and MLP has columns without GELU, and a residual that is added leaves none to hand on."""
    gelu = dataclasses.replace(EXACT, gelu_linear=_ExactEpilogues.from_linears)
    with pytest.raises(ValueError, match="merged_projections has QKV in the GEMM"):
        fuse_blocks(copy.deepcopy(transformer), attention=attention, ops=gelu, merged_projections=True)
    residual = dataclasses.replace(EXACT, residual_linear=_ExactEpilogues.from_linears)
    with pytest.raises(ValueError, match="residual_linear leaves nothing"):
        fuse_blocks(transformer, attention=attention, ops=residual, chained=True, fused_residuals=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("double", "single"), [(1, 1), (3, 1), (1, 3), (2, 0), (0, 2)])
def test_residuals_left_to_the_next_block(double, single, batch):
    """However many blocks there are: what a block leaves is added once, by the next one or behind the last."""
    transformer = make_transformer(double, single)
    model = fused(transformer, attention=attention, ops=EXACT, chained=True, fused_residuals=True)
    want = run(transformer, batch)
    assert relative_error(run(model, batch), want) < 1e-5
    tembs = []
    hook = (model.transformer_blocks or model.single_transformer_blocks)[0].register_forward_pre_hook(
        lambda block, args, kwargs: tembs.append(kwargs["temb"]), with_kwargs=True
    )
    run(model, batch)
    hook.remove()
    modulate(PrecomputedModulation([*model.transformer_blocks, *model.single_transformer_blocks]), tembs[0][None])
    assert relative_error(run(model, batch), want) < 1e-5


def test_residual_behind_the_last_block_is_rounded_once():
    """As the norm's kernel rounds it, bit for bit in bfloat16, with each sample's own gate."""
    x, y, modulation = torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 5, 16).bfloat16(), torch.randn(2, 48).bfloat16()
    want = reference.gated_residual(x.flatten(0, 1), y.flatten(0, 1), modulation[:, 32:])
    assert torch.equal(add_pending(Pending(x, y, modulation, 2)).flatten(0, 1), want)


def test_residuals_of_streams_that_are_taken_apart_are_refused(transformer):
    """Without the joint stream there is nothing to hand on between single blocks."""
    with pytest.raises(ValueError, match="needs chained"):
        fuse_blocks(transformer, attention=attention, ops=EXACT, fused_residuals=True)


@pytest.mark.parametrize(("batch", "is_precomputed"), [(1, True), (2, False), (2, True)])
def test_blocks_with_pending_residuals_compile_once(transformer, batch, is_precomputed):
    """By Inductor: the first block of a kind gets its streams in the layout of the later ones, in every step."""
    exact = run(transformer, batch, seed=1)
    transformer.to(torch.bfloat16)
    options = {"attention": attention_bf16, "ops": REFERENCE, "merged_projections": True, "chained": True}
    error = relative_error(run(fused(transformer, **options), batch, seed=1), exact)
    model = fused(transformer, fused_residuals=True, **options)
    if is_precomputed:
        modulation = PrecomputedModulation([*model.transformer_blocks, *model.single_transformer_blocks])
        model.time_text_embed.register_forward_hook(lambda module, args, temb: modulate(modulation, temb[None]))
    torch._dynamo.reset()
    compiler = Compiler({})
    assert compile_transformer(model, compiler, "blocks") == 2
    for seed in (0, 1):
        got = run(model, batch, seed)
    torch._dynamo.reset()
    assert len(compiler.graphs) == 2
    assert relative_error(got, exact) < 1.1 * error


@pytest.mark.parametrize("kind", ["reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_residuals_left_to_the_next_block_change_no_bit(transformer, kind, monkeypatch):
    """Where a block rounds its sum once, as Inductor does, the next block's norm in float8 makes the same of it."""
    transformer.to(torch.bfloat16)
    operations = REFERENCE if kind == "reference" else triton_ops()
    options = {"attention": attention_bf16, "ops": operations, "merged_projections": True, "chained": True}
    got = run(fused(transformer, fused_residuals=True, **options), batch=2)
    leave = _ModulatedBlock._leave

    def leave_added(block, *args):
        block.fused_residuals = True
        x = leave(block, *args)
        block.fused_residuals = False
        return add_pending(x)

    monkeypatch.setattr(_ModulatedBlock, "_leave", leave_added)
    assert torch.equal(got, run(fused(transformer, **options), batch=2))


def test_hadamard_transform_changes_no_product(transformer):
    """In front of an attention that rounds nothing, q and k give diffusers' output in whatever basis they are."""

    def qk_norm_rope(*args):
        q, k, v = reference.qk_norm_rope(*args)
        return reference.hadamard(q), reference.hadamard(k), v

    model = fused(transformer, attention=attention, ops=dataclasses.replace(EXACT, qk_norm_rope=qk_norm_rope))
    assert relative_error(run(model), run(transformer)) < 1e-5


def test_hadamard_transform_saves_trained_attention_in_float8():
    """On the shipped checkpoint: q and k of trained weights have channels that are large in both, random ones do not.

    Everything but q, k and v is exact, so the whole error of the first step's output is the attention's.
    """
    built = build(TINY, get_level("fp32"))

    def first_step() -> torch.Tensor:
        outputs = []
        hook = built.pipeline.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
        generate(built, TINY, num_inference_steps=1, output_type="latent")
        hook.remove()
        return outputs[0]

    want, plain = first_step(), built.pipeline.transformer
    errors = {}
    for op in (reference.qk_norm_rope_quantize, reference.qk_norm_rope_hadamard_quantize):
        operations = dataclasses.replace(EXACT, qk_norm_rope=op)
        built.pipeline.transformer = fused(plain, attention=attention, ops=operations)
        errors[op] = relative_error(first_step(), want)
    untransformed, transformed = errors.values()
    assert 0.005 < transformed < untransformed / 2


def test_unquantised_bfloat16_blocks_round_no_worse_than_diffusers(transformer):
    """In bfloat16 the unquantised blocks are as near to float32 as diffusers' own."""
    want = run(transformer)
    transformer.to(torch.bfloat16)
    model = fused(transformer, attention=attention_bf16, ops=EXACT)
    assert relative_error(run(model), want) < 1.5 * relative_error(run(transformer), want)


def test_blocks_of_a_fused_transformer(transformer):
    """Projections that diffusers fused before are taken as they are."""
    want = run(transformer)
    transformer.fuse_qkv_projections()
    assert relative_error(run(fused(transformer, attention=attention, ops=EXACT)), want) < 1e-5


class _FakeQuantized(nn.Module):
    """The least a row-wise float8 Linear can lose: both operands quantised, product and bias in float32."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = dequantize_rowwise(*quantize_rowwise(linear.weight)), linear.bias.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(dequantize_rowwise(*quantize_rowwise(x)), self.weight, self.bias).to(x.dtype)


@pytest.mark.parametrize("merged", [False, True])
def test_float8_blocks_lose_what_float8_linears_and_attention_lose(transformer, merged, monkeypatch):
    """The float8 blocks' error is that of diffusers' blocks with float8 Linears and q, k, v cast to e4m3."""
    want = run(transformer)
    transformer.to(torch.bfloat16)
    model = fused(transformer, attention=attention_bf16, ops=REFERENCE, merged_projections=merged, chained=True)
    assert sum(isinstance(m, RowwiseFloat8Linear) for m in model.modules()) == 2 * 8 + 2 * (2 if merged else 3)
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        for name, linear in [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]:
            if ".linear" not in name:
                parent, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(parent), leaf, _FakeQuantized(linear))
    monkeypatch.setattr(
        transformer_flux,
        "dispatch_attention_fn",
        lambda q, k, v, **_: attention_bf16(*(t.to(torch.float8_e4m3fn) for t in (q, k, v))),
    )
    assert 0.01 < relative_error(run(model), want) < 1.4 * relative_error(run(transformer), want)


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton_blocks_equal_reference_blocks(transformer):
    """Given strided views, two streams and a batch, the Triton blocks are as near to float32 as the reference's.

    A sum in another order rounds a few values to the next e4m3 number, so the two outputs are not equal; but they are
    nearer to each other than either is to float32.
    """
    exact = run(transformer, batch=2)
    transformer.to(torch.bfloat16)
    options = {"attention": attention_bf16, "merged_projections": True, "chained": True}
    transformed = dataclasses.replace(REFERENCE, qk_norm_rope=reference.qk_norm_rope_hadamard_quantize)
    plain = ({}, {"qk_rope": False}, {"quantize": False})
    for reference_ops, choices in ((REFERENCE, plain), (transformed, ({"hadamard": True},))):
        want = run(fused(transformer, ops=reference_ops, **options), batch=2)
        error = relative_error(want, exact)
        for choice in choices:
            got = run(fused(transformer, ops=triton_ops(**choice), **options), batch=2)
            assert relative_error(got, exact) < 1.1 * error
            assert relative_error(got, want) < error


def test_linear_is_the_quantised_product():
    """`_scaled_mm` with both scales and the bias equals the product of the dequantised operands, in bfloat16."""
    linear, x = nn.Linear(48, 32, dtype=torch.bfloat16), torch.randn(2, 5, 48).bfloat16()
    exact = F.linear(
        dequantize_rowwise(*quantize_rowwise(x)).double(),
        dequantize_rowwise(*quantize_rowwise(linear.weight)).double(),
        linear.bias.double(),
    )
    for split in (True, False):
        got = RowwiseFloat8Linear.from_linears([linear], bias_in_gemm=split)(x)
        torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)


def test_linears_refuse_what_they_cannot_convert():
    """Odd sizes, Linears of other inputs, and weights that are no plain tensors raise instead of being skipped."""
    with pytest.raises(ValueError, match="multiples of 16"):
        RowwiseFloat8Linear.from_linears([nn.Linear(48, 30)])
    with pytest.raises(ValueError, match="cannot be stacked"):
        RowwiseFloat8Linear.from_linears([nn.Linear(48, 32), nn.Linear(32, 32)])
    with pytest.raises(TypeError, match="plain weight"):
        RowwiseFloat8Linear.from_linears([nn.Identity()])
    with pytest.raises(ValueError, match="do not match"):
        DenseLinear.from_linears([nn.Linear(16, 16)]).forward_quantized(torch.zeros(1, 16), torch.ones(1, 1))


def modulate(modulation, tembs):
    """A table of so many steps' embeddings, and the first step's modulation."""
    modulation.use(modulation.compute(tembs))
    modulation.select(torch.arange(len(tembs)) == 0)


def test_precomputed_modulation_replaces_temb(transformer):
    """With the table, each step's output is that of its own embedding, whatever `temb` says, at one static address."""
    blocks = fuse_blocks(transformer, attention=attention, ops=EXACT)
    inputs = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    tembs, rotary = torch.randn(3, 2, WIDTH), (torch.rand(8, 128), torch.rand(8, 128))
    single = FusedFluxSingleTransformerBlock
    with torch.no_grad():
        want = [[b(*inputs, temb, rotary)[1] for b in blocks] for temb in tembs]
        modulation = PrecomputedModulation(blocks)
        with pytest.raises(ValueError, match="no step is known yet"):
            modulation.select(torch.tensor([True]))
        modulate(modulation, tembs)
        addresses = [block.modulation.data_ptr() for block in blocks]
        for step in (0, 2, 1):
            modulation.select(torch.arange(3) == step)
            for block, expected in zip(blocks, want[step], strict=True):
                torch.testing.assert_close(block(*inputs, torch.full((2, WIDTH), float("nan")), rotary)[1], expected)
        modulate(modulation, tembs.flip(0))
    assert addresses == [block.modulation.data_ptr() for block in blocks] and isinstance(blocks[-1], single)
    assert modulation.current.shape == (2, (2 * 12 + 2 * 3) * WIDTH)
    modulation.select(torch.arange(3) == 3)
    assert modulation.current.isnan().all(), "of a step that the table does not hold"


def test_blocks_refuse_attention_arguments(transformer):
    """IP-adapter and other attention arguments raise: the fused blocks do not know them."""
    block = fuse_blocks(transformer, attention=attention, ops=EXACT)[0]
    with pytest.raises(ValueError, match="ip_hidden_states"):
        block(*(torch.zeros(1, 2, WIDTH) for _ in range(2)), torch.zeros(1, WIDTH), None, {"ip_hidden_states": []})


def test_blocks_compile_as_one_graph(transformer):
    """Both float8 blocks trace without graph breaks, with `temb` and with precomputed modulation."""
    transformer.to(torch.bfloat16)
    blocks = fuse_blocks(transformer, attention=attention_bf16, ops=REFERENCE, merged_projections=True)
    arguments = (
        torch.randn(1, 5, WIDTH).bfloat16(),
        torch.randn(1, 3, WIDTH).bfloat16(),
        torch.randn(1, WIDTH).bfloat16(),
        (torch.rand(8, 128), torch.rand(8, 128)),
    )
    with torch.no_grad():
        for block in (blocks[0], blocks[-1]):
            want = block(*arguments)
            compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(*arguments), want, rtol=0.05, atol=0.05)
            modulate(PrecomputedModulation([block]), arguments[2][None])
            torch.testing.assert_close(compiled(*arguments), want, rtol=0.05, atol=0.05)
