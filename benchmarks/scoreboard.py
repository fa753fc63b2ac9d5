"""What the trackers that come with trackkit score, beside the references that learn nothing.

On data_samples/val (13 procedural sequences), on 104 further ones of the same kinds, by which no
choice was made, and, with --real, on real sequences in GOT-10k's layout. AO is the mean over
sequences; the difference to template matching (ncc) is taken sequence by sequence, with its
standard error.

    python benchmarks/scoreboard.py [--real DIR]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from trackkit.evaluation import Scores, compare_attributes, evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES
from trackkit.synth.pool import held_out
from trackkit.weights import TRACKERS, load, shipped


def difference(score: Scores, base: Scores) -> str:
    """Mean over sequences of AO minus the base's, and its standard error, in points."""
    each = [100 * (rates.ao - base.sequences[name].ao) for name, rates in score.sequences.items()]
    return f"{statistics.fmean(each):+5.1f} ± {statistics.stdev(each) / len(each) ** 0.5:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, help="a folder of sequences, or with val/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"val": GOT10k(SAMPLES, "val"), "further": held_out()}
    if options.real:
        sets["real"] = GOT10k(options.real, "val")
    names = [*(name for name in TRACKERS if shipped(name)), "ncc", "stay"]
    with tempfile.TemporaryDirectory() as folder:
        for title, dataset in sets.items():
            scores = {
                name: evaluate(load(name), dataset, Path(folder) / title / name, name)
                for name in names
            }
            print(f"\n{title}, {len(dataset)} sequences")
            print(f"{'':22}    AO  - ncc, points  frames per second")
            for name, score in sorted(scores.items(), key=lambda kv: -kv[1].sequence_mean.ao):
                against = difference(score, scores["ncc"])
                print(f"{name:22} {score.sequence_mean.ao:.3f}  {against:13}  {score.fps:8.0f}")
            if title == "val":
                print(compare_attributes(scores))


if __name__ == "__main__":
    main()
