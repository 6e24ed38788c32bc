"""One process of several: restores a checkpoint onto a mesh over all of them and says how many bytes it read."""

import hashlib
import json
import sys

import jax
import numpy as np
import tensorstore as ts

from qwq_jax import runtime
from qwq_jax.checkpoint.store import open_checkpoint, restore_params
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.sharding import make_mesh, train_layout

METRIC = "/tensorstore/kvstore/file/bytes_read"

if __name__ == "__main__":
    runtime.start(simulate_devices=4, distributed=True)
    checkpoint = open_checkpoint(sys.argv[1])
    params = restore_params(checkpoint, train_layout(make_mesh(MeshConfig(fsdp=4, tensor=2))))
    jax.block_until_ready(params)
    shards = {
        f"{name} {shard.index}": hashlib.sha256(np.ascontiguousarray(shard.data).tobytes()).hexdigest()
        for name, array in params.items()
        for shard in array.addressable_shards
    }
    (metric,) = [m for m in ts.experimental_collect_matching_metrics(METRIC) if m["name"] == METRIC]
    print(json.dumps({"bytes_read": metric["values"][0]["value"], "shards": shards}))
