"""Captioned scenes drawn in torch: what the shipped checkpoint is trained on.

A scene is one to three shapes on a textured background. The caption fixes colour, shape, size, position and finish of
each shape and the background's colour and texture; the seed decides the rest (small offsets, rotation, texture phase,
direction of the light), so two seeds give two pictures of one caption. Everything is batched and stays on one device:
a GPU draws many thousand scenes a second, so training never sees the same picture twice unless it asks to.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

IMAGE_PX = 256
SLOTS = 3

SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "diamond", "cross")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (50, 170, 70),
    "cyan": (40, 190, 205),
    "blue": (45, 85, 220),
    "purple": (130, 60, 190),
    "pink": (240, 100, 175),
}
SIZES_PX = {"small": 21.0, "medium": 27.0, "large": 34.0}  # half of the shape's extent
FINISHES = ("flat", "matte", "glossy")
POSITIONS = tuple(
    name.strip() or "centre" for row in ("top", "", "bottom") for name in (f"{row} left", row, f"{row} right")
)
# 76 px between cell centres leave two large shapes apart even when both are moved towards each other.
CELLS_PX = (52.0, 128.0, 204.0)
JITTER_PX = 4.0
# Little saturation here, much in COLOURS: this is what lets the checker tell a shape from the ground.
BACKGROUNDS = {
    "white": (238, 238, 236),
    "grey": (150, 150, 152),
    "black": (40, 40, 44),
    "beige": (222, 208, 184),
    "slate": (92, 104, 120),
    "mint": (190, 212, 198),
}
TEXTURES = (
    "plain",
    "horizontally striped",
    "vertically striped",
    "diagonally striped",
    "checkered",
    "dotted",
    "fading",
)
HELD_OUT_SHARE = 10  # one in ten (shape, colour, position) triples is never drawn in training


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """A batch of B scenes. Integer tensors index the tables above; (B, SLOTS) per shape, (B,) per picture."""

    count: torch.Tensor  # (B,) this many shapes are drawn, the other slots are ignored
    shape: torch.Tensor
    colour: torch.Tensor
    size: torch.Tensor
    finish: torch.Tensor
    position: torch.Tensor
    ground: torch.Tensor  # (B,)
    texture: torch.Tensor  # (B,)
    offset_px: torch.Tensor  # (B, SLOTS, 2)  x, y          - from here on the caption says nothing
    turn: torch.Tensor  # (B, SLOTS) radians
    phase: torch.Tensor  # (B, 2) in periods
    light: torch.Tensor  # (B,) radians, where the light comes from

    def __len__(self):
        return len(self.count)

    def __getitem__(self, index):
        return Scenes(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def held_out(shape, colour, position):
    """True for the (shape, colour, position) triples kept out of training, by a fixed integer hash."""
    key = (shape * len(COLOURS) + colour) * len(POSITIONS) + position
    return (key * 2654435761 % 2**32 // 65536) % HELD_OUT_SHARE == 0


def sample(batch, generator, *, held_out_only=False, crowded=False):
    """Draws `batch` random scenes on the generator's device.

    Training scenes hold no held-out triple; with `held_out_only` every scene holds at least one. `crowded` fills all
    nine cells instead of one to three: no captions, but more to learn from a picture for the autoencoder.
    """
    device = generator.device
    slots = len(POSITIONS) if crowded else SLOTS

    def integers(high, *size):
        return torch.randint(high, size, generator=generator, device=device)

    def uniform(*size):
        return torch.rand(size, generator=generator, device=device)

    kept, wanted = [], batch
    while wanted > 0:
        # Enough for three shapes (0.9 ** 3) or nine (0.9 ** 9) to pass the split in one round nearly always.
        n = max(64, int(wanted * (3.2 if crowded else 1.6)))
        scenes = Scenes(
            count=torch.full((n,), slots, device=device) if crowded else 1 + integers(SLOTS, n),
            shape=integers(len(SHAPES), n, slots),
            colour=integers(len(COLOURS), n, slots),
            size=integers(len(SIZES_PX), n, slots),
            finish=integers(len(FINISHES), n, slots),
            position=uniform(n, len(POSITIONS)).argsort(1)[:, :slots],  # no two shapes in one cell
            ground=integers(len(BACKGROUNDS), n),
            texture=integers(len(TEXTURES), n),
            offset_px=(uniform(n, slots, 2) * 2 - 1) * JITTER_PX,
            turn=(uniform(n, slots) * 2 - 1) * math.radians(12),
            phase=uniform(n, 2),
            light=uniform(n) * math.tau,
        )
        present = torch.arange(slots, device=device) < scenes.count[:, None]
        hits = (held_out(scenes.shape, scenes.colour, scenes.position) & present).any(1)
        scenes = scenes[(hits == held_out_only).nonzero()[:wanted, 0]]
        kept.append(scenes)
        wanted -= len(scenes)
    return Scenes(**{f.name: torch.cat([getattr(s, f.name) for s in kept]) for f in fields(Scenes)})


def captions(scenes):
    """One English sentence for each scene, in reading order of the slots."""
    colours, sizes, grounds = tuple(COLOURS), tuple(SIZES_PX), tuple(BACKGROUNDS)
    columns = [
        getattr(scenes, name).tolist()
        for name in ("count", "shape", "colour", "size", "finish", "position", "ground", "texture")
    ]
    texts = []
    for count, shape, colour, size, finish, position, ground, texture in zip(*columns, strict=True):
        things = [
            f"a {sizes[size[i]]} {FINISHES[finish[i]]} {colours[colour[i]]} {SHAPES[shape[i]]}"
            f" at the {POSITIONS[position[i]]}"
            for i in range(count)
        ]
        listed = ", ".join(things[:-1]) + (" and " if count > 1 else "") + things[-1]
        texts.append(f"{listed} on a {TEXTURES[texture]} {grounds[ground]} background")
    return texts


def words():
    """Every word that a caption can hold, sorted: the tokenizers' vocabulary."""
    names = (*SHAPES, *COLOURS, *SIZES_PX, *FINISHES, *POSITIONS, *BACKGROUNDS, *TEXTURES, "a and at on the background")
    return sorted({word for name in names for word in name.split()})


