"""What `dacal evaluate` does: saved predictions and label images in, a report out.

The files, in the order of the data; none imports one from a later line:

- `files` (which files there are, and what is wrong with one), `images`, `arrays` (reading one, suspiciously), `sets` (public
  data sets), `label_maps` (numbers or colours to classes), `shapes` (layouts), `matching` (which file belongs to which)
- `labels`, `predictions` (one of either)
- `options`, `wording` (the package's errors in the command's words), `plan` (what is asked for, and whether it can be done)
- `doubts` (labels or logits that are none), `judging` (all images, through `CalibrationStats`), `compare` (several networks)
- `report` (what was found: numbers), `pictures`, `worst`, `worst_picture`
- `tables`, `page`, `markdown`, `spreadsheet`, `written` (the files of a report)
- `command` (all of it, and how it went)
"""
