"""What the weights that come with trackkit score, beside the references that learn nothing.

On data_samples/val; on 39 further procedural sequences, three of each of its attributes in the same
held-out textures, which no choice was made by; and, with --real, on a folder of real sequences in
GOT-10k's layout.

    python benchmarks/shipped_weights.py [--real /data/real]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

from trackkit.evaluation import compare, evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES
from trackkit.synth import EMBEDDED, SynthSequence, sample, write_dataset
from trackkit.weights import load


def further() -> list[SynthSequence]:
    """Three sequences for each key of data_samples/val, with seeds that it does not use."""
    return [sample("val", key, seed) for key in EMBEDDED["val"] for seed in (1001, 1002, 1003)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path)
    options = parser.parse_args()
    weights = sorted((SAMPLES / "weights").glob("*.safetensors"))
    contestants = {path.stem: load(path) for path in weights} | {
        name: load(name) for name in ("ncc", "stay")
    }
    if "stark-tiny" in contestants:
        fixed = contestants["stark-tiny, never updated"] = load(
            SAMPLES / "weights" / "stark-tiny.safetensors"
        )
        fixed.config = dataclasses.replace(fixed.config, update_interval=10**9)
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "further", "val", further())
        roots = [
            (SAMPLES, "val"),
            (Path(folder) / "further", "val"),
            *([(options.real, None)] if options.real else []),
        ]
        for root, split in roots:
            dataset = GOT10k(root, split) if split else GOT10k(root)
            results = Path(folder) / "results" / root.name
            scores = {
                name: evaluate(tracker, dataset, results / name, name)
                for name, tracker in contestants.items()
            }
            print(f"{root.name}, {len(dataset)} sequences\n{compare(scores)}\n")


if __name__ == "__main__":
    main()
