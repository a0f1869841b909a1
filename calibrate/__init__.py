"""Statistics and passes over a model that streams past, block by block.

Shape letters: `B` batch, `T` tokens, `I` in features, `H` hidden size, `E` experts, `V` vocabulary.
"""
