"""A text, character by character: a small causal transformer learns what comes next.

    delest run examples/text.py --data PATH/TO/book.txt

Any text of a few hundred kilobytes in UTF-8 will do, as Tiny Shakespeare (https://github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt,
1.1 MB). With --tokenizer tokenizer.json tokens are those of the package tokenizers, with --context 256 the model sees more of them at once.
The model is delest's starter network for texts, judged by its loss: the cross-entropy of a token in nats.
"""

import delest

job = delest.Job(
    data="book.txt",  # a file here; name another with --data
    context=128,
    name="text",
)
