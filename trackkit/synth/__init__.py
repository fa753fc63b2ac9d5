"""Procedural video with dials: the embedded default data set, and an endless stream of training
samples.

A scene has a textured background, a target, clutter, things that look like the target and things
that pass in front of it; a dial for each attribute sets how much of it there is, and every label is
computed rather than annotated. The same seed gives the same bytes on every machine (see
`trackkit.synth.textures`).

    config = SynthConfig()                        # a bit of everything
    config = SynthConfig.only("occlusion")        # one attribute, all else still
    dataset = SynthDataset(config, seed=0, length=1000)
    dataset[7].frame(3), dataset[7].boxes_xywh    # sequence 7 depends on (config, seed, 7) alone
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trackkit.crops import Windows
from trackkit.errors import DataError
from trackkit.got10k import write_sequence
from trackkit.paths import atomic_write, writable
from trackkit.rectangles import Rectangle
from trackkit.sequences import Sequence, Still
from trackkit.synth.scenes import Scene
from trackkit.synth.textures import Draw

BANKS = ("train", "val", "test")  # each has textures and outlines of its own


@dataclass(frozen=True)
class SynthConfig:
    """A world: the size of its videos and a dial 0..1 for each attribute; the defaults mix them
    all.

    Attributes:
        width, height: pixels. frames: frames of a video. split: "train", "val" or "test", three
            worlds with different textures and outlines.
        vary: draw the strength of each attribute anew for each video, between 0 and its dial (0 in
            half of the videos); otherwise all videos have exactly the dials.
        motion: smooth motion. fast: jerky motion of the target, a shaking camera. camera: pan, zoom
            and roll.
        scale, rotation, aspect: of the target, in the plane. deformation: its outline and texture
            bend.
        articulation: it has parts that swing (limbs, wings, a chain). appearance: it takes on
            another texture and turns out of the plane. occlusion: things pass in front.
            out_of_view: it leaves the frame for a while. distractors: others of its kind nearby.
            clutter: things in the background.
        illumination: brightness, colour cast, a moving shadow. low_contrast, colourless: grey, soft
            pictures.
        blur: of motion and focus. noise: of the sensor.
        size: targets may be much smaller or larger than a quarter of the frame's height. team: more
            of the target's kind, dressed alike, stand around it. camouflage: with `vary`, every
            second target may be as like its background as it happens. (These three came later; the
            pool for training has them, see `synth.pool`.)

    Raises DataError for a dial outside 0..1, an unknown split, or a size that makes no video.
    """

    width: int = 320
    height: int = 240
    frames: int = 24
    split: str = "train"
    vary: bool = True
    motion: float = 1.0
    fast: float = 0.6
    camera: float = 0.8
    scale: float = 0.7
    rotation: float = 0.6
    aspect: float = 0.8
    deformation: float = 0.8
    articulation: float = 1.0
    appearance: float = 0.6
    occlusion: float = 0.7
    out_of_view: float = 0.4
    distractors: float = 0.9
    clutter: float = 0.8
    illumination: float = 0.7
    low_contrast: float = 0.9
    colourless: float = 1.0
    blur: float = 0.7
    noise: float = 0.7
    size: float = 0.0
    team: float = 0.0
    camouflage: bool = False

    def __post_init__(self):
        for name, low in (("width", 32), ("height", 32), ("frames", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise DataError(
                    f"SynthConfig: {name} must be an integer of at least {low}, got {value!r}"
                )
        if self.split not in BANKS:
            raise DataError(
                f"SynthConfig: split must be one of {', '.join(BANKS)}, got {self.split!r}"
            )
        for name in ATTRIBUTES:
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise DataError(
                    f"SynthConfig: the dial {name} must be a number in 0..1, got {value!r}"
                )

    @classmethod
    def still(cls, **changes) -> SynthConfig:
        """A world in which nothing happens: all dials at 0, apart from `changes`."""
        return cls(**({"vary": False} | dict.fromkeys(ATTRIBUTES, 0.0) | changes))

    @classmethod
    def only(cls, *attributes: str, strength: float = 1.0, **changes) -> SynthConfig:
        """A world with just the named attributes, at `strength`; `changes` are further fields.

        Raises DataError for a name that is no attribute.
        """
        for name in attributes:
            if name not in ATTRIBUTES:
                raise DataError(f"no attribute {name!r}; there are {', '.join(ATTRIBUTES)}")
        return cls.still(**(dict.fromkeys(attributes, strength) | changes))

    @property
    def bank(self) -> int:
        """Number of the split's bank of textures and outlines."""
        return BANKS.index(self.split)

    def draw_strengths(self, draw: Draw, later: Draw) -> dict[str, float]:
        """The strength of each attribute in one video; those of the last two come from `later`."""
        u = np.concatenate([draw.unit(len(ATTRIBUTES) - LATER), later.unit(LATER)])
        share = np.maximum(u * 2 - 1, 0.0) if self.vary else np.ones(len(ATTRIBUTES))
        return {
            name: float(getattr(self, name) * x) for name, x in zip(ATTRIBUTES, share, strict=True)
        }


