"""The decoder as a program for headrace-kernels (docs/kernels.md), and the runner over it. The package is optional."""
