"""What `dacal evaluate` does: saved predictions and label images in, a report out.

The files, in the order of the data; each imports from those before it alone: `files` (which files there are, and what is wrong
with one) -> `labels`, `predictions` (reading one, suspiciously) -> `options`, `plan` (what is asked for, and whether it can be
done) -> `judging` (all images, through `CalibrationStats`) -> `report` (what was found: numbers and pictures) -> `page`
(report.html of these) -> `command` (writes them, and says how it went).
"""
