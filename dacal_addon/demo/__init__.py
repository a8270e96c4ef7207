"""What `dacal demo` does: all methods trained on an embedded benchmark with everything else equal, and compared.

`datasets` (the images, drawn by `streets`, `digits` and `mitochondria`) -> `recipes` (how long, with which settings) ->
`batches` (what one iteration sees) -> `methods` (what the student is taught) -> `training` (the loop) -> `evaluation` (the
figures) -> `run` (all of it, and the files that it writes). `network` is what is trained, `plots` draws the predictions.
"""
