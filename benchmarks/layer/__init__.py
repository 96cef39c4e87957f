"""The parts of `python -m benchmarks.moe_layer`."""
