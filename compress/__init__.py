"""Methods that make weights smaller, and the one loop that applies them.

Shape letters: `O` out features, `I` in features, `G` groups along the input.
"""