def _distance(name, x, y):
    """Signed distance to the outline of a shape of half-extent about 1; negative inside. y points down."""
    if name == "circle":
        return torch.hypot(x, y) - 0.95
    if name == "ring":
        return (torch.hypot(x, y) - 0.72).abs() - 0.25
    if name == "square":
        return _box(x, y, 0.82, 0.82)
    if name == "diamond":
        return (x.abs() * 1.25 + y.abs() - 1.0) / math.hypot(1.25, 1.0)
    if name == "cross":
        return torch.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95))
    if name == "triangle":
        return _polygon(x, y, [(0, -0.95), (0.98, 0.78), (-0.98, 0.78)])
    if name == "star":
        tips = [
            (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
            for k in range(10)
            for r in [1.05 if k % 2 == 0 else 0.45]
        ]
        return _polygon(x, y, tips)
    if name == "heart":
        outline = [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1,
            )
            for t in (k * math.tau / 64 for k in range(64))
        ]
        return _polygon(x, y, outline)
    raise ValueError(f"no such shape {name!r}; expected one of {SHAPES}")


def _box(x, y, half_x, half_y):
    dx, dy = x.abs() - half_x, y.abs() - half_y
    return torch.hypot(dx.clamp(min=0), dy.clamp(min=0)) + torch.maximum(dx, dy).clamp(max=0)


