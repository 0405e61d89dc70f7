"""Metrics, intervals, calibration, tables and plots."""
