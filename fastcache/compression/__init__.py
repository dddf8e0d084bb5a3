"""Compression methods: what each one keeps of a prompt's KV cache.

A method sees tensors and never pages. `registry` knows the names and imports no torch; `base` is the
contract.
"""
