"""Panels without a browser: set a control, look at the picture."""

from __future__ import annotations

import base64
import io
import re

import ipywidgets
import numpy as np
import pytest
import torch
from PIL import Image

from trackkit.course.widgets import Explorer, Player, choice, number, switch
from trackkit.sequences import ArraySequence


def draw(size, shade="light", inverted=False):
    value = {"light": 200, "dark": 50}[shade]
    picture = np.full((size, size), 255 - value if inverted else value, np.uint8)
    return picture, f'A {shade} square of {size} px, inverted: {inverted}, "quoted".'


@pytest.fixture
def explorer():
    return Explorer(draw, size=number(8, 4, 32), shade=choice(["light", "dark"]), inverted=switch())


def shown(panel):
    html = panel._picture.value
    data = base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))
    return html, Image.open(io.BytesIO(data))


def widgets_in(box):
    for child in box.children:
        yield child
        if hasattr(child, "children"):
            yield from widgets_in(child)


def test_the_picture_follows_the_controls(explorer):
    assert explorer.values == {"size": 8, "shade": "light", "inverted": False}
    explorer.controls["size"].value = 12
    explorer.controls["shade"].value = "dark"
    explorer.controls["inverted"].value = True
    html, image = shown(explorer)
    assert image.size == (12, 12) and abs(image.convert("L").getpixel((0, 0)) - 205) <= 2
    assert 'alt="A dark square of 12 px, inverted: True, &quot;quoted&quot;."' in html
    assert explorer.png == base64.b64decode(re.search(r"base64,([^\"]+)", html).group(1))


def test_slider_and_field_hold_the_same_number(explorer):
    (slider,) = (w for w in widgets_in(explorer.box) if isinstance(w, ipywidgets.IntSlider))
    slider.value = 20
    assert explorer.values["size"] == 20 and shown(explorer)[1].size == (20, 20)
    explorer.controls["size"].value = 5
    assert slider.value == 5


def test_every_control_has_a_name_and_sliders_are_for_the_mouse_only(explorer):
    # ipywidgets ties a description to these kinds of fields by <label for>, so screen readers speak
    # it
    labelled = (
        ipywidgets.BoundedIntText,
        ipywidgets.BoundedFloatText,
        ipywidgets.Dropdown,
        ipywidgets.Checkbox,
    )
    assert all(isinstance(c, labelled) and c.description for c in explorer.controls.values())
    named = Explorer(draw, size=number(8, 4, 32, label="side_length in px"))
    assert named.controls["size"].description == "side length in px"
    sliders = [
        w
        for w in widgets_in(explorer.box)
        if isinstance(w, (ipywidgets.IntSlider, ipywidgets.FloatSlider))
    ]
    assert sliders and all("trackkit-mouse" in s._dom_classes and not s.readout for s in sliders)
    assert any(
        ".trackkit-mouse .noUi-handle {visibility: hidden}" in w.value
        for w in explorer.box.children[-1:]
    )


def test_nothing_that_swallows_exceptions(explorer):
    assert not [w for w in widgets_in(explorer.box) if isinstance(w, ipywidgets.Output)]

    def broken(size):
        if size > 8:
            raise RuntimeError("too large")
        return draw(size)

    panel = Explorer(broken, size=number(8, 4, 32))
    with pytest.raises(RuntimeError, match="too large"):
        panel.controls["size"].value = 9
    with pytest.raises(ValueError, match="what it shows"):
        Explorer(lambda size: (draw(size)[0], ""), size=number(8, 4, 32))


def test_bundle_has_live_view_and_static_picture(explorer):
    data, metadata = explorer._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == explorer.box.model_id
    assert data["image/png"] == explorer.png and metadata == {"image/png": {"alt": explorer.alt}}
    assert data["text/plain"] == "Explorer: " + explorer.alt and "0x" not in data["text/plain"]


def test_numbers_are_whole_only_if_all_are():
    controls = Explorer(lambda a, b: draw(4), a=number(1, 0, 5), b=number(0.5, 0, 1)).controls
    assert isinstance(controls["a"], ipywidgets.BoundedIntText) and controls["a"].step == 1
    assert isinstance(controls["b"], ipywidgets.BoundedFloatText) and controls["b"].step == 0.01
    with pytest.raises(ValueError, match="not between"):
        number(9, 0, 5)


@pytest.fixture
def sequence():
    frames = [torch.full((3, 48, 64), 20 * i, dtype=torch.uint8) for i in range(6)]
    boxes = torch.tensor([[10.0 + i, 12, 20, 16] for i in range(6)])
    boxes[4] = -1
    return ArraySequence("grey", frames, boxes)


def test_player_shows_the_frame_and_states_overlaps(sequence):
    still = sequence.boxes_xywh[:1].repeat(6, 1)
    player = Player(sequence, {"stay": still})
    assert player.alt == "Frame 0 of 6 in grey; truth at 10, 12, 20, 16; stay: overlap 1.00."
    player.controls["frame"].value = 3
    assert player.alt == "Frame 3 of 6 in grey; truth at 13, 12, 20, 16; stay: overlap 0.74."
    _, image = shown(player)
    assert image.size == (320, 240) and abs(image.convert("L").getpixel((300, 220)) - 60) <= 2
    player.controls["frame"].value = 4
    assert player.alt == "Frame 4 of 6 in grey; truth: no box; stay at 10, 12, 20, 16."


def test_player_plays_from_the_current_frame(sequence):
    player = Player(sequence)
    player.controls["frame"].value = 2
    player.controls["play"].value = True
    assert player.alt == "Animation of grey, frames 2 to 5." and shown(player)[1].n_frames == 4
    player.controls["play"].value = False
    assert player.alt.startswith("Frame 2 of 6")


def test_player_checks_its_tracks(sequence):
    with pytest.raises(ValueError, match="'short' has 2 boxes for 6 frames"):
        Player(sequence, {"short": torch.zeros(2, 4)})


def test_player_of_an_unlabelled_sequence(sequence):
    test_sequence = ArraySequence("test", sequence.images, sequence.boxes_xywh[:1])
    boxes = torch.ones(6, 4)
    assert Player(test_sequence, {"ours": boxes}).alt == "Frame 0 of 6 in test; ours at 1, 1, 1, 1."
