"""What benchmarks/faults.py does to an export: a file for each kind of disturbance."""
