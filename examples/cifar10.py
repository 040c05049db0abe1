"""CIFAR-10: 60,000 colour photographs, 32x32 pixels, ten classes.

    delest run examples/cifar10.py --data PATH/TO/cifar10 --rows 5000

The folder holds Parquet files as the Hugging Face hub lays them out (train*.parquet, test*.parquet); the public copy is
the data set `uoft-cs/cifar10` there. The model is delest's starter network for images.
"""

import delest

job = delest.Job(
    data="cifar10",  # a folder here; name another with --data
    recipe=delest.Recipe(epochs=8, augment=("flip", "crop")),
    name="cifar10",
)
