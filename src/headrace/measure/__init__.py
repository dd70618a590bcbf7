"""What a bundle is worth: parity along the chain, speed, fidelity to its checkpoint."""
