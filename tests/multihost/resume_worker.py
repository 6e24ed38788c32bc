"""One process of two that each see a directory of their own: says which step it would go on from, or why not."""

import sys

import jax
from etils import epath

from qwq_jax import runtime
from qwq_jax.checkpoint.train_store import TrainStore
from qwq_jax.train.trainer import newest_step

if __name__ == "__main__":
    runtime.start(simulate_devices=4, distributed=True)
    directory = sys.argv[1].replace("INDEX", str(jax.process_index()))
    try:
        print(newest_step(TrainStore(epath.Path(directory)), identity={}))
    except ValueError as error:
        print(error)
