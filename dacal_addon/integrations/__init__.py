"""Trainers that exist, wrapped: `mmseg` for DAFormer, HRDA, MIC and their forks, `mmengine` for MMSegmentation 1.x.

`options` is what their config may say, `doubts` what of it cannot work. `listening` hears what a host calls, `teachers` reads
what its teacher returns, `criterion` teaches its heads soft labels, `meta_step` is the bilevel step through these heads.
`calibration` is what outlives an iteration, `checkpoint` its state among the host's; `dacs_iteration` puts all of it into an
iteration of a `DACS`. For MMSegmentation 1.x: `segmentor_options` is what a config may say, `weighted_heads` gives its heads
pixel weights and soft labels, `segmentor_step` is the bilevel step through them, `segmentor_training` an iteration and its
state. Only `mmseg` and `mmengine` import a host; the others serve a trainer of your own, too. `torchmetrics` makes the metrics
some of that library, for Lightning and its like. Nothing here is imported by the rest of the package.
"""
