"""Does the dynamic template help when the target changes its looks? STARK-ST against STARK-S, same
training budget.

    python benchmarks/dynamic_template.py [--seeds 3] [--scale laptop] [--steps 600] [--batch 4]
    [--out FOLDER]

Trains what `trackkit ablate stark-table1` with the same options trains (or takes its runs), then
tracks held-out procedural sequences that show an appearance change: with ST, with the same ST when
its second template stays the first one, with S. Prints AO, mean and standard deviation over the
seeds, and the differences seed by seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

from trackkit import ablations, evaluation
from trackkit.paths import home
from trackkit.synth import SynthConfig, SynthDataset
from trackkit.tracking import track_many
from trackkit.weights import load


def overlap(tracker, dataset) -> float:
    tracks = dict(track_many(tracker, dataset))
    return evaluation.score(
        dataset, ((tracks[i].boxes_xywh, tracks[i].seconds) for i in range(len(dataset))), "x"
    ).ao


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", default="laptop")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=home() / "ablations")
    parser.add_argument("--sequences", type=int, default=24)
    options = parser.parse_args()
    result = ablations.run(
        ablations.TABLES["stark-table1"],
        options.seeds,
        options.scale,
        options.out,
        steps=options.steps,
        batch=options.batch,
        device="cpu",
    )
    config = SynthConfig.only("appearance", "motion", frames=60, split="val")
    dataset = SynthDataset(config, seed=100, length=options.sequences)
    found: dict[str, dict[int, float]] = {"ST": {}, "ST, never updated": {}, "S": {}}
    for run in result.runs:
        tracker = load(options.out / "runs" / run["folder"] / "tracker.safetensors")
        if run["row"] == "STARK-S":
            found["S"][run["seed"]] = overlap(tracker, dataset)
            continue
        found["ST"][run["seed"]] = overlap(tracker, dataset)
        tracker.config = dataclasses.replace(tracker.config, update_interval=10**9)
        found["ST, never updated"][run["seed"]] = overlap(tracker, dataset)
    print(
        f"{len(dataset)} held-out sequences of 60 frames with appearance change, AO; "
        f"{result.about['command']}"
    )
    for name, values in found.items():
        print(
            f"{name:<20}{_spread(values.values())}   "
            f"{', '.join(f'{v:.3f}' for v in values.values())}"
        )
    for name in ("ST, never updated", "S"):
        gains = [score - found[name][seed] for seed, score in found["ST"].items()]
        print(f"ST - {name:<15}{_spread(gains, '+')}")


def _spread(values, sign: str = "") -> str:
    values = list(values)
    return (
        f"{statistics.mean(values):{sign}.3f} ± "
        f"{statistics.stdev(values) if len(values) > 1 else float('nan'):.3f}"
    )


if __name__ == "__main__":
    main()
