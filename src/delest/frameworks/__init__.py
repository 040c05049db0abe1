"""Keras as a backend, and hooks for other people's training loops; the only room that imports Keras, Lightning and transformers.

`lightning.DelestCallback` and `transformers.DelestCallback` are thin: what a loop's step is, and when things happen in it.
`hook` applies the plan and guards the budget, `steps` makes a step in parts, `record` keeps the run folder.
"""
