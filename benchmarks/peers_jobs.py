"""Two jobs with blocks and large activations, each step some tenths of a second; for benchmarks/peers.py.

Everything is by AdamW, and in fp32 unless delest is told otherwise, so that all who train them do the same arithmetic; the memory format is
free, since it changes none.
"""

from __future__ import annotations

from dataclasses import replace

from plan_jobs import Text, Vision, images, job, next_token, tokens

import delest

BATCH = {"gpt": 8, "vit": 32}  # effective
WORDS = 50257


def gpt() -> delest.Job:
    """A causal language model with GPT-2's vocabulary on sequences of 64: logits and the states of both tables are most of what a step holds."""
    build = lambda: Text(width=256, layers=4, vocabulary=WORDS, causal=True)  # noqa: E731
    return _free(job(build, tokens(64, BATCH["gpt"], WORDS), BATCH["gpt"], step=next_token))


def vit() -> delest.Job:
    """A vision transformer on images of 80 x 80."""
    return _free(job(lambda: Vision(width=256, layers=4), images(80, BATCH["vit"]), BATCH["vit"]))


def _free(made: delest.Job) -> delest.Job:
    return replace(made, recipe=replace(made.recipe, memory_format="auto"))
