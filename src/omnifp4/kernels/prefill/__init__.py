"""Many tokens at once: unpacking, linear layers and routed experts in Triton, for tens of tokens and more."""
