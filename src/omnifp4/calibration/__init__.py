"""What a model's linears read: sets of conversations, statistics of activations in a file, and Hessians layer by layer."""
