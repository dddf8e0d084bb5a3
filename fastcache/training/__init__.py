"""Training of compressors on a frozen model: text, distillation, the loop, and what came of it."""
