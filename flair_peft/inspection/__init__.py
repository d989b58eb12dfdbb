"""What model files say and hold, read without loading a model: reports, comparisons, plots.

May import ``models`` and what lies below it.
"""
