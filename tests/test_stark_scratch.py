"""STARK from nothing: the aids of a short training, weights to start from, and the weights that
come with trackkit.
"""

from __future__ import annotations

import urllib.error

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from trackkit.errors import TrackkitError
from trackkit.evaluation import average_overlap, sequence_overlaps
from trackkit.got10k import GOT10k
from trackkit.heads import soft_argmax
from trackkit.losses import place_cross_entropy
from trackkit.paths import SAMPLES
from trackkit.stages import shortened
from trackkit.trackers.stark import STARK, STARKConfig
from trackkit.tracking import track
from trackkit.weights import load


@given(st.floats(0, 1), st.floats(0, 1))
def test_the_place_itself_is_the_best_answer(x, y):
    """At the minimum the gradient is 0: the softmax is the shared target, whose expectation is the
    place.
    """
    place = torch.tensor([[x, y]])
    logits = torch.zeros(1, 12, 12, requires_grad=True)
    place_cross_entropy(logits, place).backward()
    target = (1 / 144 - logits.grad).clamp(min=1e-12)
    assert target.sum() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(soft_argmax(target.log()), place.clamp(max=11 / 12), atol=1e-3)


def test_a_place_outside_of_the_crop_counts_as_its_border():
    logits = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        place_cross_entropy(logits, torch.full((2, 1, 2), 1.7)),
        place_cross_entropy(logits, torch.ones(2, 1, 2)),
    )


def test_attention_starts_as_a_lookup():
    torch.manual_seed(0)
    tracker, width = STARK(STARKConfig.tiny()), 64
    for layer in tracker.encoder.layers:
        queries, keys, _ = layer.self_attn.in_proj_weight.split(width)
        assert torch.equal(queries, keys)
        tokens = torch.nn.functional.layer_norm(torch.randn(1, 5, width), (width,))
        _, share = layer.self_attn(tokens, tokens, tokens, weights=True)
        # each token looks at itself most
        assert (share.mean(1)[0].argmax(1) == torch.arange(5)).all()
    for layer in tracker.decoder.layers:
        seen = torch.randn(1, 1, width).expand(1, 3, width)
        assert torch.allclose(layer.cross_attn(seen, seen, seen)[0], seen, atol=1e-5)
    assert not hasattr(STARK(STARKConfig.tiny(from_scratch=False)), "segment")


def test_shortened_stages_keep_their_proportions():
    body, score = shortened(STARK(STARKConfig.tiny()).recipe("laptop"), 500)
    assert (body.steps, score.steps, body.warmup, score.warmup) == (500, 50, 8, 8)
    assert [stage.steps for stage in shortened(STARK(STARKConfig.tiny()).recipe("laptop"), 1)] == [
        1,
        1,
    ]


def test_weights_to_start_from(monkeypatch):
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    tracker = STARK(STARKConfig.s50())
    theirs = torchvision.models.resnet50().state_dict()
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **rest: theirs)
    assert tracker.load_pretrained()
    assert torch.equal(tracker.backbone.layer3[5].conv3.weight, theirs["layer3.5.conv3.weight"])
    assert not STARK(STARKConfig.tiny()).load_pretrained()

    def offline(self, **rest):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(type(weights), "get_state_dict", offline)
    with pytest.raises(
        TrackkitError,
        match=r"resnet50-\w+\.pth there, or start from random weights: --no-pretrained",
    ):
        tracker.load_pretrained()


def test_weights_that_come_with_trackkit():
    """They follow a turning target through an embedded sequence, and renew the dynamic template on
    the way.
    """
    tracker = load(SAMPLES / "weights" / "stark-tiny.safetensors")
    assert tracker.config == STARKConfig.tiny()
    dataset = GOT10k(SAMPLES, "val")
    sequence = next(
        dataset[i] for i in range(len(dataset)) if dataset[i].name == "synth_val_rotation"
    )
    assert average_overlap(sequence_overlaps(sequence, track(tracker, sequence).boxes_xywh)) > 0.7
    state, renewed = tracker.start([sequence.frame(0)], sequence.boxes_xywh[:1]), []
    for i in range(1, 21):
        state, prediction = tracker.step(state, [sequence.frame(i)], maps=True)
        renewed.append(bool(prediction.maps["updated"]))
        assert renewed[-1] == (i % 10 == 0 and prediction.score.item() > 0.5)
    assert any(renewed)
