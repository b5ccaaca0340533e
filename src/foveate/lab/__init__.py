"""The lab: visual question answering on pictures made from a seed, to compare methods in minutes on a CPU.

Coloured shapes on crops of real photographs carry small letters, words and handwritten digits: too small for
the tower's base view, legible at two to four times the size. Everything about a picture is known, so accuracy
on fine and on coarse questions is measured separately, and every object has its box.

    levels, scales     what is drawn, and how large the networks are: data
    materials          photographs, digits, fonts and words, split between training and test
    scenes, questions  a seed -> a picture with boxes -> questions with answers
    words              the tokenizer
    tower, reader      pre-training of the stand-ins for CLIP and for Vicuna; `prepare` makes both
    features           frozen vision features on disk, one file per view
    packing            many questions after one visual prefix, as one sequence
    controls           baselines, not methods: pooled tiles, a resampler, an oracle crop
    training, report   one cell of an experiment; all of them in a table
"""
