"""The trainings on pictures behind the tiny checkpoint: autoencoder, rectified flow, four-step distillation.

Each is boxed in minutes rather than in steps (a faster GPU trains further in the same time) and anneals its learning
rate over that time. Each returns a dict of figures for the card.
"""

import math
import time
from contextlib import nullcontext

import torch
from scenes import CELLS_PX, IMAGE_PX, captions, render, sample
from tiny_flux_model import STEPS, TEXT_TOKENS

SHAPE_WEIGHT = 5.0  # nine tenths of a picture are background, which is learnt long before the shapes are
TOKENS, TOKEN_WIDTH = 256, 64  # a 256 px picture: 32 x 32 x 16 latents, packed two by two


class Schedule:
    """Time box of one training, its learning rate (warm-up, then cosine to zero) and its log lines."""

    def __init__(self, name, minutes, peak, *, warmup=200, max_steps=None, every=200):
        self.name, self.seconds, self.peak = name, minutes * 60, peak
        self.warmup, self.max_steps, self.every = warmup, max_steps, every
        self.step, self.started, self.recent, self.loss = 0, time.monotonic(), [], math.nan

    @property
    def elapsed(self):
        return time.monotonic() - self.started

    @property
    def share(self):
        done = self.elapsed / self.seconds
        return min(1.0, done if self.max_steps is None else max(done, self.step / self.max_steps))

    def advance(self, loss, parameters, optimizer):
        """One optimiser step on `loss`; False when the time is up."""
        rate = self.peak * min(1.0, (self.step + 1) / self.warmup) * (0.5 + 0.5 * math.cos(math.pi * self.share))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.recent.append(loss.detach())
        self.step += 1
        going = self.share < 1.0
        # Reading the loss waits for the device: now and then only.
        if self.step % self.every == 0 or not going:
            self.loss = torch.stack(self.recent).mean().item()
            self.recent.clear()
            print(f"{self.name} step {self.step} {self.elapsed:.0f} s loss {self.loss:.5f} lr {rate:.2e}", flush=True)
            if not math.isfinite(self.loss):
                raise RuntimeError(f"{self.name}: loss is {self.loss} at step {self.step}, expected a finite number")
        return going

    def figures(self):
        """What the card says of this training: `loss` is the mean over the last log interval."""
        return {"steps": self.step, "seconds": round(self.elapsed, 1), "loss": self.loss}


def bf16_autocast(device, enabled=True):
    """bf16 products on a GPU; plain float32 on the CPU, where autocast gains nothing."""
    return torch.autocast("cuda", torch.bfloat16) if enabled and device.type == "cuda" else nullcontext()


def adamw(parameters, device, beta2=0.99):
    """AdamW whose learning rate Schedule sets at each step."""
    return torch.optim.AdamW(parameters, lr=1e-9, betas=(0.9, beta2), weight_decay=0.01, fused=device.type == "cuda")


