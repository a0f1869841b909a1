"""Operations on tensors: the torch definition of each, and its Triton twin beside it.

Shape letters, here and in every folder: `B` batch, `T` tokens, `O` out features, `I` in features, `G` groups along
the input,
`H` heads, `D` head dimension, `E` experts, `V` vocabulary.
"""
