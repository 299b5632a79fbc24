"""A split once more without hard negatives, and once more with the target of another example as each one's hard negative.

.venv/bin/python experiments/006_hard_negatives/random_negatives.py <split> <seed> <out without> <out with>
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from datamodules.order import generator
from datamodules.sample import Example
from datamodules.shards import Split, write_split


def main(source: str, seed: str, without: str, anywhere: str) -> None:
    """Write both."""
    split = Split(source)
    chance = generator(int(seed), "random negatives")

    def other(example: Example) -> Example:
        while (drawn := split.read(int(chance.integers(len(split)))).target) == example.target:
            pass
        assert drawn is not None
        return dataclasses.replace(example, negatives=(drawn,))

    examples = (split.read(position) for position in range(len(split)))
    write_split(without, (dataclasses.replace(example, negatives=()) for example in examples))
    write_split(anywhere, (other(split.read(position)) for position in range(len(split))))


if __name__ == "__main__":
    main(*sys.argv[1:])
