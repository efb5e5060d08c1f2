"""Architecture, tokenizers and files of the tiny FLUX checkpoint.

Each component has the class and the layout of FLUX.1-schnell's and only the widths are small, so that what a kernel or
a compiler sees is the real thing: heads of 128, RoPE axes (16, 56, 56), Linears in multiples of 16 (float8 skips any
other size in silence), double and single blocks, 16 latent channels at an eighth of the picture's size.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from scenes import words
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_WIDTH = 128
TEXT_TOKENS = 64
STEPS = 4


def make_tokenizers():
    """(CLIPTokenizer, T5TokenizerFast) over the scenes' words; letters are there so that any English word encodes."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + [",", "."]

    # CLIP: byte-pair merges learnt from the words alone, so that each of them becomes one token.
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*words() * 4, *letters], trainer)
    learnt = json.loads(bpe.to_str())["model"]
    clip = CLIPTokenizer(vocab=learnt["vocab"], merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -1.0) for word in words()]
    pieces += [(letter, -8.0) for letter in letters]
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
    return clip, t5


def _round_up(n, step=16):
    return -(-n // step) * step


def make_pipeline(seed=0):
    """FluxPipeline with seeded random weights in float32 on the CPU."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = make_tokenizers()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=16,
        block_out_channels=(32, 64, 80, 96),
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        mid_block_add_attention=True,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=_round_up(len(clip_tokenizer)),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=TEXT_WIDTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=_round_up(len(t5_tokenizer)),
            d_model=TEXT_WIDTH,
            d_kv=64,
            num_heads=2,
            num_layers=2,
            d_ff=2 * TEXT_WIDTH,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
        )
    )
    # As FLUX.1-schnell: no shift, so that n steps are the sigmas 1, (n-1)/n, ... 1/n.
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False)
    return FluxPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def components(pipeline):
    """The four networks by their FluxPipeline names."""
    return {name: getattr(pipeline, name) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}


def start_as_identity(transformer):
    """Zeroes modulations and the output layer: each block begins as the identity (adaLN-Zero, arXiv:2212.09748).

    diffusers leaves torch's default initialisation, from which a short training converges markedly slower.
    """
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (name.endswith(".linear") or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def save_checkpoint(pipeline, folder):
    """Writes bf16 safetensors that stock `FluxPipeline.from_pretrained(folder)` loads.

    T5's tokenizer is recorded as T5TokenizerFast, the class in FluxPipeline's signature; transformers 5 keeps the name
    as an alias.
    """
    folder = Path(folder)
    dtypes = {name: module.dtype for name, module in components(pipeline).items()}
    for module in components(pipeline).values():
        torch.nn.Module.to(module, torch.bfloat16)  # diffusers' own `to` warns of layers to keep in float32: none here
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name, module in components(pipeline).items():
        torch.nn.Module.to(module, dtypes[name])
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text())
    index["tokenizer_2"] = ["transformers", "T5TokenizerFast"]
    index.pop("_name_or_path", None)
    index_file.write_text(json.dumps(index, indent=2) + "\n")


def load_checkpoint(folder, dtype=torch.float32):
    """The pipeline that any user gets: local files only, no progress bar."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
