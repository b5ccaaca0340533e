"""The data set of science and mathematical reasoning: ten published data sets as training samples.

After arXiv 2406.08487, sections 2.4 and B.
"""
