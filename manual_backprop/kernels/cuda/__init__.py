"""The pairs on an NVIDIA GPU."""
