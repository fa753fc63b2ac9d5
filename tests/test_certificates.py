"""The page of certificates is current, without measuring anew; that its numbers are true is for
test_*_parity to say.
"""

from __future__ import annotations

import pytest
from certificates import FAMILIES, PAGE, not_on_page, text, written
from golden import FOLDER, too_far

from trackkit.weights import TRACKERS


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text()


def test_every_tracker_has_a_certificate(page):
    assert sorted(name for family in FAMILIES.values() for name in family.names) == sorted(
        set(TRACKERS) - {"stay", "ncc"}
    )
    assert all(f"`{name}`" in page for name in set(TRACKERS) - {"stay", "ncc"})


def test_the_page_is_what_the_command_would_write(page):
    assert text(written(page)) == page, "run python tests/certificates.py"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_deviation_is_within_its_tolerance(page, family):
    rows = written(page)[family]
    assert rows and too_far(rows) == {}


def test_every_golden_file_is_compared(page):
    on_page = {file for rows in written(page).values() for *_, file in rows.values()}
    # counts, see test_sbt_parity
    assert on_page == {path.stem for path in FOLDER.glob("*.json")} - {"sbt_counts"}


def test_a_change_in_what_is_compared_is_noticed(page):
    rows = written(page)["SBT"]
    assert not_on_page("SBT", rows) == []
    first, (value, tolerance, file) = next(iter(rows.items()))
    assert not_on_page("SBT", rows | {first: (value / 2, tolerance, file)}) == []
    assert not_on_page("SBT", rows | {first: (value, tolerance * 10, file)}) == [first, first]
    assert not_on_page("SBT", rows | {"new": (0.0, 0.0, file)}) == ["new"]
    assert not_on_page("SBT", {what: row for what, row in rows.items() if what != first}) == [first]


def test_departures_are_told(page):
    assert all(
        f"- {departure}\n" in page
        for family in FAMILIES.values()
        for departure in family.departures
    )
    for family in ("STMTrack and DASTM", "MixViT and USTAM"):
        assert "published no code" in FAMILIES[family].reference
