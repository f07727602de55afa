"""neighbours and probe: whether what a model of pictures computes still tells classes apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from compiler.evaluate.estimates import Array
from compiler.evaluate.images import Pictures, model_pictures, read_pictures, square, usual_size
from compiler.evaluate.inputs import forward
from compiler.evaluate.metrics.base import Given, Task, share

NEIGHBOURS, KNOWN, RIDGE = 10, 4, 1e-3
Classifier = Callable[[Tensor, Tensor, Tensor], Tensor]  # features and labels known, features asked: labels


def nearest(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """The most frequent label, [asked], of the 10 of ``known`` [count, width] with the largest cosine."""
    cosines = functional.normalize(asked, dim=-1) @ functional.normalize(known, dim=-1).T
    return labels[cosines.topk(min(NEIGHBOURS, len(known))).indices].mode(1).values


def linear_probe(known: Tensor, labels: Tensor, asked: Tensor) -> Tensor:
    """Labels [asked] by ridge regression from features to one-hot labels, in closed form.

    Features are centred and scaled to a variance of 1; the ridge is 0.001 for each of ``known``.
    """
    mean, spread = known.mean(0), known.std(0).clamp(min=1e-6)
    x, y = ((each - mean).double() / spread.double() for each in (known, asked))
    targets = functional.one_hot(labels).double()
    centre = targets.mean(0)
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return (y @ torch.linalg.solve(x.T @ x + ridge, x.T @ (targets - centre)) + centre).argmax(-1)


def feature(model: Any, pixels: Tensor) -> Tensor:
    """What stands for a picture [1, 3, height, width]: the first token of the last layer, or the mean of a map."""
    with torch.inference_mode():
        states = forward(model, {"pixel_values": pixels})[0].float()
    return states[0, 0].clone() if states.ndim == 3 else states[0].flatten(1).mean(-1).clone()


def _features(model: Any, given: Given, pictures: Pictures) -> Tensor:
    made = model_pictures(given.path, pictures.pixels, square(given.image), usual_size(model.config))
    return torch.stack([feature(model, each) for each in made])


def _observer(classify: Classifier) -> Callable[[Any, Given], list[tuple[int, int]]]:
    """Of ``samples`` test pictures the label that a model's own features give, by four times as many that are known,
    and the true one."""

    def observe(model: Any, given: Given) -> list[tuple[int, int]]:
        folder = given.data
        assert folder is not None  # a metric of pictures is not chosen without data
        known = read_pictures(folder, "train", KNOWN * given.samples)
        asked = read_pictures(folder, "t10k", given.samples)
        found = classify(_features(model, given, known), known.labels, _features(model, given, asked))
        return list(zip(found.tolist(), asked.labels.tolist(), strict=True))

    return observe


def _score(ours: Sequence[tuple[int, int]], theirs: Sequence[tuple[int, int]] | None) -> Mapping[str, Array]:
    found = {"accuracy": share([label == truth for label, truth in ours])}
    if theirs is not None:
        found["same as the original"] = share([a[0] == b[0] for a, b in zip(ours, theirs, strict=True)])
    return found


NEAREST = Task(_observer(nearest), _score, "images", "images")
PROBE = Task(_observer(linear_probe), _score, "images", "images")
