"""What `dacal evaluate` does: saved predictions and label images in, a report out.

`files` (which files there are, and what is wrong with one) -> `labels`, `predictions` (reading one, suspiciously) -> `run` (all
of them, through `CalibrationStats`) -> `report` (report.json, the pictures) -> `page` (report.html).
"""
