"""Hugging Face -> Orbax -> Hugging Face keeps every byte; the table says where each tensor goes."""

import hashlib
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qwq_jax.checkpoint import open_checkpoint, read_param, restore_params
from qwq_jax.checkpoint.names import check_leaves, name_table
from qwq_jax.config.model import ModelConfig
from qwq_jax.jobs.convert import convert
from qwq_jax.jobs.export import export
from qwq_jax.model.spec import model_spec
from tests.checkpoint.sources import COMPANIONS, make_source, model_config, random_tensors, read_tensors, write_source


def assert_same_tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert got[name].tobytes() == want[name].tobytes(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_byte_returns(tmp_path: Path, dtype: str, tied: bool, shards: int) -> None:
    source = make_source(tmp_path / "hf", dtype=dtype, tied=tied, shards=shards)
    report = convert(str(source), str(tmp_path / "ours"))
    tensors = read_tensors(source)
    assert report.written == report.tensors == len(tensors)
    exported = export(str(tmp_path / "ours"), str(tmp_path / "back"), max_shard_bytes=30_000)
    assert exported.verified == len(tensors)
    assert exported.files > 1
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)
    for name in ("config.json", *COMPANIONS):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "back.exporting").exists()


def test_export_is_laid_out_as_on_the_hub(tmp_path: Path) -> None:
    convert(str(make_source(tmp_path / "hf", dtype="bfloat16")), str(tmp_path / "ours"))
    export(str(tmp_path / "ours"), str(tmp_path / "many"), max_shard_bytes=30_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert sum(t.nbytes for t in read_tensors(tmp_path / "many").values()) == index["metadata"]["total_size"]
    assert all((tmp_path / "many" / name).stat().st_size < 30_000 + 4_000 for name in files)
    export(str(tmp_path / "ours"), str(tmp_path / "one"))
    assert [p.name for p in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]


def test_table_is_total_for_every_shape_of_the_family() -> None:
    for tied in (False, True):
        for bias in (False, True):
            config = ModelConfig(**{**model_config(tied=tied).model_dump(), "qkv_bias": bias})
            table = name_table(config)
            check_leaves(table, {path: spec.shape for path, spec in model_spec(config).items()})
            names = set(random_tensors(config, "float32"))
            assert {row.source for row in table} == {n for n in names if bias or not n.endswith(".bias")}


def test_parameters_mean_what_their_axes_say(tmp_path: Path) -> None:
    """Against the mathematics rather than the inverse: a swapped pair of permutations would still round-trip."""
    config = model_config()
    convert(str(make_source(tmp_path / "hf")), str(tmp_path / "ours"))
    tensors, ours = read_tensors(tmp_path / "hf"), open_checkpoint(str(tmp_path / "ours"))
    x = np.random.default_rng(1).standard_normal(config.hidden_size).astype(np.float32)
    q = tensors["model.layers.1.self_attn.q_proj.weight"] @ x + tensors["model.layers.1.self_attn.q_proj.bias"]
    got = np.einsum("d,dnh->nh", x, read_param(ours, "layers.1.attention.q_kernel"))
    got += read_param(ours, "layers.1.attention.q_bias")
    np.testing.assert_allclose(got, q.reshape(config.num_heads, config.head_dim), atol=2e-5)  # float32 sums of 40
    heads = np.random.default_rng(2).standard_normal((config.num_heads, config.head_dim)).astype(np.float32)
    out = np.einsum("nh,nhd->d", heads, read_param(ours, "layers.0.attention.o_kernel"))
    want = tensors["model.layers.0.self_attn.o_proj.weight"] @ heads.reshape(-1)
    np.testing.assert_allclose(out, want, atol=5e-5)  # float32 sums of 96
    gate = x @ read_param(ours, "layers.0.mlp.gate_kernel")
    np.testing.assert_allclose(gate, tensors["model.layers.0.mlp.gate_proj.weight"] @ x, atol=2e-5)


def test_dtype_casts_and_export_says_so(tmp_path: Path) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16")
    convert(str(source), str(tmp_path / "ours"), dtype="float32")
    assert open_checkpoint(str(tmp_path / "ours")).dtype == np.float32
    report = export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert report.verified == 27
    got = read_tensors(tmp_path / "back")
    assert_same_tensors(got, {name: t.astype(np.float32) for name, t in read_tensors(source).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"
    convert(str(tmp_path / "back"), str(tmp_path / "narrow"), dtype="bfloat16")
    export(str(tmp_path / "narrow"), str(tmp_path / "again"))
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(source))


def test_mixed_dtypes_stay(tmp_path: Path) -> None:
    tensors = random_tensors(model_config(), "bfloat16")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    source = write_source(tmp_path / "hf", model_config(), tensors)
    convert(str(source), str(tmp_path / "ours"))
    export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)


def test_manifest_records_the_source(tmp_path: Path) -> None:
    source = make_source(tmp_path / "hf", dtype="bfloat16")
    convert(str(source), str(tmp_path / "ours"))
    manifest = json.loads((tmp_path / "ours" / "manifest.json").read_text())
    tensors = read_tensors(source)
    assert manifest["format_version"] == 1 and manifest["config"]["num_layers"] == 2
    assert [t["source"] for t in manifest["tensors"]] == [row.source for row in name_table(model_config())]
    for tensor in manifest["tensors"]:
        assert tensor["sha256"] == hashlib.sha256(tensors[tensor["source"]].tobytes()).hexdigest()
        assert tensor["dtype"] == tensor["source_dtype"] == "bfloat16"
    assert not (tmp_path / "ours" / "partial").exists()


def test_a_redundant_equal_head_of_a_tied_model_is_dropped(tmp_path: Path) -> None:
    tensors = random_tensors(model_config(tied=True), "bfloat16")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_source(tmp_path / "hf", model_config(tied=True), tensors)
    convert(str(source), str(tmp_path / "ours"))
    export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_tensors(read_tensors(tmp_path / "back"), {k: v for k, v in tensors.items() if k != "lm_head.weight"})


def test_export_notices_a_flipped_value(tmp_path: Path) -> None:
    """With valid checksums of its own: what the hash of the source bytes is there for."""
    convert(str(make_source(tmp_path / "hf")), str(tmp_path / "ours"))
    convert(str(make_source(tmp_path / "other", seed=1)), str(tmp_path / "wrong"))
    victim = Path("params") / "layers.1.mlp.up_kernel"
    for file in (tmp_path / "wrong" / victim).rglob("*"):
        if file.is_file():
            (tmp_path / "ours" / victim / file.relative_to(tmp_path / "wrong" / victim)).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_kernel is damaged"):
        export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert not (tmp_path / "back").exists() and not (tmp_path / "back.exporting").exists()


def test_a_flipped_bit_on_disk_is_noticed_on_reading(tmp_path: Path) -> None:
    convert(str(make_source(tmp_path / "hf")), str(tmp_path / "ours"))
    file = next(p for p in (tmp_path / "ours" / "params" / "layers.0.mlp.up_kernel" / "c").rglob("*") if p.is_file())
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_kernel.*Digest mismatch"):
        read_param(open_checkpoint(str(tmp_path / "ours")), "layers.0.mlp.up_kernel")


def test_infinities_pass_only_when_allowed(tmp_path: Path) -> None:
    tensors = random_tensors(model_config(), "bfloat16")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = ml_dtypes.bfloat16(np.inf)
    source = write_source(tmp_path / "hf", model_config(), tensors)
    convert(str(source), str(tmp_path / "ours"), allow_nan=True)
    export(str(tmp_path / "ours"), str(tmp_path / "back"))
    assert_same_tensors(read_tensors(tmp_path / "back"), tensors)


@pytest.mark.parametrize("spelling", ["./{}", "../here/{}", "{}/", "./{}//"])
def test_paths_as_a_shell_completes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    make_source(tmp_path / "here" / "hf", dtype="bfloat16")
    at = spelling.format
    convert(at("hf"), at("ours"))
    checkpoint = open_checkpoint(at("ours"))
    params = restore_params(checkpoint, None)
    assert params.keys() == checkpoint.spec.keys()
    assert export(at("ours"), at("back")).verified == 27
    assert_same_tensors(read_tensors(tmp_path / "here" / "back"), read_tensors(tmp_path / "here" / "hf"))


def test_a_source_whose_tokenizer_cannot_be_used_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    convert(str(make_source(tmp_path / "hf")), str(tmp_path / "ours"))
    assert "generate and chat will refuse this checkpoint" in caplog.text