ATTRIBUTES = tuple(f.name for f in fields(SynthConfig) if f.type == "float")
LATER = 2  # attributes that came when videos were in use already: size and team


class SynthSequence(Sequence):
    """One procedural video. Frames and windows are drawn when asked for; the labels are exact.

    `scene` gives what a data set cannot: the outline behind occluders, masks, the strength of each
    dial.
    """

    def __init__(self, config: SynthConfig, *seed: int, name: str = ""):
        self.scene = Scene(config, seed)
        scene = self.scene
        self._key = config, seed
        super().__init__(
            name or "synth_" + "_".join(map(str, seed)),
            config.frames,
            torch.from_numpy(scene.boxes_xywh),
            absent=torch.from_numpy(scene.absent),
            cover=torch.from_numpy(scene.cover),
            cut_by_image=torch.from_numpy(scene.cut),
            attributes=scene.attributes,
            meta={
                "object_class": scene.object_class,
                "anno_fps": "10Hz",
                "attributes": ", ".join(scene.attributes),
            },
        )

    @property
    def visible(self) -> Tensor:
        """(N,) bool: frames that show some of the target."""
        return ~self.absent

    def frame(self, index: int, reduce: int = 1) -> Tensor:
        index = self._check_index(index)
        return torch.from_numpy(
            self.scene.render(index) if reduce == 1 else self.scene.reduced(index, reduce)
        )

    def frame_size(self, index: int) -> tuple[int, int]:
        return self.scene.size

    def _source(self) -> Iterator[bytes]:
        yield repr(self._key).encode()

    def rectangle(self, still: Still, window: Windows, fill: Tensor | None = None) -> Rectangle:
        """The pixels of a window, drawn directly at the resolution of the crop."""
        colour = None if fill is None else tuple(fill.round().to(torch.uint8).flatten().tolist())
        left, top, side, size = *window.rows[0].tolist(), window.size
        pixels = torch.from_numpy(self.scene.render(still.index, left, top, side, size, colour))
        return Rectangle(pixels, 0, 0, size, size, torch.zeros(3))


class SynthDataset:
    """`length` procedural videos; number i depends on (config, seed, i) alone and is made when
    asked for.

    With a large length this is an endless stream: making a video costs about a millisecond once the
    textures of its split have been drawn (two seconds a process, spread over the first videos).
    """

    procedural = True

    def __init__(self, config: SynthConfig | None = None, seed: int = 0, length: int = 10_000):
        if length < 1:
            raise DataError(f"SynthDataset: length must be at least 1, got {length}")
        if seed < 0:
            raise DataError(f"SynthDataset: the seed must not be negative, got {seed}")
        self.config, self.seed, self.length = config or SynthConfig(), seed, length
        self.name = f"synth-{self.config.split}"

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"SynthDataset({self.config!r}, seed={self.seed}, length={self.length})"

    @property
    def identity(self) -> str:
        """See `GOT10k.identity`."""
        return repr(self)

    def __getitem__(self, index: int) -> SynthSequence:
        if not -self.length <= index < self.length:
            raise IndexError(f"sequence {index} of {self.length}")
        index %= self.length
        return SynthSequence(self.config, self.seed, index, name=self.name_of(index))

    def name_of(self, index: int) -> str:
        """The name of sequence `index`."""
        return f"{self.name}_{self.seed}_{index:06d}"


