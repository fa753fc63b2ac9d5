"""What the trackers that come with trackkit score and cost, beside those that learn nothing.

Scored on data_samples/val (13 procedural sequences), on 104 further ones of the same kinds, by
which no choice was made, and, with --real, on real sequences in GOT-10k's layout. AO is the mean
over sequences; behind it, in points, the difference to template matching (ncc), taken sequence by
sequence, with its standard error. Steps of training are those that the file of weights names.

    python benchmarks/scoreboard.py [--real DIR] [--out results]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

from trackkit import checkpoints, costs
from trackkit.evaluation import Scores, compare_attributes, evaluate
from trackkit.got10k import GOT10k
from trackkit.paths import SAMPLES, home
from trackkit.synth.pool import held_out
from trackkit.weights import TRACKERS, load, shipped


def difference(score: Scores, base: Scores) -> str:
    """Mean over sequences of AO minus the base's, and its standard error, in points."""
    each = [100 * (rates.ao - base.sequences[name].ao) for name, rates in score.sequences.items()]
    return f"{statistics.fmean(each):+.1f} ± {statistics.stdev(each) / len(each) ** 0.5:.1f}"


def cost(name: str) -> list[str]:
    """Parameters and multiply-accumulates of a frame in millions, samples seen in training."""
    path = shipped(name)
    if path is None:
        return ["0", "-", "-"]
    stages = checkpoints.read(path)[1].get("trained", {}).get("stages", [])
    samples = sum(stage["steps"] * stage["batch"] for stage in stages)
    found = {key: value / 1e6 for key, value in costs.count(load(name)).items()}
    return [
        f"{found['parameters']:.2f}",
        f"{found['macs']:.0f}",
        f"{samples:,}" if samples else "not kept",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path, help="a folder of sequences, or with val/")
    parser.add_argument("--out", type=Path, default=home() / "scoreboard", help="of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"val": GOT10k(SAMPLES, "val"), "further": held_out()}
    if options.real:
        sets["real"] = GOT10k(options.real, "val")
    names = [*(name for name in TRACKERS if shipped(name)), "ncc", "stay"]
    scores = {
        (title, name): evaluate(load(name), dataset, options.out / title / name, name)
        for name in names
        for title, dataset in sets.items()
    }
    titles = [f"{title} ({len(dataset)})" for title, dataset in sets.items()]
    heads = ["tracker", *titles, "frames/s", "M parameters", "M MACs", "samples"]
    rows = [heads, ["---"] * len(heads)]
    for name in sorted(names, key=lambda name: -scores["further", name].sequence_mean.ao):
        cells = [
            f"{scores[title, name].sequence_mean.ao:.3f}"
            + (
                ""
                if name == "ncc"
                else f" ({difference(scores[title, name], scores[title, 'ncc'])})"
            )
            for title in sets
        ]
        rows.append([name, *cells, f"{scores['val', name].fps:.0f}", *cost(name)])
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))
    print(f"\n{compare_attributes({name: scores['val', name] for name in names})}")


if __name__ == "__main__":
    main()
