"""What lies on disk, and the model that is built back from it.

Shape letters: `O` out features, `I` in features, `G` groups along the input, `E` experts.
"""
