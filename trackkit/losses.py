"""Training losses that trackers share."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def balanced_bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss in which positives and negatives weigh one half each: two equal shapes -> scalar.

    A response map has a dozen positive cells among hundreds; without the balance "no" everywhere is a good
    answer. Labels are 0 or 1. If one class is missing the other keeps its half.
    Source: Bertinetto et al. 2016, section 2.2, Eq. 3-4 (labels there are +1 and -1).
    """
    positive = labels > 0.5
    weights = torch.where(
        positive,
        0.5 / positive.sum().clamp(min=1),
        0.5 / (~positive).sum().clamp(min=1),
    )
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), weights.to(logits.dtype), reduction="sum")
