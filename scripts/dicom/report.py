"""Structured reports (TID 1500): measurements of the segments of a DICOM segmentation, and the grade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

OWN = "99MEDSEGDIFF"  # coding scheme of concepts that no standard has
UNITS = {"mL": "mL", "mm3": "mm3", "[hnsf'U]": "Hounsfield unit", "1": "no units"}  # of UCUM
SERIES_NUMBER = 901

Concept = tuple[str, str, str]  # value, meaning and coding scheme
VOLUME: Concept = ("118565006", "Volume", "SCT")
MEAN_HU: Concept = ("112031", "Attenuation Coefficient", "DCM")
PROBABILITY: Concept = ("probability", "Probability", OWN)
EXPECTED_DICE: Concept = ("expected_dice", "Dice coefficient that is expected of the mask", OWN)
GRADE: Concept = ("371469007", "Histologic grade of neoplasm", "SCT")


class Measured(NamedTuple):
    """A measurement: what, how much, the unit of UCUM, and the ends of its 90 % interval if it has one."""

    concept: Concept
    value: float
    unit: str
    low: float | None = None
    high: float | None = None


def structured_report(
    highdicom: Any,
    segmentation: Any,
    headers: Sequence[Any],
    measured: Mapping[int, Sequence[Measured]],
    grade: Mapping[str, float],
    name: str,
    version: str,
) -> Any:
    """Comprehensive 3D SR with a measurement group for each segment, and one for the grade.

    Args:
        highdicom: the library.
        segmentation: DICOM segmentation whose segments are measured.
        headers: of the images that it refers to.
        measured: measurements of each segment, by its number. Undefined ones must be left out.
        grade: probability of each grade; empty without a grade.
        name: of the bundle, the observer.
        version: of the bundle.
    """
    sr = highdicom.sr

    def concept(value: Concept) -> Any:
        code, meaning, scheme = value
        return sr.CodedConcept(code, scheme, meaning)

    def measurement(one: Measured) -> Any:
        unit = sr.CodedConcept(one.unit, "UCUM", UNITS[one.unit])
        bounds = None
        if one.low is not None and one.high is not None:  # distances from the value
            bounds = sr.MeasurementProperties(
                lower_measurement_uncertainty=one.value - one.low, upper_measurement_uncertainty=one.high - one.value
            )
        return sr.Measurement(name=concept(one.concept), value=one.value, unit=unit, properties=bounds)

    source = sr.SourceSeriesForSegmentation(headers[0].SeriesInstanceUID)
    algorithm = sr.AlgorithmIdentification(name=name, version=version)
    groups = []
    for number, values in measured.items():
        segment = segmentation.get_segment_description(number)
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), segment.segment_label),
                referenced_segment=sr.ReferencedSegment(
                    segmentation.SOPClassUID, segmentation.SOPInstanceUID, number, source_series=source
                ),
                finding_type=segment.segmented_property_type,
                algorithm_id=algorithm,
                measurements=[measurement(one) for one in values],
            )
        )
    if grade:
        likeliest = max(grade, key=lambda name: grade[name])
        groups.append(
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(highdicom.UID(), "grade"),
                algorithm_id=algorithm,
                measurements=[measurement(Measured(PROBABILITY, grade[likeliest], "1"))],
                qualitative_evaluations=[
                    sr.QualitativeEvaluation(concept(GRADE), concept((likeliest, likeliest, OWN)))
                ],
            )
        )
    observer = sr.DeviceObserverIdentifyingAttributes(uid=highdicom.UID(), name=name, model_name=version)
    device = sr.CodedConcept("121007", "DCM", "Device")
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=sr.ObserverContext(device, observer)),
        procedure_reported=sr.CodedConcept("363679005", "SCT", "Imaging procedure"),
        imaging_measurements=groups,
        title=sr.CodedConcept("126000", "DCM", "Imaging Measurement Report"),
    )
    report = sr.Comprehensive3DSR(
        evidence=[segmentation, *headers],
        content=content,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer=name,
        is_complete=True,
    )
    report.SeriesDescription = f"{name}: measurements"
    return report
