"""`python tests/recorded.py train.py ..` is `python train.py ..` that writes down what it trains on, see zygote.py."""

import sys

import zygote

import train

if __name__ == "__main__":
    zygote.instrument()
    sys.exit(train.run(sys.argv[2:]))
