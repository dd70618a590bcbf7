"""What a model will need and how fast phones will run it, before anything is made: sizes, roofline, whether it fits."""
