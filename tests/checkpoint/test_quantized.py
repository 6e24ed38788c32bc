"""Quantised checkpoints: converted once or while loading, the same bits; refused where full precision is needed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwq_jax.__main__ import main
from qwq_jax.checkpoint import open_checkpoint, read_param, restore_params
from qwq_jax.checkpoint.names import name_table
from qwq_jax.checkpoint.store import CheckpointWriter
from qwq_jax.config.mesh import MeshConfig
from qwq_jax.config.weights import parse_weights
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from qwq_jax.model.spec import model_spec
from qwq_jax.sharding import decode_layout, make_mesh
from tests.checkpoint.sources import random_tensors, read_tensors, tree_bytes, write_source

FORMATS = ["int8-head", "int4-g16"]


@pytest.fixture
def source(tmp_path: Path, tiny_config) -> Path:
    config = tiny_config.model_copy(update={"vocab_size": 256, "eos_token_ids": (255,)})
    return write_source(tmp_path / "hf", config, random_tensors(config, "bfloat16"))


def half_steps(matrix: np.ndarray, name: str) -> np.ndarray:
    """The largest error that quantisation of `[out, in]` may make in each weight, by its definition."""
    largest, group = (127, matrix.shape[1]) if name.startswith("int8") else (7, 16)
    groups = np.abs(matrix.astype(np.float64)).reshape(len(matrix), -1, group)
    half = groups.max(-1, keepdims=True) / largest / 2
    return (half + 0 * groups).reshape(matrix.shape) * 1.0001  # float32 arithmetic


@pytest.mark.parametrize("name", FORMATS)
def test_converted_once_or_at_load_gives_the_same_bits(tmp_path: Path, source: Path, name: str) -> None:
    weights = parse_weights(name)
    once, plain = str(tmp_path / "quantised"), str(tmp_path / "plain")
    report = convert(str(source), once, quantize=name)
    convert(str(source), plain)
    opened = open_checkpoint(once)
    projections = sum(record.path.endswith("_scale") for record in opened.manifest.tensors)
    assert projections == 14 + weights.head and report.tensors == 27 + projections
    assert opened.manifest.weights == weights and opened.manifest.format_version == 2
    layout = decode_layout(make_mesh(MeshConfig(data=2, tensor=4)))
    got = restore_params(opened, layout, jnp.float32, weights)
    want = restore_params(open_checkpoint(plain), layout, jnp.float32, weights)
    spec = model_spec(opened.config, jnp.float32, weights)
    assert got.keys() == want.keys() == spec.keys()
    for path, array in got.items():
        dtype = np.int8 if spec[path].dtype == "int4" else spec[path].dtype  # what CPUs hold
        assert (array.shape, array.dtype) == (want[path].shape, want[path].dtype) == (spec[path].shape, dtype)
        assert array.sharding == want[path].sharding == layout.sharding(spec[path].axes, array.shape), path
        np.testing.assert_array_equal(*(np.asarray(x).astype(np.float32) for x in (array, want[path])), err_msg=path)
    program = jax.jit(lambda params: {path: x.astype(jnp.float32) for path, x in params.items()})
    program.lower(got).compile()(got)  # as the engine does
    stored = sum(f.stat().st_size for f in Path(once, "params").rglob("*") if f.is_file())
    assert stored < (0.62 if weights.bits == 8 else 0.5) * sum(t.nbytes for t in read_tensors(source).values()) + 60_000


@pytest.mark.parametrize("name", FORMATS)
def test_export_needs_dequantize_and_then_writes_q_times_scale(tmp_path: Path, source: Path, name: str) -> None:
    convert(str(source), str(tmp_path / "ours"), quantize=name)
    with pytest.raises(ValueError, match=f"holds {name} weights, of which Hugging Face.* or give --dequantize"):
        export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "back"), "--dequantize"]) == 0
    before, after = read_tensors(source), read_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for path, tensor in after.items():
        assert tensor.dtype == "bfloat16" and tensor.shape == before[path].shape
        if "proj.weight" in path or (path == "lm_head.weight" and "head" in name):
            exact, got = before[path].astype(np.float64), tensor.astype(np.float64)
            allowed = half_steps(before[path], name) + 2**-8 * np.abs(exact)  # what bfloat16 rounds of q * scale
            assert (np.abs(got - exact) <= allowed).all() and (got != exact).mean() > 0.2, path
        else:
            np.testing.assert_array_equal(tensor, before[path])
    again = export(str(tmp_path / "ours"), str(tmp_path / "back"), dequantize=True)
    assert again.nbytes == 0 and again.verified == 27


def test_a_flipped_scale_is_noticed_on_export(tmp_path: Path, source: Path) -> None:
    convert(str(source), str(tmp_path / "ours"), quantize="int8")
    other = write_source(tmp_path / "hf2", open_checkpoint(str(tmp_path / "ours")).config, {
        name: (tensor * 2).astype(tensor.dtype) for name, tensor in read_tensors(source).items()
    })  # fmt: skip
    convert(str(other), str(tmp_path / "wrong"), quantize="int8")
    victim = Path("params") / "layers.1.mlp.up_kernel_scale"
    for file in (tmp_path / "wrong" / victim).rglob("*"):
        if file.is_file():
            (tmp_path / "ours" / victim / file.relative_to(tmp_path / "wrong" / victim)).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_kernel_scale is damaged"):
        export(str(tmp_path / "ours"), str(tmp_path / "back"), dequantize=True)


class Stop(Exception):
    """Stands for whatever ends a conversion from outside."""


@pytest.mark.parametrize("after", [1, 6, 9, 24])
def test_a_stopped_conversion_goes_on_and_writes_nothing_twice(tmp_path, source, monkeypatch, after) -> None:
    """Between a projection and its scales too."""
    convert(str(source), str(tmp_path / "whole"), quantize="int4-g16")
    write, written = CheckpointWriter.write, []

    def counted(self, array, record):
        if len(written) == after:
            raise Stop
        write(self, array, record)
        written.append(record.path)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", counted)
        patch.setattr("qwq_jax.jobs.convert.WRITERS", 1)
        with pytest.raises(Stop):
            convert(str(source), str(tmp_path / "ours"), quantize="int4-g16")
    with pytest.raises(ValueError, match="with other files or settings"):
        convert(str(source), str(tmp_path / "ours"), quantize="int4")
    before = list(written)
    after = 10_000
    monkeypatch.setattr(CheckpointWriter, "write", counted)
    convert(str(source), str(tmp_path / "ours"), quantize="int4-g16")
    assert len(written) == len(set(written)) == 27 + 14 and written[: len(before)] == before
    assert tree_bytes(tmp_path / "ours") == tree_bytes(tmp_path / "whole")


def test_a_quantised_checkpoint_is_refused_where_others_are_needed(tmp_path: Path, source: Path) -> None:
    convert(str(source), str(tmp_path / "ours"), quantize="int8")
    checkpoint = open_checkpoint(str(tmp_path / "ours"))
    with pytest.raises(
        ValueError, match="holds int8 weights, where weights of full precision are needed: use the checkpoint that"
    ):
        restore_params(checkpoint, None, jnp.float32)
    with pytest.raises(ValueError, match="holds int8 weights, where int4 weights are needed"):
        restore_params(checkpoint, None, jnp.float32, parse_weights("int4"))
    with pytest.raises(ValueError, match="cannot be quantised: leave --allow-nan or --quantize out"):
        convert(str(source), str(tmp_path / "nan"), quantize="int8", allow_nan=True)
    assert main(["convert", str(source), str(tmp_path / "x"), "--quantize", "int5"]) == 2


def test_manifest_of_other_checkpoints_is_what_it_was(tmp_path: Path, source: Path) -> None:
    convert(str(source), str(tmp_path / "ours"))
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    assert manifest["format_version"] == 1 and "weights" not in manifest


def test_parameters_mean_what_their_axes_say(tmp_path: Path, source: Path) -> None:
    """Against the mathematics rather than the inverse: a swapped permutation of scales would still round-trip."""
    convert(str(source), str(tmp_path / "ours"), quantize="int4-g16")
    ours, tensors = open_checkpoint(str(tmp_path / "ours")), read_tensors(source)
    params = {k: np.asarray(v).astype(np.float32) for k, v in restore_params(ours, None, jnp.float32,
              ours.manifest.weights).items()}  # fmt: skip
    rows = {row.path: row for row in name_table(ours.config)}
    for path, group_axis in (("layers.1.attention.q_kernel", 1), ("layers.0.attention.o_kernel", 2),
                             ("layers.0.mlp.down_kernel", 1)):  # fmt: skip
        wide = params[path] * np.expand_dims(params[f"{path}_scale"], group_axis)
        matrix = tensors[rows[path].source].astype(np.float64)
        got = rows[path].to_source(wide.reshape(rows[path].shape))
        assert (np.abs(got - matrix) <= half_steps(matrix, "int4")).all(), path
    assert read_param(ours, "layers.0.mlp.down_kernel").dtype == np.uint8
