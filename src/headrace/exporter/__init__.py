"""The main job: from a checkpoint to a bundle and a phone's folder, planned before and resumable."""
