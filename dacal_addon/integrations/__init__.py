"""Trainers that exist, wrapped: `mmseg` for DAFormer, HRDA, MIC and their forks.

`options` is what their config may say. `listening` hears what a host calls, `teachers` reads what its teacher returns,
`criterion` teaches its heads soft labels, `meta_step` is the bilevel step through these heads. `calibration` is what outlives
an iteration, `checkpoint` its state among the host's; `dacs_iteration` puts all of it into an iteration of a `DACS`. Only
`mmseg` imports a host; the others serve a trainer of your own, too. `torchmetrics` makes the metrics some of that library, for
Lightning and its like. Nothing here is imported by the rest of the package.
"""
