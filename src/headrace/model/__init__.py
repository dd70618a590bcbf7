"""The decoder's arithmetic, written once (decoder.py), over a small set of operations (ops.py)."""
