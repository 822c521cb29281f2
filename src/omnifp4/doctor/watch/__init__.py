"""Runs inside the user's script's process: records, never judges.

It is loaded under a name of its own and imports only the standard library: importing omnifp4 would register with
Transformers and so change what the script does. A hook that fails is noted and forgotten; the script goes on.
"""
