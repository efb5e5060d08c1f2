"""The ladder: every optimisation level as frozen data. Imports nothing but the standard library.

A level differs from its parent in exactly one field (`tests/test_levels.py` holds this), so a red level names the
optimisation that broke. Ladder order is the order in which flux-fast introduced the optimisations; the order in which
they are *applied* is fixed in `build.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16"]
CompileMode = Literal["none", "max-autotune"]
MemoryFormat = Literal["contiguous", "channels_last"]
Attention = Literal["sdpa", "fa3_fp8", "fa3_fp8_cast_inside"]
Quantization = Literal["none", "float8_tensorwise", "float8_rowwise"]
Packaging = Literal["jit", "aoti"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """One rung of the ladder.

    Attributes:
        id: what engineers say; used unchanged in test ids, file names, report rows and JSON.
        parent: id of the rung below, None for the first.
        dtype: of the weights and activations of the whole pipeline.
        compile_mode: "max-autotune" compiles both block classes and the VAE decoder with Inductor; on CUDA it captures
            the transformer and the decoder in one CUDA graph each, as `torch.compile(mode="max-autotune")` would.
        fused_projections: one QKV GEMM instead of three in every attention of transformer and VAE decoder.
        memory_format: of the VAE.
        attention: "fa3_fp8" casts q, k, v to e4m3 without scales in front of FlashAttention-3, so that Inductor can
            fuse the cast; "fa3_fp8_cast_inside" casts inside the opaque op, as flux-fast does.
        quantization: "float8_tensorwise" is torchao's dynamic float8 with one scale a tensor, on every Linear of the
            transformer; "float8_rowwise" has one scale a row, on the blocks' Linears only: AdaLN, embedders and the
            output projection stay as they are.
        inductor_flags: `INDUCTOR_FLAGS`, which choose what Inductor makes of a graph, on top of max-autotune.
        packaging: "aoti" replaces torch.compile of the blocks by torch.export + AOTInductor packages.
        fused_quantize: Triton kernels that end in a row's maximum and e4m3: GELU, GELU + concatenation, LayerNorm +
            modulation, the same behind the gated residual. The single blocks hand on the joint text and image stream,
            because a kernel that Inductor cannot see into would need the concatenation in memory in every block.
        precomputed_modulation: every AdaLN shift, scale and gate of all steps in one pass before the loop, again for
            every pipeline call; the time and text embedding goes with it.
        fused_qk_rope: one Triton kernel for QK RMSNorm, RoPE, concatenation and the e4m3 cast, and RoPE's tables once
            per resolution instead of in every forward.
        merged_projections: QKV and MLP of a single block as one GEMM, 3072 -> 21504 in FLUX.1.
        whole_loop_graph: the denoising loop, scheduler included, is one CUDA graph instead of one a step; schedule and
            noise are staged, and an image's bytes are made on the GPU.
        fast_encode: both text encoders compiled layer by layer and, on CUDA, in one CUDA graph each; T5's position bias
            in an order that PyTorch's fused attentions take.
        fast_decode: one Triton operation for GroupNorm and SiLU in the VAE's decoder, which reads NHWC memory once for
            the statistics; it also adds the bias of a residual block's first convolution.
        no_gemm_workspace: cuBLASLt gets no workspace, so that it takes kernels with a static schedule: with one it
            prefers kernels that count tiles in memory, which has to be cleared before every GEMM.
        split_attention_tail: the query rows that would begin one more wave of tiles on a GPU that is full of them go
            to a second launch of FlashAttention-3, which splits the keys instead.
        no_host_waits: between a call's start and the copy of its image the host waits for nothing, so that it launches
            the loop while the text encoders run: T5 goes first and CLIP's tokens are made behind it, token ids are
            copied from pinned memory, and the ids of the text tokens stay on the device. Pillow keeps the memory of the
            last images, for the whole process.
        subpixel_upsampling: each of the decoder's nearest-neighbour upsamplings and the 3x3 convolution behind it as
            one 2x2 convolution of the small image, with four times the channels: 4 products for 9.
        fused_residuals: the gated residual at the end of a block, single or double, in the kernel of the next block's
            norm, and one Triton kernel that quantises a double block's attention output. Blocks hand on what is still
            to be added, and the first of either kind gets a zero gate, so that it is compiled like the others.
        hadamard_qk: q and k of every head through the same Hadamard transform in front of the e4m3 cast, in the kernel
            of `fused_qk_rope` ("incoherent processing"). Their products are what they were, and channels that are large
            in both, whose rounding is most of the attention's error, are spread over 64.
        gelu_epilogue: GELU and its quantisation in the GEMM in front of it, which is quack's instead of cuBLASLt's. Its
            rows have scales that are known before the product is, from a bound. The MLP of a single block has a GEMM of
            its own again: `merged_projections` would put QKV through the same epilogue.
        residual_epilogue: every gated residual of the blocks in the GEMM in front of it, quack's again, so that a norm
            reads one stream and a block leaves nothing to be added: of `fused_residuals` its quantising kernel stays.
        coded_softmax: attention of our own (CuTe DSL) in the place of FlashAttention-3 and of its second launch. It
            finds a probability's e4m3 code by an addition that rounds, without an exponential, and takes V transposed,
            from a kernel behind the QKV GEMM.
        attention_epilogue: the attention's output quantised in the attention's own epilogue. Its scale is known before
            a row is: an output is a mean of V, whose largest magnitude the kernel that transposes V finds. In a single
            block GELU's GEMM writes its codes beside. Nothing of `fused_residuals` is left then.
        grouped_gemms: text and image tokens of a double block as one stream, with a norm or a GEMM of both in one
            launch and with weights of their own, "grouped GEMMs" of quack. The streams are joined in front of the first
            double block instead of the first single one.
        float16_residuals: the residual stream of all blocks in float16, which has as many bytes as bfloat16 and three
            more bits of mantissa. It counts in 64s, lest large activations overflow.
        concurrent_encode: CLIP and the modulation of all steps run beside T5, in a CUDA stream of their own; the
            modulation leaves the loop's graph for one of its own.
        value_epilogue: V's cast to e4m3 and its transposition in the GEMM in front of them, quack's for single blocks
            too. Q and K are all that the kernel behind it reads then. Tokens of text are a multiple of 16.
        fused_t5: q, k and v of a T5 block in one GEMM; its gated GELU, and what it adds to the stream, in the epilogues
            of quack's GEMMs in front.
        gemm_search: max-autotune times Triton's GEMM templates beside the libraries' kernels, up to 106 for a shape in
            float8.
        coordinate_descent: Inductor's search for the launch parameters of every kernel it writes, which flux-fast
            switches on too. This and `gemm_search` are minutes a process, so they are rungs of their own.
    """

    id: str
    parent: str | None = None
    dtype: Dtype = "float32"
    compile_mode: CompileMode = "none"
    fused_projections: bool = False
    memory_format: MemoryFormat = "contiguous"
    attention: Attention = "sdpa"
    quantization: Quantization = "none"
    inductor_flags: bool = False
    packaging: Packaging = "jit"
    fused_quantize: bool = False
    precomputed_modulation: bool = False
    fused_qk_rope: bool = False
    merged_projections: bool = False
    whole_loop_graph: bool = False
    fast_encode: bool = False
    fast_decode: bool = False
    no_gemm_workspace: bool = False
    split_attention_tail: bool = False
    no_host_waits: bool = False
    subpixel_upsampling: bool = False
    fused_residuals: bool = False
    hadamard_qk: bool = False
    gelu_epilogue: bool = False
    residual_epilogue: bool = False
    coded_softmax: bool = False
    attention_epilogue: bool = False
    grouped_gemms: bool = False
    float16_residuals: bool = False
    concurrent_encode: bool = False
    value_epilogue: bool = False
    fused_t5: bool = False
    gemm_search: bool = False
    coordinate_descent: bool = False

    def then(self, id: str, **change: Any) -> Level:
        """The next rung: this level with one field changed.

        Raises:
            ValueError: if the change is not exactly one field with a new value.
        """
        if len(change) != 1 or all(getattr(self, field) == value for field, value in change.items()):
            raise ValueError(f"level {id!r}: a rung changes exactly one field of its parent {self.id!r}, got {change}")
        return dataclasses.replace(self, id=id, parent=self.id, **change)

    def fields(self) -> dict[str, Any]:
        """Every optimisation field and its value, without `id` and `parent`."""
        return {name: getattr(self, name) for name in FIELDS}

    @property
    def has_fused_blocks(self) -> bool:
        """Whether the transformer runs on the blocks of `fluxfast.kernels`, which quantise their own Linears."""
        return self.quantization == "float8_rowwise" and any(getattr(self, field) for field in FUSED_BLOCK_FIELDS)

    @property
    def own_field(self) -> str | None:
        """The field in which this level differs from its parent; None for the first rung."""
        if self.parent is None:
            return None
        parent = get_level(self.parent)
        return next(name for name in FIELDS if getattr(self, name) != getattr(parent, name))


FIELDS: tuple[str, ...] = tuple(f.name for f in dataclasses.fields(Level) if f.name not in ("id", "parent"))
QUACK_FIELDS: tuple[str, ...] = (
    "gelu_epilogue",
    "residual_epilogue",
    "coded_softmax",
    "attention_epilogue",
    "grouped_gemms",
    "float16_residuals",
    "value_epilogue",
)
"""Fields of the fused blocks that stand on quack-kernels."""
FUSED_BLOCK_FIELDS: tuple[str, ...] = (
    "fused_quantize",
    "precomputed_modulation",
    "fused_qk_rope",
    "merged_projections",
    "fused_residuals",
    "hadamard_qk",
    *QUACK_FIELDS,
)
DEFAULTS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(Level) if f.name in FIELDS}

INDUCTOR_FLAGS: dict[str, bool] = {"conv_1x1_as_mm": True, "epilogue_fusion": False}
COORDINATE_DESCENT: dict[str, bool] = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
}
"""Source of both: flux-fast's `run_benchmark.py`; torchao's float8 config sets these two unless told not to."""
TRITON_GEMMS: dict[str, str] = {"max_autotune_gemm_backends": "ATEN,TRITON"}
"""What `gemm_search` switches on."""

FP32 = Level(id="fp32")
BF16 = FP32.then("bf16", dtype="bfloat16")
COMPILE = BF16.then("compile", compile_mode="max-autotune")
FUSED_QKV = COMPILE.then("fused_qkv", fused_projections=True)
CHANNELS_LAST = FUSED_QKV.then("channels_last", memory_format="channels_last")
FA3_FP8 = CHANNELS_LAST.then("fa3_fp8", attention="fa3_fp8")
FLOAT8 = FA3_FP8.then("float8", quantization="float8_tensorwise")
WITH_FLAGS = FLOAT8.then("inductor_flags", inductor_flags=True)
AOTI = WITH_FLAGS.then("aoti", packaging="aoti")

LADDER: tuple[Level, ...] = (
    FP32,
    BF16,
    COMPILE,
    FUSED_QKV,
    CHANNELS_LAST,
    FA3_FP8,
    FLOAT8,
    WITH_FLAGS,
    AOTI,
)

FLUX_FAST = AOTI.then("flux_fast", attention="fa3_fp8_cast_inside")
FLUX_FAST_SEARCHED = FLUX_FAST.then("flux_fast_gemm_search", gemm_search=True)
FLUX_FAST_DESCENDED = FLUX_FAST_SEARCHED.then("flux_fast_coordinate_descent", coordinate_descent=True)
BESIDE: tuple[Level, ...] = (FLUX_FAST, FLUX_FAST_SEARCHED, FLUX_FAST_DESCENDED)
"""flux-fast's last recipe, beside the ladder, to be compared with: what it computes, then the same with its two
searches, each of which takes minutes a process. The last is exactly what flux-fast runs."""

FLOAT8_ROWWISE = FA3_FP8.then("float8_rowwise", quantization="float8_rowwise")

FUSED_QUANTIZE = FLOAT8_ROWWISE.then("fused_quantize", fused_quantize=True)
PRECOMPUTED_MODULATION = FUSED_QUANTIZE.then("precomputed_modulation", precomputed_modulation=True)
FUSED_QK_ROPE = PRECOMPUTED_MODULATION.then("fused_qk_rope", fused_qk_rope=True)
MERGED_PROJECTIONS = FUSED_QK_ROPE.then("merged_projections", merged_projections=True)
WHOLE_LOOP_GRAPH = MERGED_PROJECTIONS.then("whole_loop_graph", whole_loop_graph=True)
FAST_ENCODE = WHOLE_LOOP_GRAPH.then("fast_encode", fast_encode=True)
FAST_DECODE = FAST_ENCODE.then("fast_decode", fast_decode=True)
NO_GEMM_WORKSPACE = FAST_DECODE.then("no_gemm_workspace", no_gemm_workspace=True)
SPLIT_ATTENTION_TAIL = NO_GEMM_WORKSPACE.then("split_attention_tail", split_attention_tail=True)
NO_HOST_WAITS = SPLIT_ATTENTION_TAIL.then("no_host_waits", no_host_waits=True)
SUBPIXEL_UPSAMPLING = NO_HOST_WAITS.then("subpixel_upsampling", subpixel_upsampling=True)
FUSED_RESIDUALS = SUBPIXEL_UPSAMPLING.then("fused_residuals", fused_residuals=True)
HADAMARD_QK = FUSED_RESIDUALS.then("hadamard_qk", hadamard_qk=True)
GELU_EPILOGUE = HADAMARD_QK.then("gelu_epilogue", gelu_epilogue=True)
RESIDUAL_EPILOGUE = GELU_EPILOGUE.then("residual_epilogue", residual_epilogue=True)
CODED_SOFTMAX = RESIDUAL_EPILOGUE.then("coded_softmax", coded_softmax=True)
ATTENTION_EPILOGUE = CODED_SOFTMAX.then("attention_epilogue", attention_epilogue=True)
GROUPED_GEMMS = ATTENTION_EPILOGUE.then("grouped_gemms", grouped_gemms=True)
FLOAT16_RESIDUALS = GROUPED_GEMMS.then("float16_residuals", float16_residuals=True)
CONCURRENT_ENCODE = FLOAT16_RESIDUALS.then("concurrent_encode", concurrent_encode=True)
VALUE_EPILOGUE = CONCURRENT_ENCODE.then("value_epilogue", value_epilogue=True)
FUSED_T5 = VALUE_EPILOGUE.then("fused_t5", fused_t5=True)
GEMM_SEARCH = FUSED_T5.then("gemm_search", gemm_search=True)

BEYOND: tuple[Level, ...] = (
    FLOAT8_ROWWISE,
    FUSED_QUANTIZE,
    PRECOMPUTED_MODULATION,
    FUSED_QK_ROPE,
    MERGED_PROJECTIONS,
    WHOLE_LOOP_GRAPH,
    FAST_ENCODE,
    FAST_DECODE,
    NO_GEMM_WORKSPACE,
    SPLIT_ATTENTION_TAIL,
    NO_HOST_WAITS,
    SUBPIXEL_UPSAMPLING,
    FUSED_RESIDUALS,
    HADAMARD_QK,
    GELU_EPILOGUE,
    RESIDUAL_EPILOGUE,
    CODED_SOFTMAX,
    ATTENTION_EPILOGUE,
    GROUPED_GEMMS,
    FLOAT16_RESIDUALS,
    CONCURRENT_ENCODE,
    VALUE_EPILOGUE,
    FUSED_T5,
    GEMM_SEARCH,
)
"""Rungs past flux-fast: a chain of their own, so that the ladder stays flux-fast's and its numbers compare.

They branch off at `fa3_fp8`, compiled just in time. Not at `inductor_flags`: its `epilogue_fusion=False` forbids what
these rungs want Inductor to do around the GEMMs. Not at `aoti`: the Triton operations would be compiled ahead of time
once more for every rung while they change.
"""

LEVELS: dict[str, Level] = {level.id: level for level in (*LADDER, *BESIDE, *BEYOND)}
_PLACES = {id: place for place, id in enumerate(LEVELS)}


def place_of(id: str) -> int:
    """Where a level stands in a list of any: the ladder first, what the project no longer has last."""
    return _PLACES.get(id, len(_PLACES))


def get_level(id: str) -> Level:
    """The level called `id`.

    Raises:
        ValueError: naming the known levels.
    """
    if id not in LEVELS:
        raise ValueError(f"unknown level {id!r}; known levels: {', '.join(LEVELS)}")
    return LEVELS[id]
