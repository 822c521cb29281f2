"""Algorithms that choose the numbers of a quantized weight by what the weight does to its inputs.

All of them work on tensors: a weight ``[..., out, in]`` and what is known of its inputs, the Hessian ``H = E[x x']``
``[..., in, in]`` or parts of it. The output error of a rounded weight ``W'`` is then ``tr((W - W') H (W - W')')``, the
mean squared difference of the outputs, so that no sample needs to be kept. Leading dimensions are experts.
"""
