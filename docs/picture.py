"""Draw docs/tracking.png, the picture of the README: three held-out videos, the truth and two
trackers.

python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

import torch

from trackkit import weights
from trackkit.drawing import draw_boxes
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES
from trackkit.tracking import track

VIDEOS, MOMENTS = (
    ("synth_val_rotation", "synth_val_deformation", "synth_val_scale"),
    (0, 10, 20, 30, 39),
)


def main() -> None:
    from PIL import Image

    data = GOT10k(SAMPLES, "val")
    siamfc, ncc = (
        weights.load(SAMPLES / "weights" / "siamfc-tiny.safetensors"),
        weights.create("ncc"),
    )
    rows = []
    for name in VIDEOS:
        sequence = data[data.names.index(name)]
        runs = {
            "truth": sequence.boxes_xywh,
            "siamfc-tiny": track(siamfc, sequence).boxes_xywh,
            "ncc": track(ncc, sequence).boxes_xywh,
        }
        pictures = [
            draw_boxes(
                sequence.frame(t),
                {who: boxes[t] for who, boxes in runs.items()},
                legend=name == VIDEOS[0] and t == 0,
            )
            for t in MOMENTS
        ]
        rows.append(torch.cat(pictures, 2))
    strip = torch.cat(rows, 1).permute(1, 2, 0).numpy()
    image = Image.fromarray(strip)
    image.resize((image.width * 2 // 3, image.height * 2 // 3), Image.LANCZOS).quantize(192).save(
        Path(__file__).parent / "tracking.png", optimize=True
    )


if __name__ == "__main__":
    main()