def train_vae(vae, generator, *, minutes, batch, max_steps=None):
    """L1 on colours and on their differences between neighbours (keeps edges sharp), and a very small KL term.

    On crowded scenes, and with saturated pixels counted more: on ordinary ones 1,400 steps left the few shapes with
    wrong colours behind a good 29.6 dB, all of it background.
    """
    device = generator.device
    vae.to(device, memory_format=torch.channels_last).train()
    parameters = list(vae.parameters())
    optimizer, schedule = adamw(parameters, device), Schedule("vae", minutes, 8e-4, max_steps=max_steps)
    going = True
    while going:
        # Quarters of pictures first: four times as many steps; whole pictures settle the attention in the middle.
        whole = schedule.share > 0.7
        images = render(sample(batch // 4 if whole else batch, generator, crowded=True)) * 2 - 1
        if not whole:
            top, left = torch.randint(IMAGE_PX // 2 + 1, (2,), generator=generator, device=device).tolist()
            images = images[:, :, top : top + IMAGE_PX // 2, left : left + IMAGE_PX // 2]
        images = images.contiguous(memory_format=torch.channels_last)
        with bf16_autocast(device):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator, device=device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        saturation = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)  # 0..2
        error = (decoded.float() - images) * (1 + saturation)
        loss = error.abs().mean() + 0.5 * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        going = schedule.advance(loss + 1e-4 * kl, parameters, optimizer)
    vae.eval()
    return schedule.figures() | measure_vae(vae, generator) | {"bf16": device.type == "cuda"}


@torch.no_grad()
def measure_vae(vae, generator, batches=4, size=16):
    """Sets shift and scaling so that latents have mean 0 and deviation 1; returns the PSNR in dB, crowded and not."""
    latents, psnr = [], {}
    for name, crowded in (("psnr_db", False), ("crowded_psnr_db", True)):
        errors = []
        for _ in range(batches):
            images = render(sample(size, generator, crowded=crowded)) * 2 - 1
            z = vae.encode(images).latent_dist.mode()
            errors.append(((vae.decode(z).sample.clamp(-1, 1) - images) / 2).square().mean((1, 2, 3)))
            if not crowded:  # what the flow will see
                latents.append(z)
        psnr[name] = round((-10 * torch.cat(errors).log10()).mean().item(), 2)
    latents = torch.cat(latents)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 5), scaling_factor=round(1 / latents.std().item(), 5)
    )
    return psnr


@torch.no_grad()
def make_pool(pipeline, generator, *, size, minutes, batch):
    """Draws and encodes up to `size` scenes within `minutes`.

    Returns packed latents (N, 256, 64) in bf16, the loss weights of their tokens (N, 256) and both token ids.
    """
    device, vae = generator.device, pipeline.vae
    vae.to(device, memory_format=torch.channels_last).eval()
    started, latents, weights, texts = time.monotonic(), [], [], []
    while len(texts) < size and time.monotonic() - started < minutes * 60:
        scenes = sample(batch, generator)
        with bf16_autocast(device):
            z = vae.encode(render(scenes) * 2 - 1).latent_dist.mode().float()
        z = (z - vae.config.shift_factor) * vae.config.scaling_factor
        latents.append(pipeline._pack_latents(z, batch, 16, 32, 32).bfloat16())
        weights.append(token_weights(scenes))
        texts += captions(scenes)
    pool = {"latents": torch.cat(latents), "weights": torch.cat(weights), **token_ids(pipeline, texts, device)}
    print(f"pool of {len(texts)} scenes in {time.monotonic() - started:.0f} s", flush=True)
    return pool


def token_weights(scenes):
    """(B, 256) weight of each image token: SHAPE_WEIGHT in the cells that the caption names, 1 elsewhere; mean 1.

    It depends on the caption alone, never on what the seed decides, so the minimum of the loss stays where it was.
    """
    device = scenes.count.device
    middle = torch.arange(16, device=device) * 16 + 8
    cells = torch.tensor(CELLS_PX, device=device)
    near = (middle - cells[:, None]).abs() < 46  # (3, 16) a large shape, its offset and its shadow
    present = torch.arange(scenes.shape.shape[1], device=device) < scenes.count[:, None]
    rows, columns = near[scenes.position // 3], near[scenes.position % 3]  # (B, slots, 16)
    inside = (rows[..., :, None] & columns[..., None, :] & present[..., None, None]).any(1).flatten(1)
    weights = 1 + (SHAPE_WEIGHT - 1) * inside
    return weights / weights.mean(1, keepdim=True)


def weighted_mse(predicted, target, weights):
    """Mean squared error of (B, 256, 64) with a weight for each token (B, 256)."""
    return ((predicted.float() - target).square().mean(-1) * weights).mean()


def token_ids(pipeline, texts, device):
    """Ids of both tokenizers, padded as FluxPipeline pads them: (N, 77) for CLIP, (N, 64) for T5."""

    def ids(tokenizer, length):
        return tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.to(device)

    return {"clip": ids(pipeline.tokenizer, 77), "t5": ids(pipeline.tokenizer_2, TEXT_TOKENS)}


def encode_text(pipeline, ids):
    """(pooled (B, 128), sequence (B, 64, 128)) of token ids. No attention mask, as in FluxPipeline: padding counts."""
    return pipeline.text_encoder(ids["clip"]).pooler_output, pipeline.text_encoder_2(ids["t5"])[0]


def velocity(transformer, x, sigma, text):
    """d x / d sigma (B, 256, 64) at noise level sigma (B,), with the ids that FluxPipeline makes."""
    pooled, sequence = text
    rows = torch.arange(16, device=x.device, dtype=torch.float32)
    y, z = torch.meshgrid(rows, rows, indexing="ij")
    img_ids = torch.stack([torch.zeros_like(y), y, z], -1).reshape(TOKENS, 3)
    txt_ids = torch.zeros(sequence.shape[1], 3, device=x.device)
    return transformer(
        hidden_states=x,
        timestep=sigma,
        pooled_projections=pooled,
        encoder_hidden_states=sequence,
        img_ids=img_ids,
        txt_ids=txt_ids,
        return_dict=False,
    )[0]


def to_device(pipeline, device):
    """Transformer and text encoders, in eval mode: there is no dropout, and one mode compiles once."""
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        module.to(device).eval()


def take(pool, index):
    """Rows of each tensor of the pool."""
    return {name: values[index] for name, values in pool.items()}


def train_flow(pipeline, pool, generator, *, minutes, batch, peak=1e-3, bf16=False, max_steps=None):
    """Rectified flow: predict noise - picture on the straight line between the two. The text encoders stay as they are.

    One caption in ten is dropped, which the guided teacher of the distillation needs. The pipeline ends with the
    exponential moving average of the weights.
    """
    device = generator.device
    to_device(pipeline, device)
    parameters = list(pipeline.transformer.parameters())
    average = [p.detach().clone() for p in parameters]
    empty = token_ids(pipeline, [""], device)
    optimizer, schedule = adamw(parameters, device), Schedule("flow", minutes, peak, warmup=300, max_steps=max_steps)
    going = True
    while going:
        index = torch.randint(len(pool["latents"]), (batch,), generator=generator, device=device)
        rows = take(pool, index)
        drop = torch.rand(batch, 1, generator=generator, device=device) < 0.1
        ids = {name: torch.where(drop, empty[name], rows[name]) for name in empty}
        picture = rows["latents"].float()
        noise = torch.randn(picture.shape, generator=generator, device=device)
        # Mostly the middle and the noisy end, where the layout is decided; a part everywhere.
        normal = torch.sigmoid(torch.randn(batch, generator=generator, device=device) + 0.4)
        uniform = torch.rand(batch, generator=generator, device=device)
        sigma = torch.where(torch.rand(batch, generator=generator, device=device) < 0.25, uniform, normal)
        x = torch.lerp(picture, noise, sigma[:, None, None])
        with torch.no_grad():
            text = encode_text(pipeline, ids)
        with bf16_autocast(device, bf16):
            predicted = velocity(pipeline.transformer, x, sigma, text)
        loss = weighted_mse(predicted, noise - picture, rows["weights"])
        going = schedule.advance(loss, parameters, optimizer)
        # A short memory at first: otherwise the average drags the initial weights along.
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.999, (schedule.step + 1) / (schedule.step + 10)))
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return schedule.figures() | {"scenes": len(pool["latents"]), "batch": batch, "bf16": bf16}


