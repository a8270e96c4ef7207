"""A host in small: what `dacal_addon.integrations.mmseg` relies on in DAFormer, HRDA and MIC, under the same names.

Written for the tests, after the interface and the order of calls of the real ones; `make upstream` tests against those.
"""
