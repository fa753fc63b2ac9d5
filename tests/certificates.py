"""Writes docs/certificates.md: for each family of trackers what was compared with the authors'
code, and how far we are from it.

    python tests/certificates.py              # all of it: two minutes on one idle core
    python tests/certificates.py sbt stark    # these families anew; of the others the numbers stay
    as they are

The numbers are those of `deviations()` in tests/test_*_parity.py.
"""

from __future__ import annotations

import argparse
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "certificates.md"
# what was compared -> largest deviation, tolerance, golden file
Deviations = dict[str, tuple[float, float, str]]

HEAD = """# Certificates

What our trackers compute, against what their authors' code computes. This page is made by `python tests/certificates.py`; tests
hold it to the list of comparisons and every deviation to its tolerance.

The files in `tests/goldens` hold what the authors' code gave for weights and inputs that anyone can make again: each tensor
is drawn from a generator that is seeded with the tensor's name (`tests/golden.py`), so no checkpoint is needed. A test
makes those weights under the authors' names, loads them by `trackkit.official`, runs our code on the same inputs, and takes the
largest difference of any number that the file keeps. Tolerances are the file's; where it has none, the test's module says
where the tolerance comes from. A tolerance of 0 asks for equality. "px" are pixels of the frame or, for a network's boxes, of
the crop; "relative" is a share; all else is in the unit of what is compared. Deviations are of 32-bit floats on one CPU thread,
and differ in the last digits from machine to machine. Deliberate mistakes, a few for each network, run, target and loss, must
exceed the tolerances; these are the tests `..._can_fail`, and `tests/test_stark_mutants.py`.

Sizes of a family without a golden file of their own are the same code with other numbers; their parameters and
multiply-accumulates are held to the papers' (`trackkit profile --all`, `tests/test_costs.py`). The names that end in `-tiny`
are our own small forms of them; where those differ from the papers, their configs say so.
"""  # noqa: E501

COORDINATES = (
    "With `exact` (a field of the config, off in the papers' sizes, on in the tiny one) boxes go "
    "into and out of crops by the crops' own geometry. The authors ignore that windows are snapped "
    "to whole pixels, learn targets that are half a crop pixel off, and lose the frame's last row "
    "and column. Off is what their checkpoints expect; on is what a learner can check by hand."
)


@dataclass(frozen=True)
class Family:
    """What the page says of related trackers besides the numbers.

    Attributes:
        module: tests/<module>.py has the comparisons. names: in `trackkit.trackers.TRACKERS`.
        reference: whose numbers the golden files hold. departures: where we differ from that code,
            and why.
    """

    module: str
    names: tuple[str, ...]
    reference: str
    departures: tuple[str, ...]


