"""DICOM objects of results: segmentations and structured reports, with highdicom (the extra ``dicom``)."""
