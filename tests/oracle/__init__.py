"""Independent forward passes, one module per architecture, named after its model_type.

They are written from the published descriptions in float64 and import nothing of headrace: an error in the decoder, in
a checkpoint reader or in a rotary table cannot hide in them.
"""