def distil(
    pipeline,
    pool,
    generator,
    *,
    minutes,
    batch,
    substeps=5,
    guidance=1.5,
    peak=2e-4,
    bf16=False,
    compiled=False,
    max_steps=None,
):
    """Teaches the transformer to cross each of the STEPS intervals in one Euler step.

    The student walks from noise by itself; from each state it reaches, the teacher (a frozen copy of it before this
    training, with classifier-free guidance) walks the next interval in `substeps` small steps, and the student learns
    the mean velocity of that walk. Learning on its own states keeps its errors from adding up over the steps.
    """
    device = generator.device
    to_device(pipeline, device)
    student = pipeline.transformer
    teacher = type(student).from_config(student.config).to(device).eval().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    if compiled:
        teacher.compile_repeated_blocks(fullgraph=True)
    parameters = list(student.parameters())
    optimizer, schedule = (
        adamw(parameters, device),
        Schedule("distil", minutes, peak, warmup=20, max_steps=max_steps, every=50),
    )
    empty = {name: ids.expand(batch, -1) for name, ids in token_ids(pipeline, [""], device).items()}
    width = 1 / STEPS
    odds = torch.tensor([4.0, 2.5, 2.0, 1.5], device=device)  # the first step decides the layout
    going = True
    while going:
        rows = take(pool, torch.randint(len(pool["latents"]), (batch,), generator=generator, device=device))
        start = torch.multinomial(odds, batch, replacement=True, generator=generator)
        sigma = 1 - start * width
        x = torch.randn(batch, TOKENS, TOKEN_WIDTH, generator=generator, device=device)
        with torch.no_grad():
            text, no_text = encode_text(pipeline, rows), encode_text(pipeline, empty)
        with torch.no_grad(), bf16_autocast(device, bf16):
            for step in range(STEPS - 1):
                v = velocity(student, x, torch.full_like(sigma, 1 - step * width), text)
                x = torch.where((start > step)[:, None, None], x - width * v.float(), x)
            y = x
            for substep in range(substeps):
                at = sigma - substep * width / substeps
                without = velocity(teacher, y, at, no_text).float()
                v = torch.lerp(without, velocity(teacher, y, at, text).float(), guidance)
                y = y - width / substeps * v
        with bf16_autocast(device, bf16):
            predicted = velocity(student, x, sigma, text)
        loss = weighted_mse(predicted, (x - y) / width, rows["weights"])
        going = schedule.advance(loss, parameters, optimizer)
    return schedule.figures() | {"substeps": substeps, "guidance": guidance, "batch": batch, "bf16": bf16}
