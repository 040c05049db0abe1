"""This machine: processor, memory and its limits, accelerators, micro-probes, and the checks of `doctor`."""
