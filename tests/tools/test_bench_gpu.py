"""The benchmark on a GPU, here on a CPU: weights become JAX's without a change, and all of it runs and is reported."""

import numpy as np
import pytest

from qwq_jax.config.mesh import MeshConfig
from qwq_jax.sharding import make_mesh, train_layout
from tools import gpu_peer
from tools.bench_gpu import Bench, compare, measure, our_logits, parse, report

TINY = (
    "--device cpu --dtype float32 --tiny --layers 1 --requests 3 --batch 2 --prompt 40 --longest 6 --chunk 32 "
    "--stream 20 --rank 2 --accumulation 1 --rows 1 --row-length 24 --steps 2"
).split()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_weights_drawn_by_torch_give_the_same_logits():
    bench = Bench.of(parse(TINY))
    model = gpu_peer.random_model(bench.config, "float32", "cpu")
    theirs = gpu_peer.logits_of(model, bench.checked)
    layout = train_layout(make_mesh(MeshConfig()))
    ours = our_logits(bench, gpu_peer.take_weights(model, bench.config, layout, "cpu"), layout)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert all(parameter.numel() == 0 for parameter in model.parameters())


def test_another_model_is_noticed():
    theirs = np.random.default_rng(0).standard_normal((1, 8, 16))
    with pytest.raises(SystemExit, match="not the same model"):
        compare(theirs, theirs[:, ::-1], theirs * 1.001)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls transformers by names that will go
def test_everything_is_measured_and_reported():
    bench = Bench.of(parse(TINY))
    peer, ours, notes = measure(bench)
    assert ours.losses == pytest.approx(peer.losses, abs=2e-3) and ours.losses[1] < ours.losses[0]
    text = report(bench, peer, ours, notes)
    assert f"| batch, tokens/s | {peer.served:.1f} | {ours.served:.1f} | {ours.served / peer.served:.2f} |" in text
    assert f"| loss of the first step | {peer.losses[0]:.4f} | {ours.losses[0]:.4f} | |" in text
