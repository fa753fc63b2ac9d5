"""Pictures: what is drawn where, small files, stable texts."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from trackkit.course import figures
from trackkit.course.figures import show, show_source
from trackkit.drawing import COLOURS, animation, draw_boxes, to_image, to_png

GREEN, ORANGE = (torch.tensor(ImageColor.getrgb(c), dtype=torch.uint8) for c in COLOURS[:2])


def gradient(height=60, width=80):
    rows = torch.arange(height)[:, None].expand(height, width) * 4
    return torch.stack([rows, rows.flip(0), rows]).clamp(max=255).to(torch.uint8)


@pytest.fixture
def displayed(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "IPython.display.display", lambda data, **options: calls.append((data, options))
    )
    return calls


def test_draw_boxes_paints_the_four_edges_and_nothing_inside():
    frame = gradient()
    drawn = draw_boxes(frame, {"truth": [20, 10, 30, 40]}, legend=False)
    assert drawn.shape == frame.shape and drawn.dtype == torch.uint8
    for x, y in ((35, 10), (35, 50), (20, 30), (50, 30)):
        assert torch.equal(drawn[:, y, x], GREEN), (x, y)
    assert torch.equal(drawn[:, 20:40, 30:40], frame[:, 20:40, 30:40])
    assert not torch.equal(frame, drawn) and torch.equal(frame, gradient())


def test_a_box_that_cannot_be_drawn_keeps_its_colour():
    for missing in (None, [float("nan")] * 4, [5, 5, 0, 9], [-1, -1, -1, -1]):
        drawn = draw_boxes(
            gradient(), {"truth": missing, "ours": torch.tensor([20.0, 10, 30, 40])}, legend=False
        )
        assert torch.equal(drawn[:, 10, 21], ORANGE)


def test_scale_resizes_frame_and_boxes():
    drawn = draw_boxes(gradient(), {"truth": [20, 10, 30, 40]}, legend=False, scale=2)
    assert drawn.shape == (3, 120, 160)
    assert torch.equal(drawn[:, 60, 40], GREEN)


def test_legend_is_in_the_corner():
    frame = gradient()
    assert not torch.equal(draw_boxes(frame, {"truth": None})[:, :12, :12], frame[:, :12, :12])
    assert torch.equal(draw_boxes(frame, {"truth": None}, legend=False), frame)
    assert torch.equal(draw_boxes(frame, {}), frame)


def test_drawing_and_animating_need_no_matplotlib():
    code = (
        "import sys, torch; from trackkit.drawing import animation, draw_boxes;"
        "f = torch.zeros(3, 40, 40, dtype=torch.uint8); animation([f], {'a': [[1, 1, 9, 9]]}, "
        "alt='x');"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "picture", [torch.zeros(3, 4, 4), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_only_uint8_pictures(picture):
    with pytest.raises(ValueError, match="a picture has"):
        to_image(picture)


def test_png_is_at_most_640_wide_and_keeps_line_colours():
    image = Image.open(
        io.BytesIO(to_png(draw_boxes(gradient(300, 900), {"truth": [300, 100, 300, 100]})))
    )
    assert image.size == (640, 213) and image.mode == "P"
    pixels = np.array(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == GREEN.numpy()).all(1).any()
    fig = figures.figure_lines({"a": [1, 2]})
    fig.set_size_inches(9, 3)
    assert Image.open(io.BytesIO(to_png(fig))).width == 640


def test_show_gives_png_with_alt_and_a_stable_text(displayed):
    show(figures.figure_lines({"a": [1, 2, 3]}), alt="A line from 1 to 3.", caption="Rising.")
    (data, options), (caption, _) = displayed
    assert data["text/plain"] == "Picture: A line from 1 to 3."
    assert options == {"metadata": {"image/png": {"alt": "A line from 1 to 3."}}, "raw": True}
    assert data["image/png"].startswith(b"\x89PNG") and len(data["image/png"]) < 20_000
    assert caption == {"text/markdown": "*Rising.*", "text/plain": "Rising."}


def test_show_closes_a_pyplot_figure(displayed):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    ax.plot([1, 2])
    show(fig, alt="A line.")
    assert plt.get_fignums() == []


def test_alt_must_not_be_empty(displayed):
    with pytest.raises(ValueError, match="alt"):
        show(gradient(), alt=" ")
    with pytest.raises(ValueError, match="alt"):
        animation([gradient()], alt="")


def test_show_source_shows_the_code(displayed):
    show_source(draw_boxes)
    data = displayed[0][0]
    assert data["text/plain"].startswith("def draw_boxes(") and "0x" not in data["text/plain"]
    assert data["text/markdown"].startswith(
        "`trackkit.drawing.draw_boxes`\n```python\ndef draw_boxes("
    )


def moving(count=12):
    frames, boxes = [], []
    for i in range(count):
        frame = gradient(90, 160)
        frame[:, 30:50, 10 + 8 * i : 30 + 8 * i] = 255
        frames.append(frame)
        boxes.append([10.0 + 8 * i, 30, 20, 20])
    return frames, torch.tensor(boxes)


def test_animation_has_all_frames_and_is_deterministic():
    frames, boxes = moving()
    one, two = (animation(frames, {"truth": boxes}, alt="A square moves right.") for _ in range(2))
    assert one.data == two.data and len(one.data) < 30_000
    image = Image.open(io.BytesIO(one.data))
    assert (image.n_frames, image.size) == (12, (320, 180))
    image.seek(11)
    assert image.convert("RGB").getpixel((2 * (10 + 88), 100)) == tuple(GREEN.tolist())
    data, metadata = one._repr_mimebundle_()
    assert data == {
        "image/png": one.data,
        "text/plain": "Animation of 12 frames: A square moves right.",
    }
    assert (
        metadata == {"image/png": {"alt": "A square moves right."}}
        and repr(one) == data["text/plain"]
    )


def test_animation_meets_its_budget_or_says_so():
    noise = torch.randint(
        0, 256, (8, 3, 90, 160), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    small = animation(noise, alt="Noise.", width=160, max_bytes=20_000)
    image = Image.open(io.BytesIO(small.data))
    assert len(small.data) <= 20_000 and image.n_frames < 8 and image.info["duration"] > 100
    with pytest.raises(ValueError, match="lowest quality, 1 kB are allowed"):
        animation(noise, alt="Noise.", width=160, max_bytes=1000)


def test_animation_rejects_what_it_cannot_show():
    with pytest.raises(ValueError, match="'a' has 2 boxes for 1 frames"):
        animation([gradient()], {"a": torch.zeros(2, 4)}, alt="x")
    with pytest.raises(ValueError, match="at least one frame"):
        animation([], alt="x")


def test_figure_frames_has_an_axis_for_each_frame():
    fig = figures.figure_frames(
        [gradient()] * 7, [{"truth": [5, 5, 9, 9]}] * 7, [str(i) for i in range(7)]
    )
    assert [ax.get_title() for ax in fig.axes] == list("0123456")
    assert fig.get_size_inches()[0] == pytest.approx(6.4)


def test_figure_heatmap_marks_the_peak():
    values = torch.zeros(5, 7)
    values[3, 6] = 1
    fig = figures.figure_heatmap({"response": values}, image=gradient())
    axes = [ax for ax in fig.axes if ax.get_title() == "response"]
    assert len(fig.axes) == 3 and axes[0].images[0].get_array().shape == (5, 7)
    assert [line.get_xydata().tolist() for line in axes[0].lines] == [[[6.0, 3.0]]]
    assert all(not ax.lines for ax in figures.figure_heatmap({"a": values}, mark_peak=False).axes)


def test_figure_curves_reads_a_training_log():
    log = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5, "iou": 0.1}]
    ax = figures.figure_curves(log, ("loss", "iou")).axes[0]
    assert [line.get_label() for line in ax.lines] == ["loss", "iou"]
    assert ax.lines[0].get_xydata().tolist() == [[10, 1], [20, 0.5]]
    assert np.isnan(ax.lines[1].get_ydata()[0]) and ax.get_xlabel() == "step"
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.lines}) == 2


def test_figure_success_is_the_share_above_each_threshold():
    ax = figures.figure_success({"ours": torch.tensor([0.2, 0.5, 0.8, 0.8])}).axes[0]
    assert ax.lines[0].get_label() == "ours (AO 0.575)"
    rates = dict(zip(np.round(ax.lines[0].get_xdata(), 2), ax.lines[0].get_ydata(), strict=True))
    assert (rates[0.1], rates[0.3], rates[0.6], rates[1.0]) == (1.0, 0.75, 0.5, 0.0)