FAMILIES = {
    "SiamFC": Family(
        "test_siamfc_parity",
        ("siamfc", "siamfc-tiny"),
        "The golden files are of the common PyTorch implementation, huanglianghua/siamfc-pytorch "
        "at 3957205: network, crops, tracking frame by "
        "frame, a training step.",
        (
            "Training crops are resampled once. There an image is cut out and resized, stretched "
            "and cut again, each time with an interpolation "
            "drawn from five; once blurs less, and leaves one geometry to understand.",
            "Boxes count from 0, as everywhere in trackkit; theirs from 1. Ours are shifted for "
            "the comparison.",
            "The tracker's state is in 64-bit floats. Theirs changes its precision with the "
            "version of numpy, which moves boxes by about 1e-5 px.",
        ),
    ),
    "STARK": Family(
        "test_stark_parity",
        ("stark-s50", "stark-st50", "stark-st101", "stark-tiny"),
        "The golden files are of researchmm/Stark at 162e1d3: three networks, seven of its "
        "switches, crops and masks, tracking frame by frame "
        "with template updates, losses, gradients.",
        (
            COORDINATES,
            "If any box of a batch is inside out, the authors' GIoU term is dropped for the whole "
            "batch, by an assertion that is caught. So it is here, "
            "but with `exact` such a box counts as one that does not overlap and the others stay.",
            "The authors published no code for the template as query, the Hungarian matching, the "
            "updated query and the joint training of Table 7 "
            "(`query`, `matching`, `joint`); those are our reading of the text. Several queries "
            "without matching are theirs.",
            "Their sampler draws again after any exception. Ours draws again only for what their "
            "rules reject; other errors are errors.",
            "`stark-tiny` has three aids for learning from nothing within minutes (`from_scratch`) "
            "that the paper does not have; off in all other sizes.",
        ),
    ),
    "SBT": Family(
        "test_sbt_parity",
        ("sbt-light", "sbt-small", "sbt-base", "sbt-large", "sbt-tiny", "siamfc-ca", "stark-ca"),
        "The golden files are of phiphiphi31/SBT at 2be5ef1, of the light and the base form: "
        "network with every block, tracking, losses, decoding, the "
        'rule of positive tokens. "float64" compares the network in 64-bit floats.',
        (
            "The template goes through the blocks before the first cross-attention once, not in "
            "every frame, and what nobody reads of it "
            "behind the last one is not computed. The result is the same, the step faster.",
            "Blocks behind the last cross-attention run. Theirs are skipped in silence; with the "
            "placements of Table 2 there are none.",
            "A target that reaches outside the crop keeps the positive tokens that it has inside. "
            "In their code a negative start wraps "
            'around and mostly leaves none; `positives="wrapped"` does as they do, and is what the '
            "certificate uses for the nine boxes of its file.",
            "Losses are weighted 12, 7 and 5 as in the paper; ten times as much in the code, which "
            "AdamW with clipped gradients hardly sees.",
            'The released head is not Eq. 7 of the paper; `head="eq7"` is, and is the one that the '
            "25.1 M parameters of their README belong to.",
            "Search windows are 5 target sizes large and the cosine window has a share of 0.49, as "
            "in the code. The paper has 4 and no window (`search_factor`, "
            "`window_influence`).",
            "`siamfc-ca` and `stark-ca` have no golden file: the paper replaces a tracker's "
            'backbone by a "modified SBT-small" and does not say how it is '
            "modified. Here the tracker keeps everything but its backbone, whose stride is that of "
            "the one replaced.",
            COORDINATES,
        ),
    ),
    "OSTrack and ProContEXT": Family(
        "test_procontext_parity",
        (
            "ostrack-256",
            "ostrack-384",
            "ostrack-tiny",
            "procontext-256",
            "procontext-384",
            "procontext-tiny",
        ),
        "The golden files are of botaoye/OSTrack at 33b5e12 and jp-lan/ProContEXT at 401165b: "
        "networks with every pruning, other keep ratios and "
        "pruning rows, tracking with a replaced template, targets, losses, tables. The size of 384 "
        "loads OSTrack's and ProContEXT's checkpoints alike.",
        (
            "A new sequence starts with its own templates. Their tracker appends to a list and "
            "uses its first four, so a second sequence on the same object "
            "is tracked with the first one's templates.",
            'Pruning by the target\'s box (`pruning_rows="box"`) asks the cells whose middle lies '
            "in each template's own box, so that samples of a batch may "
            "have different numbers of them. Theirs has the first scale's box for all templates, "
            "and fails for unequal numbers.",
            "Where code and paper differ we follow the code, as its checkpoints need it; "
            "`ProContEXTConfig.paper()` follows the paper: softmax over search tokens "
            "for pruning, an update in every confident frame, search windows of 4 target sizes, "
            "other rates.",
            "Templates in training are ordered as in tracking, all of the first frame before all "
            "of the last; theirs by scale. Attention does not see the order.",
            COORDINATES,
        ),
    ),
    "STMTrack and DASTM": Family(
        "test_dastm_parity",
        ("stmtrack", "stmtrack-tiny", "sastm", "dastm", "dastm-tiny"),
        "`stmtrack.json` is of fzh0917/STMTrack at 61730c1: network, tracking, targets, losses. "
        "**DASTM's authors published no code.** "
        "`dastm_blocks.json` has the attention modules by their own authors' reference definitions "
        "(SE, coordinate attention, CBAM), and the gate as our "
        "specification reads the paper: it fixes that definition, not the authors' program.",
        (
            "The memory holds 64 frames; theirs keeps every frame and looks at six at most. Until "
            "frame 80 both look at the same frames, later at "
            'neighbours; `memory="unbounded"` is their rule.',
            "The foreground map of a box that is larger than the crop is 1 within the crop. In "
            "their "
            "code negative corners wrap around.",
            "Training crops are not pushed into the frame, their scale is drawn from an interval "
            "that is symmetric around 1, and the filter limits sides "
            "instead of areas.",
            "`exact` (off in the papers' sizes): boxes go into and out of crops by the crops' own "
            "geometry; theirs ignores on the way out that windows are "
            "snapped to whole pixels. With it off, crops are theirs pixel by pixel.",
            "Read-out for query and memory of unequal sizes, which their code cannot do and "
            "DASTM's 160-pixel queries need.",
            "Left open by DASTM's paper and decided here, each a field of its config: four "
            "decisions of the gate, the first of them no module; hidden layer 512 / 4, "
            "temperature 1; a hard choice learned straight through a Gumbel softmax; one decision "
            "for each memory frame, when it is stored; the "
            "mean, not the sum, of the modules in SASTM; MobileOne-S1, its third stage at stride "
            "8; crops of 289 pixels for the query too.",
        ),
    ),
    "MixViT and USTAM": Family(
        "test_ustam_parity",
        (
            "mixvit-b288",
            "mixvit-l384",
            "mixvit-tiny",
            "ustam-b288",
            "ustam-b384",
            "ustam-l384",
            "ustam-tiny",
        ),
        "`mixvit_b_288.json` and `mixformer_units.json` are of MCG-NJU/MixFormer at 8b87088: "
        "network, tracking with template updates, decoding, losses, tables. "
        "**USTAM's authors published no code.** `ustam_b_288.json` holds what the definition in "
        "our specification gives on top of MixViT: it fixes "
        "that definition, not the authors' program. What the paper's tables say of parameters and "
        "multiply-accumulates agrees with it, to the last printed digit.",
        (
            "Keys and values of the templates are computed when the templates change, not in every "
            "frame, and only the two blocks whose map is needed "
            "make one. The result is the same, the step faster.",
            "The score branch of MixViT's second training stage is not here: USTAM does not use "
            "it. Its entries in a checkpoint are set aside by name.",
            "The search window of MixViT-L is 4.5 target sizes large in training and 5 in "
            "tracking, as in its configuration file; their scripts for each benchmark "
            "override it.",
            "Decided where USTAM's paper is open, each a field of its config: the spatial layer is "
            "one linear map, shared by the heads, over the search part of the "
            "last block's map, and starts at zero, so that USTAM begins as MixViT bit for bit; its "
            "output is added to the map, not to Eq. 6's difference; template columns "
            "pass unchanged; the enhanced map goes to the next frame, unmoved and without "
            "gradient; the first frame has none; search windows of 4.5 target "
            "sizes, where the text has 2; two neighbouring search frames in training, from almost "
            "the same window and mirrored alike.",
            COORDINATES,
        ),
    ),
}


