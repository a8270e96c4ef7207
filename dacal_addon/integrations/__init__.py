"""Trainers that exist, wrapped: `mmseg` for DAFormer, HRDA and MIC.

`options` is what their config may say, `criterion` teaches their heads soft labels, `shadows` listens to them, `checkpoint`
puts our state among theirs. Nothing here is imported by the rest of the package.
"""
