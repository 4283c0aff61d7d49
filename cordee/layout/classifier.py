"""Shapes of the image classifiers' parameters.

The planner counts from this and a test holds it equal to the modules (model/classifier.py), as
`tensor_specs.py` does for the transformer. Traded away: channels that grow as the image shrinks;
every block has the same width, so that one number says how large a model is.
"""

from __future__ import annotations

from collections.abc import Iterator

from cordee.config.model import ModelSettings

Named = tuple[str, tuple[int, ...], str]
"""Name, whole shape and group of a parameter."""


def classifier_tensors(model: ModelSettings) -> Iterator[Named]:
    """Every parameter of a classifier, in the order of the module's own parameters."""
    width, image = model.width, model.image
    norm: list[Named] = [("norm.weight", (width,), "vectors"), ("norm.bias", (width,), "vectors")]
    if model.kind == "conv":
        yield "stem.weight", (width, image.channels, 3, 3), "matrices"
    for layer in range(model.layers):
        if model.kind == "conv":
            block = [
                *norm,
                ("first.weight", (width, width, 3, 3), "matrices"),
                ("first.bias", (width,), "vectors"),
                ("second.weight", (width, width, 3, 3), "matrices"),
            ]
        else:
            inputs = width if layer else image.pixel_bytes
            block = [("linear.weight", (width, inputs), "matrices"), *norm]
        for name, shape, group in block:
            yield f"blocks.{layer}.{name}", shape, group
    if model.kind == "conv":
        yield from norm
    yield "head.weight", (image.classes, width), "embeddings"
    yield "head.bias", (image.classes,), "vectors"
