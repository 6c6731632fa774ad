"""The rewritten programs on real GPUs: prepared anywhere, run where GPUs are, told in docs/."""
