"""Evidence for the tiny checkpoint: share of captions met, a grid of pictures, and the card written from them."""

import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scene_checker import check
from scenes import COLOURS, HELD_OUT_SHARE, POSITIONS, SHAPES, captions, sample
from tiny_flux_model import STEPS, TEXT_TOKENS, components, load_checkpoint

HELD_OUT_SEED = 2026
METRICS_FILE = "training.json"
GRID_FILE = "grid.png"
GRID_COLUMNS, GRID_ROWS = 4, 3
NO_PSNR = {"psnr_db": "unknown", "crowded_psnr_db": "unknown"}


def draw(pipeline, prompts, seeds):
    """PIL pictures of 256 px, one seed each from a CPU generator: the call that the tests make, in batches."""
    return pipeline(
        list(prompts),
        height=256,
        width=256,
        num_inference_steps=STEPS,
        guidance_scale=0.0,
        max_sequence_length=TEXT_TOKENS,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
    ).images


def evaluate(folder, *, count=200, batch=20, device="cpu"):
    """Draws `count` held-out captions with seeds 0, 1, ... from the files in `folder` and checks them.

    Returns (figures, prompts, pictures). `captions_met`: every colour where the caption has it and no shape elsewhere;
    `shapes_met`: the same counted by shape.
    """
    pipeline = load_checkpoint(folder).to(device)
    prompts = captions(sample(count, torch.Generator("cpu").manual_seed(HELD_OUT_SEED), held_out_only=True))
    pictures = []
    for first in range(0, count, batch):
        chunk = prompts[first : first + batch]
        pictures += draw(pipeline, chunk, range(first, first + len(chunk)))
    checks = [check(np.asarray(picture), prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    figures = {
        "captions": count,
        "captions_met": sum(c.ok for c in checks) / count,
        "shapes_met": sum(c.hits for c in checks) / sum(len(c.wanted) for c in checks),
    }
    return figures, prompts, pictures


def write_grid(path, prompts, pictures, label_px=52):
    """The first GRID_COLUMNS x GRID_ROWS pictures with their captions below them."""
    side = pictures[0].width
    grid = Image.new("RGB", (GRID_COLUMNS * side, GRID_ROWS * (side + label_px)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for index in range(min(len(pictures), GRID_COLUMNS * GRID_ROWS)):
        x, y = index % GRID_COLUMNS * side, index // GRID_COLUMNS * (side + label_px)
        grid.paste(pictures[index], (x, y))
        pen.text(
            (x + 3, y + side + 1), "\n".join(textwrap.wrap(prompts[index], 46)), fill="black", font=font, spacing=0
        )
    grid.save(path, optimize=True)


def write_evidence(folder, **options):
    """Evaluates the checkpoint in `folder` and leaves grid.png, training.json and README.md in it."""
    folder = Path(folder)
    figures, prompts, pictures = evaluate(folder, **options)
    write_grid(folder / GRID_FILE, prompts, pictures)
    metrics = read_metrics(folder) | {"evaluation": figures}
    pipeline = load_checkpoint(folder)
    metrics["parameters"] = {name: sum(p.numel() for p in m.parameters()) for name, m in components(pipeline).items()}
    write_metrics(folder, metrics)
    (folder / "README.md").write_text(card(metrics, prompts[0]))
    return figures


def read_metrics(folder):
    """The figures of the trainings so far; empty for a folder without any."""
    path = Path(folder) / METRICS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def write_metrics(folder, metrics):
    (Path(folder) / METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")


def card(metrics, prompt):
    """The README of the checkpoint. Every figure in it comes from training.json."""
    trainings = {name: metrics[name] for name in ("text", "vae", "flow", "distil") if name in metrics}
    seconds = sum(training["seconds"] for training in trainings.values())
    rows = "\n".join(
        f"| {name} | {training['steps']} | {training['seconds']:.0f} | {training['runs']} | {training['loss']:.4f} "
        f"| {training['hardware']} | {'bf16' if training.get('bf16') else 'float32 or TF32'} |"
        for name, training in trainings.items()
    )
    sizes = "\n".join(f"| {name} | {count:,} |" for name, count in metrics["parameters"].items())
    result = metrics["evaluation"]
    reached = "reaches" if result["captions_met"] >= 0.9 else "**falls short of**"
    psnr = "{psnr_db} dB PSNR ({crowded_psnr_db} dB with nine shapes)".format_map(trainings.get("vae", NO_PSNR))
    return f"""# tiny_flux

A complete FLUX pipeline in miniature, trained for this project by `tools/train_tiny_flux.py` on scenes that
`tools/scenes.py` draws. It exists so that a test of speed can look at a real picture: a broken kernel shows.

```python
pipeline = diffusers.FluxPipeline.from_pretrained("fluxfast/assets/tiny_flux")
pipeline("{prompt}",
         height=256, width=256, num_inference_steps={STEPS}, guidance_scale=0.0, max_sequence_length={TEXT_TOKENS},
         generator=torch.Generator("cpu").manual_seed(42)).images[0]
```

![Held-out captions, {STEPS} steps]({GRID_FILE})

The first {GRID_COLUMNS * GRID_ROWS} of the held-out captions with seeds 0, 1, ...; none was chosen by eye.

## Evidence
Of {result["captions"]} held-out captions, **{result["captions_met"]:.1%}** are met: the checker
(`tools/scene_checker.py`) finds each colour at its place and no shape anywhere else. Counted by shape it is
{result["shapes_met"]:.1%}. This {reached} the 90 % asked of it. The checker sees colours and positions only, neither
outlines, sizes nor backgrounds. Each held-out caption has at least one (shape, colour, position) triple that training
never drew: a hash keeps about one in {HELD_OUT_SHARE} of the {len(SHAPES) * len(COLOURS) * len(POSITIONS)} triples
out. Repeat with `python tools/train_tiny_flux.py --evaluate --out fluxfast/assets/tiny_flux`.

## Training
{seconds / 60:.1f} minutes in all, seed {metrics.get("seed", 0)}, weights and optimiser in float32.

| phase | steps | seconds | runs | final loss | hardware | products |
|---|---:|---:|---:|---:|---|---|
{rows}

Losses: text the sum of the cross entropies of its heads; vae L1 on colours and differences plus a small KL term; flow
mean squared error of the velocity; distil mean squared error against the mean velocity of the guided
teacher. The autoencoder alone reconstructs with {psnr}.
Phases are boxed in minutes, so another GPU repeats the recipe, not the bits; a phase with several runs was resumed.

| component | parameters |
|---|---:|
{sizes}

## Limits
It knows the {len(SHAPES)} shapes, {len(COLOURS)} colours and {len(POSITIONS)} positions of its captions and
nothing else; it is distilled for {STEPS} steps at 256 x 256 with {TEXT_TOKENS} text tokens, and other settings
give worse pictures. Needs transformers 5 or later.
"""
