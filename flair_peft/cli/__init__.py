"""The command line ``flair-peft``: arguments, wording, terminal. Nothing else in the package prints.

May import everything; nothing imports it.
"""
