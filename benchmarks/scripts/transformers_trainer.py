"""A small GPT-2 from its configuration, trained on generated text by transformers' Trainer, with an evaluation at the end."""

import argparse
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=60)
parser.add_argument("--batch-size", type=int, default=8)
parser.add_argument("--memory", help="a budget that delest's callback holds")
options = parser.parse_args()

set_seed(0)
WORDS, LENGTH = 512, 64


class Text(torch.utils.data.Dataset):
    """Rows in which each word follows from the last."""

    def __init__(self, rows, seed):
        start = torch.randint(WORDS, (rows, 1), generator=torch.Generator().manual_seed(seed))
        self.rows = (start + 7 * torch.arange(LENGTH)) % WORDS

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return {"input_ids": self.rows[k], "labels": self.rows[k]}


class PrintLosses(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        print({name: logs[name] for name in ("loss", "grad_norm", "eval_loss", "train_loss") if name in logs})


model = GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4))
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    callbacks = [PrintLosses()]
    if options.memory:
        from delest.frameworks.transformers import DelestCallback

        callbacks.append(DelestCallback(options.memory, out=f"{folder}/run"))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Text(options.steps * options.batch_size, 0),
        eval_dataset=Text(64, 1),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)  # its lines hold run times, which differ from run to run
    trainer.train()
    print(f"eval_loss {trainer.evaluate()['eval_loss']!r}")
