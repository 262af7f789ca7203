"""How well classes are told apart, and how well the probabilities are meant.

Accuracy is given over pictures and as the mean over classes, since they differ when classes do not have equally many
pictures. The calibration error is that of Guo et al., On Calibration of Modern Neural Networks, 2017, arXiv:1706.04599:
the mean distance between confidence and accuracy over equal bins of confidence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def figures_of(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Any]:
    """Accuracy, mean accuracy of the classes that occur, cross entropy and calibration error of logits (n, c)."""
    hits = logits.argmax(1) == labels
    return {
        "accuracy": float(hits.float().mean()),
        "mean_class_accuracy": float(class_accuracy(logits, labels).nanmean()),
        "pictures": len(labels),
        "loss": float(cross_entropy(logits, labels)),
        "calibration_error": calibration(logits.softmax(1), labels, bins)[1],
    }


def class_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers by class, (c,); not a number for classes without pictures."""
    hits = (logits.argmax(1) == labels).float()
    count = torch.bincount(labels, minlength=logits.shape[1])
    return torch.zeros(logits.shape[1]).index_add(0, labels, hits) / count


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[list[tuple[float, float, int]], float]:
    """Returns (mean confidence, accuracy, pictures) of every bin that is not empty, and the expected error.

    Args:
        probabilities: (n, c).
        labels: (n,).
        bins: of equal width over (0, 1].
    """
    confidence, told = probabilities.max(1)
    hits = (told == labels).float()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    found = []
    for k in place.unique().tolist():
        inside = place == k
        found.append((float(confidence[inside].mean()), float(hits[inside].mean()), int(inside.sum())))
    error = sum(count * abs(sure - right) for sure, right, count in found) / max(1, len(labels))
    return found, error


def confusion(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Returns how often each class (rows) was taken for each (columns), (c, c)."""
    counts = np.zeros((logits.shape[1], logits.shape[1]), dtype=np.int64)
    np.add.at(counts, (labels.numpy(), logits.argmax(1).numpy()), 1)
    return counts


def principal(features: Tensor) -> Tensor:
    """Returns features (n, d) as places on the plane of their two principal components, (n, 2), centred."""
    centred = features.double() - features.double().mean(0)
    return (centred @ torch.linalg.svd(centred, full_matrices=False)[2][:2].T).float()


def nearest(features: Tensor, known: Tensor, count: int = 5) -> tuple[Tensor, Tensor]:
    """Returns the places of the most similar known rows and their cosines, the nearest first: (n, k) each.

    Args:
        features: (n, d).
        known: (m, d).
        count: how many; no more than there are.
    """
    a, b = (torch.nn.functional.normalize(part.float(), dim=-1) for part in (features, known))
    found = (a @ b.T).topk(min(count, len(b)), dim=1)
    return found.indices, found.values
