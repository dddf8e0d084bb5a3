"""The engine: scheduler (counts), batch (inputs), runner (one forward pass), compressor, and `LLM` on top."""