def _polygon(x, y, points):
    nearest = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        ex, ey = bx - ax, by - ay
        along = (((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, torch.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / ey + ax)
    return torch.where(inside, -nearest, nearest)


ATLAS_REACH, ATLAS_PX = 4.0, 512
_atlases = {}


def _atlas(device):
    """(shapes, 1, ATLAS_PX, ATLAS_PX) distances. A look-up costs the same for a heart as for a circle."""
    if device not in _atlases:
        axis = ((torch.arange(ATLAS_PX, device=device) + 0.5) / ATLAS_PX * 2 - 1) * ATLAS_REACH
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        _atlases[device] = torch.stack([_distance(name, x, y) for name in SHAPES])[:, None]
    return _atlases[device]


def _table(values, device):
    return torch.tensor(list(values), device=device, dtype=torch.float32)


def _ground(scenes, x, y):
    """(B, 3, H, W) textured background in 0..1."""
    device = x.device
    base = _table(BACKGROUNDS.values(), device)[scenes.ground] / 255
    u = x[None] / 64 + scenes.phase[:, 0, None, None]
    v = y[None] / 64 + scenes.phase[:, 1, None, None]

    def wave(t, edge=7.0):  # a square wave whose flanks are about two pixels wide
        return torch.sin(t * math.tau).mul(edge).clamp(-1, 1)

    dots = (torch.hypot((u * 1.5) % 1 - 0.5, (v * 1.5) % 1 - 0.5) * -42.67 + 9.5).clamp(-1, 1)
    fading = (y[None] / 128 - 1).expand_as(u) * 1.6
    options = [u * 0, wave(v), wave(u), wave(u + v, 5.0), wave(u) * wave(v), dots, fading]
    tone = torch.stack(options)[scenes.texture, torch.arange(len(scenes), device=device)]
    return (base[:, :, None, None] + 0.055 * tone[:, None]).clamp(0, 1)


def render(scenes, image_px=IMAGE_PX):
    """Draws the batch: (B, 3, image_px, image_px) float32 in 0..1, anti-aliased, on the scenes' device."""
    device = scenes.count.device
    axis = (torch.arange(image_px, device=device) + 0.5) * (IMAGE_PX / image_px)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    canvas = _ground(scenes, x, y)
    cells = _table(CELLS_PX, device)
    light_x, light_y = torch.cos(scenes.light)[:, None, None], torch.sin(scenes.light)[:, None, None]
    for slot in range(scenes.shape.shape[1]):
        present = (scenes.count > slot).float()[:, None, None]
        position, radius = scenes.position[:, slot], _table(SIZES_PX.values(), device)[scenes.size[:, slot]]
        centre_x = cells[position % 3] + scenes.offset_px[:, slot, 0]
        centre_y = cells[position // 3] + scenes.offset_px[:, slot, 1]
        cos, sin = torch.cos(scenes.turn[:, slot])[:, None, None], torch.sin(scenes.turn[:, slot])[:, None, None]
        radius, dx, dy = radius[:, None, None], x - centre_x[:, None, None], y - centre_y[:, None, None]
        atlas = _atlas(device)[scenes.shape[:, slot]]

        def distance_px(dx, dy, atlas=atlas, cos=cos, sin=sin, radius=radius):
            grid = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1) / (radius[..., None] * ATLAS_REACH)
            return F.grid_sample(atlas, grid, padding_mode="border", align_corners=False)[:, 0] * radius

        inside = distance_px(dx, dy)
        cover = (0.5 - inside).clamp(0, 1) * present
        shadow = torch.sigmoid(-distance_px(dx + 5 * light_x, dy + 5 * light_y) / 2) * present * 0.4
        towards = ((dx * light_x + dy * light_y) / radius).clamp(-1.3, 1.3)
        finish = scenes.finish[:, slot, None, None]
        rim = (1 + inside / (0.35 * radius)).clamp(0, 1) ** 2  # 1 at the outline, 0 well inside
        matte = 1 + 0.28 * towards
        glossy = 1 + 0.16 * towards - 0.3 * rim
        shade = torch.where(finish == 0, torch.ones_like(matte), torch.where(finish == 1, matte, glossy))
        spot = torch.hypot(dx - 0.34 * radius * light_x, dy - 0.34 * radius * light_y) / radius
        spot = ((0.24 - spot) * 9).clamp(0, 1)[:, None] * (finish == 2)[:, None] * 0.8
        paint = (_table(COLOURS.values(), device)[scenes.colour[:, slot]] / 255)[:, :, None, None]
        paint = (paint * shade[:, None]).clamp(0, 1)
        paint = paint + (1 - paint) * spot
        canvas = canvas * (1 - shadow * (1 - cover))[:, None]
        canvas = canvas * (1 - cover)[:, None] + paint * cover[:, None]
    return canvas
