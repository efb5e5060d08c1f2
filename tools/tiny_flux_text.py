"""Teaches the two text encoders which words belong together, before any picture is drawn.

Trained through the flow loss alone, 4 minutes on a GPU taught places and palette but not which colour goes where: the
share of held-out captions met was 13.5 %. Here linear heads, thrown away afterwards, ask each word for the attributes
of the thing it describes, and CLIP's pooled vector for what lies in each cell. It takes minutes on a CPU.
"""

import torch
import torch.nn.functional as F
from scenes import BACKGROUNDS, COLOURS, FINISHES, POSITIONS, SHAPES, SIZES_PX, SLOTS, TEXTURES, captions, sample
from tiny_flux_training import Schedule, adamw, encode_text, token_ids

THING_HEADS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES_PX),
    "finish": len(FINISHES),
    "position": len(POSITIONS),
}
GROUND_HEADS = {"ground": len(BACKGROUNDS), "texture": len(TEXTURES)}


def word_labels(tokenizer, ids, scenes):
    """For T5 ids (B, L): the slot (B, L) a word describes, which words describe a shape, which the background."""

    def any_of(names):
        return torch.isin(ids, torch.tensor(tokenizer.convert_tokens_to_ids(names), device=ids.device))

    slot = any_of(["▁" + name for name in SIZES_PX]).cumsum(1) - 1  # each phrase has one size word, near its start
    behind_on = any_of(["▁on"]).cumsum(1) > 0
    filler = any_of(["▁a", "▁and", ",", "▁on", "▁background", tokenizer.pad_token, tokenizer.eos_token])
    return slot.clamp(0, SLOTS - 1), (slot >= 0) & ~behind_on & ~filler, behind_on & ~filler


def cell_labels(scenes, values, none):
    """(B, positions): the value of the shape in each cell, `none` where there is no shape."""
    present = torch.arange(SLOTS, device=values.device) < scenes.count[:, None]
    labels = torch.full((len(scenes), len(POSITIONS) + 1), none, device=values.device)
    # Absent slots write into an extra column, which is cut off.
    return labels.scatter(1, torch.where(present, scenes.position, len(POSITIONS)), values)[:, :-1]


def train_text(pipeline, generator, *, minutes, batch=48, peak=1.5e-3, max_steps=None):
    """Trains both encoders and the heads; returns figures with the share of labels the heads get right at the end."""
    device = generator.device
    encoders = [pipeline.text_encoder.to(device).eval(), pipeline.text_encoder_2.to(device).eval()]
    width = pipeline.text_encoder_2.config.d_model
    word_heads = torch.nn.ModuleDict({n: torch.nn.Linear(width, k) for n, k in (THING_HEADS | GROUND_HEADS).items()})
    cell_heads = torch.nn.ModuleDict(
        {name: torch.nn.Linear(width, len(POSITIONS) * (THING_HEADS[name] + 1)) for name in ("colour", "shape")}
        | {name: torch.nn.Linear(width, classes) for name, classes in GROUND_HEADS.items()}
    )
    parameters = [p for module in (*encoders, word_heads, cell_heads) for p in module.to(device).parameters()]
    optimizer = adamw(parameters, device)
    schedule = Schedule("text", minutes, peak, warmup=50, max_steps=max_steps, every=50)
    rights, going = {}, True
    while going:
        scenes = sample(batch, generator)
        ids = token_ids(pipeline, captions(scenes), device)
        pooled, sequence = encode_text(pipeline, ids)
        slot, is_thing, is_ground = word_labels(pipeline.tokenizer_2, ids["t5"], scenes)
        losses = []

        def add(name, logits, labels, losses=losses):
            losses.append(F.cross_entropy(logits, labels))
            rights[name] = (logits.argmax(-1) == labels).float().mean()

        for name in THING_HEADS:
            add(f"word_{name}", word_heads[name](sequence[is_thing]), getattr(scenes, name).gather(1, slot)[is_thing])
        for name in GROUND_HEADS:
            labels = getattr(scenes, name)
            add(f"word_{name}", word_heads[name](sequence[is_ground]), labels[:, None].expand_as(slot)[is_ground])
            add(f"pooled_{name}", cell_heads[name](pooled), labels)
        for name in ("colour", "shape"):
            labels = cell_labels(scenes, getattr(scenes, name), THING_HEADS[name])
            logits = cell_heads[name](pooled).view(batch, len(POSITIONS), -1)
            add(f"pooled_{name}", logits.flatten(0, 1), labels.flatten())
        going = schedule.advance(torch.stack(losses).sum(), parameters, optimizer)
        if schedule.step % schedule.every == 0:
            print({name: round(right.item(), 3) for name, right in rights.items()}, flush=True)
    return schedule.figures() | {"right": {name: round(right.item(), 3) for name, right in rights.items()}}
