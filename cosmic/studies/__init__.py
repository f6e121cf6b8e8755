"""What can be learnt with directions once they are found: steering, comparison, harmfulness, explanation.

Everything here is built on what `cosmic` itself offers, and nothing there needs it.
"""
