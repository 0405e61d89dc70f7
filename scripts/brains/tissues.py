"""Tissues of a head, their brightness, and the labels of tumours."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

MODALITIES = ("t1", "t1ce", "t2", "flair")


class Tissue(IntEnum):
    """What fills a place of a head."""

    AIR = 0
    SCALP = 1  # and other fat
    SKULL = 2  # and other bone
    MENINGES = 3  # fluid between brain and skull
    MUSCLE = 4  # and other tissue of face and neck
    EYE = 5
    MUCOSA = 6  # and glands, vessels of the neck
    CORD = 7
    CSF = 8  # from here on: the brain
    GREY = 9
    WHITE = 10
    VENTRICLE = 11
    NUCLEUS = 12
    STEM = 13
    VESSEL = 14
    CHOROID = 15
    WHITE_LESION = 16  # of small vessels; no tumour
    CAVITY = 17  # of a resection; no tumour
    OEDEMA = 18  # from here on: the tumour
    CORE = 19
    RIM = 20  # enhances
    NECROSIS = 21
    CYST = 22


BRAIN, TUMOUR = Tissue.CSF, Tissue.OEDEMA  # the first tissue of each
# of BraTS: 1 necrotic or not enhancing core, 2 oedema, 4 enhancing tumour
LABELS = {Tissue.OEDEMA: 2, Tissue.CORE: 1, Tissue.RIM: 4, Tissue.NECROSIS: 1, Tissue.CYST: 1}
# brightness in T1, T1 with contrast agent, T2 and FLAIR; white matter in T1 is 1
BRIGHTNESS = {
    Tissue.AIR: (0, 0, 0, 0),
    Tissue.SCALP: (1.6, 1.7, 1.1, 1.4),
    Tissue.SKULL: (0.15, 0.18, 0.12, 0.12),
    Tissue.MENINGES: (0.25, 0.28, 2.4, 0.25),
    Tissue.MUSCLE: (0.55, 0.7, 0.5, 0.5),
    Tissue.EYE: (0.3, 0.3, 2.5, 0.5),
    Tissue.MUCOSA: (0.6, 1.3, 1.7, 1.4),
    Tissue.CORD: (0.85, 0.87, 0.85, 0.9),
    Tissue.CSF: (0.25, 0.26, 2.4, 0.25),
    Tissue.GREY: (0.68, 0.7, 0.95, 1.0),
    Tissue.WHITE: (1.0, 1.02, 0.72, 0.78),
    Tissue.VENTRICLE: (0.22, 0.23, 2.5, 0.22),
    Tissue.NUCLEUS: (0.78, 0.8, 0.85, 0.92),
    Tissue.STEM: (0.9, 0.92, 0.78, 0.82),
    Tissue.VESSEL: (0.4, 2.2, 0.4, 0.5),
    Tissue.CHOROID: (0.45, 1.6, 1.2, 0.7),
    Tissue.WHITE_LESION: (0.8, 0.82, 1.15, 1.3),
    Tissue.CAVITY: (0.25, 0.27, 2.5, 0.3),
    Tissue.OEDEMA: (0.72, 0.74, 1.3, 1.5),
    Tissue.CORE: (0.6, 0.62, 1.35, 1.35),
    Tissue.RIM: (0.65, 2.0, 1.2, 1.25),
    Tissue.NECROSIS: (0.4, 0.45, 1.5, 1.1),
    Tissue.CYST: (0.25, 0.27, 2.5, 0.35),
}


def random_brightness(rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """Brightness ``[tissue, modality]`` of the tissues of one subject.

    Every value varies by 12 %. A quarter of the modalities then get another contrast of the anatomy, which no sequence
    need have (Billot et al. 2023, SynthSeg); tumours keep their contrast to white matter. Tumours are faint to bright.

    Args:
        rng: draws them.
        strength: 0 keeps :data:`BRIGHTNESS`.
    """
    table = np.array([BRIGHTNESS[tissue] for tissue in Tissue], float)
    found = table * np.exp(rng.normal(0, 0.12 * strength, table.shape))
    brain, tumour = slice(BRAIN, None), slice(TUMOUR, None)
    for modality in range(len(MODALITIES)):
        contrast = found[tumour, modality] / found[Tissue.WHITE, modality]
        other, share = rng.uniform(0.15, 1.3, len(table)), rng.uniform(0.2, 0.7) * strength
        if rng.random() < 0.25 * strength:
            found[brain, modality] = (1 - share) * found[brain, modality] + share * other[brain]
            found[tumour, modality] = contrast * found[Tissue.WHITE, modality]
    faint = [Tissue.OEDEMA, Tissue.CORE]
    clear = 1 + strength * (rng.uniform(0.5, 1.4) - 1)
    found[faint] = found[Tissue.WHITE] + clear * (found[faint] - found[Tissue.WHITE])
    if rng.random() < 0.3 * strength:  # FLAIR does not suppress every cyst
        found[Tissue.CYST, 3] = found[Tissue.CSF, 3] * rng.uniform(1, 3)
    if rng.random() < 0.3 * strength:  # and suppresses some necroses
        found[Tissue.NECROSIS, 3] *= rng.uniform(0.3, 0.8)
    found[Tissue.SCALP] *= 1 + strength * (rng.uniform(0.5, 2.2) - 1)
    found[Tissue.MUSCLE] *= 1 + strength * (rng.uniform(0.5, 1.5) - 1)
    found[Tissue.MUCOSA] *= 1 + strength * (rng.uniform(0.4, 1.6) - 1)
    found[Tissue.AIR] = 0
    return np.maximum(found, 0)
