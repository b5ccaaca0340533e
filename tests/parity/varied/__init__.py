"""Cases like the golden ones of other sizes, made here by transcriptions that share nothing with the library.

One file per method. A function makes one kind of case: its JSON and its tensors, from a number that the sizes
depend on, too.
"""
