"""From float weights to integer codes, a layer at a time. Works on token ids and tensors; knows no text, no graph."""
