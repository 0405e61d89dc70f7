"""Active learning: which study to correct next."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from archive import Archive
from fastapi import HTTPException
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy


class LeastExpectedDice(Strategy):
    """The unlabelled study whose mask is expected to have the lowest Dice.

    Each study is segmented once for each version of the weights. A study with several files or series is asked for by
    one of them. Studies that the model refuses are left out.

    Args:
        infer: function that answers ``{"model": ..., "image": ...}``.
        model: that segments.
        weights: its file.
        modalities: endings by which the files of a study differ.
    """

    def __init__(
        self, infer: Callable[[dict[str, Any]], dict], model: str, weights: Path, modalities: Sequence[str]
    ) -> None:
        super().__init__("The unlabelled study whose mask is expected to have the lowest Dice")
        self.infer, self.model, self.weights = infer, model, weights
        self.ending = re.compile(rf"[-_.]({'|'.join(map(re.escape, modalities))})$", re.IGNORECASE)
        self.known: dict[tuple[str, int], float | None] = {}

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """``{"id": image, "weight": expected Dice}``, or None if every study has a label."""
        studies = self.studies(datastore)
        labelled = {studies.get(image) for image in datastore.get_labeled_images()}
        found: dict[str, tuple[float, str]] = {}
        for image, study in studies.items():
            if study not in labelled and study not in found:
                expected = self.expected_dice(image)
                if expected is not None:
                    found[study] = (expected, image)
        if not found:
            return None
        expected, image = min(found.values())
        return {"id": image, "weight": expected}

    def studies(self, datastore: Datastore) -> dict[str, str]:
        """Study of each image or series, in their order."""
        if isinstance(datastore, Archive):
            return datastore.studies()
        return {image: self.ending.sub("", image) for image in sorted(datastore.list_images())}

    def expected_dice(self, image: str) -> float | None:
        """Lowest expected Dice of the regions; None if the model refuses the image, or has no such estimate."""
        key = (image, self.weights.stat().st_mtime_ns)
        if key not in self.known:
            try:
                answer = self.infer({"model": self.model, "image": image})
            except HTTPException as error:
                if error.status_code >= 500:  # the archive may answer the next time
                    return None
                self.known[key] = None
            else:
                Path(answer.get("file") or answer["label"]).unlink(missing_ok=True)
                values = [v for name, v in answer["params"].items() if name.startswith("expected_dice_")]
                self.known[key] = min((value for value in values if value is not None), default=None)
        return self.known[key]