# The embedded set: for each sequence of a split, the attributes it shows and its seed.
EMBEDDED: dict[str, dict[str, tuple[tuple[str, ...], int]]] = {
    "train": {f"{number:03d}": ((), number) for number in range(1, 5)},
    "val": {
        "occlusion": (("occlusion",), 20),
        "distractors": (("distractors",), 27),
        "scale": (("scale",), 26),
        "fast": (("fast",), 21),
        "illumination": (("illumination",), 5),
        "deformation": (("deformation",), 6),
        "articulation": (("articulation",), 7),
        "low_contrast": (("low_contrast", "colourless"), 8),
        "rotation": (("rotation", "aspect"), 9),
        "blur": (("blur", "noise"), 10),
        "clutter": (("clutter", "camera"), 11),
        "appearance": (("appearance",), 24),
        "out_of_view": (("out_of_view",), 25),
    },
    "test": {
        "crowd": (("articulation", "distractors", "occlusion"), 1),
        "dusk": (("illumination", "colourless", "noise"), 2),
        "turn": (("appearance", "scale", "rotation"), 3),
        "chase": (("fast", "blur", "camera"), 4),
        "hidden": (("low_contrast", "deformation", "clutter"), 5),
    },
}
BASELINE = {
    "motion": 0.49, "camera": 0.3, "scale": 0.35, "aspect": 0.3,
    "rotation": 0.12, "clutter": 0.3, "illumination": 0.15,
}  # fmt: skip
SAMPLE_FRAMES, SAMPLE_QUALITY = 40, 62


def sample(split: str, key: str, seed: int | None = None) -> SynthSequence:
    """Sequence `key` of a split of the embedded set (`EMBEDDED`), before it is written; another
    seed, another of its kind.
    """
    attributes, own = EMBEDDED[split][key]
    if attributes:
        dials = BASELINE | dict.fromkeys(attributes, 0.9)
        config = SynthConfig.still(split=split, frames=SAMPLE_FRAMES, **dials)
    else:
        config = SynthConfig(split=split, frames=SAMPLE_FRAMES)
    if seed is None:
        return SynthSequence(config, 2024, own, name=f"synth_{split}_{key}")
    return SynthSequence(config, 2024, seed, name=f"synth_{split}_{key}_{seed}")


def write_dataset(
    root: str | os.PathLike, split: str, sequences: Iterable[SynthSequence], quality: int = 90
) -> Path:
    """Write procedural videos as a split of a data set in GOT-10k's layout; return the split's
    folder.

    The folder root/split gets list.txt and a folder for each sequence. As in GOT-10k, the split
    "test" has the first box only, without the other labels. quality: of the JPEG files.

    Raises DataError when a sequence's folder exists already or the place cannot be written.
    """
    if split not in BANKS:
        raise DataError(f"split must be one of {', '.join(BANKS)}, got {split!r}")
    folder, names = writable(Path(root) / split), []
    for sequence in sequences:
        frames = (sequence.frame(index) for index in range(len(sequence)))
        labels = labels_of(sequence)
        if split == "test":
            labels = {"boxes_xywh": sequence.boxes_xywh[:1]}
        write_sequence(
            folder / sequence.name, frames, meta=sequence.meta, quality=quality, **labels
        )
        names.append(sequence.name)
    with atomic_write(folder / "list.txt") as partial:
        partial.write_text("\n".join(names) + "\n", "utf-8", newline="\n")
    return folder


def labels_of(sequence: Sequence) -> dict[str, Tensor]:
    """The labels that GOT-10k has of each frame, as `write_sequence` takes them."""
    return {key: getattr(sequence, key) for key in ("boxes_xywh", "absent", "cover", "cut")}


def make_samples(root: str | os.PathLike) -> Path:
    """Write the embedded set, the same bytes every time, and SHA256SUMS, which `sha256sum -c`
    checks.
    """
    root = Path(root)
    for split, sequences in EMBEDDED.items():
        write_dataset(root, split, (sample(split, key) for key in sequences), SAMPLE_QUALITY)
    files = sorted(
        path for split in EMBEDDED for path in (root / split).rglob("*") if path.is_file()
    )
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(root).as_posix()}"
        for path in files
    ]
    (root / "SHA256SUMS").write_text("\n".join(lines) + "\n", "utf-8", newline="\n")
    return root
