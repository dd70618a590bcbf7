"""The bundle format on disk, and nothing else: manifest, weights, grids, recipe, encodings."""
