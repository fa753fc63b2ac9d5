"""How far the tiny SiamFC of `make demo` is ahead of template matching, which learns nothing.

Trains as `make demo` does (or uses --run, a folder that it left), then prints the difference in AO
on the held-out procedural sequences in data_samples/val and, with --real, on a folder of real
sequences in GOT-10k's layout.

    python benchmarks/demo_margin.py
    python benchmarks/demo_margin.py --run runs/demo --real /data/real
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trackkit import weights
from trackkit.evaluation import compare, evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, help="folder with tracker.safetensors; without it one is trained"
    )
    parser.add_argument("--real", type=Path, help="folder of real sequences to report, too")
    parser.add_argument("--seed", default="0")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = arguments.run or Path(folder) / "demo"
        if not arguments.run:
            began = time.perf_counter()
            command = [
                "train",
                "siamfc-tiny",
                "--scale",
                "laptop",
                "--workers",
                "1",
                "--seed",
                arguments.seed,
                "--out",
                str(run),
            ]
            subprocess.run([sys.executable, "-m", "trackkit", *command], check=True)
            print(
                f"training took {time.perf_counter() - began:.0f} s (to reach: 180 on two idle "
                "cores)"
            )
        contestants = {
            name: weights.load(source)
            for name, source in (
                ("siamfc-tiny", run / "tracker.safetensors"),
                ("ncc", "ncc"),
                ("stay", "stay"),
            )
        }
        for dataset in (
            GOT10k(SAMPLES, "val"),
            *([GOT10k(arguments.real)] if arguments.real else []),
        ):
            scores = {
                name: evaluate(tracker, dataset, Path(folder) / dataset.name / name, name)
                for name, tracker in contestants.items()
            }
            print(compare(scores))
            margin = scores["siamfc-tiny"].ao - scores["ncc"].ao
            goal = " (to reach: +0.10)" if dataset.folder.is_relative_to(SAMPLES) else ""
            print(f"{dataset.name}: siamfc-tiny - ncc = {margin:+.3f} AO{goal}\n")


if __name__ == "__main__":
    main()
