"""Adapters as PEFT has them: keys of state dicts, configs, what is true of each method, injection into a model.

Knows PEFT and torch, nothing of Flair. May import ``primitives``.
"""
