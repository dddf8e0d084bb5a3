"""The device: splitting its SMs between two streams, proving the split, and saying what is missing.

`green_context.partition` is what the engine calls; `doctor.diagnose` what a person asks first. Nothing here
imports torch until a function needs it, so `import fastcache.device` costs nothing.
"""