def text(deviations: dict[str, Deviations]) -> str:
    """The page, with the deviations of each family."""
    lines = [HEAD]
    for title, family in FAMILIES.items():
        lines += [
            f"## {title}",
            "",
            "Names: " + ", ".join(f"`{name}`" for name in family.names) + ".",
            "",
            family.reference,
            "",
        ]
        lines += [
            "| compared | golden file | tolerance | largest deviation |",
            "|---|---|---:|---:|",
        ]
        lines += [
            f"| {what} | {file} | {_number(tolerance)} | {_number(value)} |"
            for what, (value, tolerance, file) in deviations[title].items()
        ]
        lines += [
            "",
            "Where we depart, and why:",
            "",
            *(f"- {departure}" for departure in family.departures),
            "",
        ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def written(page: str) -> dict[str, Deviations]:
    """What the page says was compared, by family."""
    found: dict[str, Deviations] = {}
    for title, section in re.findall(
        r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL
    ):
        rows = re.findall(r"^\| (.+) \| (\w+) \| (\S+) \| (\S+) \|$", section, re.MULTILINE)
        found[title] = {
            what: (float(value), float(tolerance), file) for what, file, tolerance, value in rows
        }
    return found


def not_on_page(family: str, deviations: Deviations) -> list[str]:
    """What of a family's comparisons the page has not, or has with another tolerance or file, or
    has and should not.
    """
    page = {
        (what, file, _number(tolerance))
        for what, (_, tolerance, file) in written(PAGE.read_text())[family].items()
    }
    return sorted(
        what
        for what, *_ in page
        ^ {(what, file, _number(tolerance)) for what, (_, tolerance, file) in deviations.items()}
    )


def main(wanted: list[str]) -> None:
    chosen = [
        title
        for title in FAMILIES
        if not wanted or any(word.lower() in title.lower() for word in wanted)
    ]
    if not chosen:
        raise SystemExit(
            f"no family is called {' or '.join(wanted)}; there are {', '.join(FAMILIES)}"
        )
    found = written(PAGE.read_text()) if wanted else {}
    for title in chosen:
        found[title] = deviations = importlib.import_module(FAMILIES[title].module).deviations()
        share = max(
            (value / tolerance if tolerance else value)
            for value, tolerance, _ in deviations.values()
        )
        print(f"{title}: {len(deviations)} comparisons, at most {share:.0%} of a tolerance")
    PAGE.write_text(text(found))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Measure the agreement with the authors' code and write docs/certificates.md."
    )
    parser.add_argument(
        "family",
        nargs="*",
        help="only these, by a part of their titles, as sbt; the others' numbers stay (default: "
        "all)",
    )
    main(parser.parse_args().family)
