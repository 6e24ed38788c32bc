"""Rooflines against closed forms, and what lies on a device in each phase."""

import subprocess
import sys

import pytest

from qwq_jax.jobs.plan_worker import described_devices
from qwq_jax.plan.chips import CHIPS, USUAL_TOPOLOGIES, parse_topology
from qwq_jax.plan.cost import ProgramCost, attention_flops, axes_of, exchange_seconds, least_seconds
from qwq_jax.plan.hlo import Collective
from qwq_jax.plan.memory import INFERENCE_PHASES, PROGRAMS, RESERVED, Memory, held_by_programs, room_for_pages


def cost(**fields) -> ProgramCost:
    return ProgramCost(**({"temporaries": 0, "result": 0, "code": 0, "flops": 0.0, "moved": 0} | fields))


ARRAYS = """
import jax, jax.numpy as jnp
from qwq_jax.jobs.plan_worker import described_devices, held_bytes
from qwq_jax.plan.chips import parse_topology
place = jax.sharding.SingleDeviceSharding(described_devices(parse_topology("v4:2x2x1"))[0])
rows = lambda n: jax.ShapeDtypeStruct((n << 20, 1024), jnp.int8, sharding=place)
print(held_bytes({"a": rows(1)}) / 2**30, held_bytes({"a": rows(40), "b": rows(2)}) / 2**30)
"""


@pytest.mark.slow
def test_what_arrays_take_where_they_do_not_fit() -> None:
    """v4 has 32 GiB a device, of which a program may have 30.75."""
    # In a process of its own, as in a plan: a cache of compiled programs cannot give back those of absent devices.
    told = subprocess.run([sys.executable, "-c", ARRAYS], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["1.0", "42.0"], told


def test_topologies() -> None:
    topology = parse_topology("tpu7x:2x2x1")
    assert (topology.chips, topology.devices, topology.hosts) == (4, 8, 1)
    assert [parse_topology(name).hosts for name in ("v5e:2x4", "v5e:4x4", "v5p:4x4x4")] == [1, 4, 16]
    for name in USUAL_TOPOLOGIES:
        assert parse_topology(name).name == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5litepod-8", "the chip is 'v5litepod-8'; expected one of v4"),
        ("v5e:4", "v5e slices have 2 sides, as in v5e:2x4"),
        ("v5p:4x4", "v5p slices have 3 sides, as in v5p:2x2x1"),
        ("v6e:0x4", "v6e slices have 2 sides"),
        ("v6e:2xtwo", "v6e slices have 2 sides"),
        ("two*v6e:2x2", "expected a number of slices before the"),
        ("2*tpu7x:2x2x1", "how fast slices of tpu7x talk to each other is not known here"),
    ],
)
def test_what_is_no_topology_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_topology(name)


def test_the_larger_of_products_and_bytes_bounds() -> None:
    topology = parse_topology("v6e:2x2")
    chip = CHIPS["v6e"]
    products = least_seconds(cost(flops=chip.bf16, moved=int(chip.bandwidth / 2)), topology, tensor=1)
    assert (products.total, products.bound) == (pytest.approx(1.0), "compute")
    memory = least_seconds(cost(flops=chip.bf16 / 2, moved=int(chip.bandwidth)), topology, tensor=1)
    assert (memory.total, memory.bound) == (pytest.approx(1.0), "HBM")


def test_a_device_of_two_on_a_chip_has_half_of_it() -> None:
    chip = CHIPS["tpu7x"]
    seconds = least_seconds(
        cost(flops=chip.bf16 / 2, moved=int(chip.bandwidth / 2)), parse_topology("tpu7x:2x2x1"), tensor=1
    )
    assert (seconds.compute, seconds.memory) == (pytest.approx(1.0), pytest.approx(1.0))


def test_products_of_8_bits_are_faster_where_the_chip_has_them() -> None:
    flops = cost(flops=CHIPS["v5e"].bf16)
    assert least_seconds(flops, parse_topology("v5e:2x4"), tensor=1, int8=True).compute == pytest.approx(0.5)
    four = cost(flops=CHIPS["v4"].bf16)
    assert least_seconds(four, parse_topology("v4:2x2x1"), tensor=1, int8=True).compute == pytest.approx(1.0)


def test_exchanges_of_activations_are_waited_for_and_those_of_weights_are_not() -> None:
    topology = parse_topology("v5p:4x4x4")
    reduced = Collective("all-reduce", 4, 1, 10**9, 1)
    gathered = Collective("all-gather", 16, 4, 10**9, 1)
    seconds = least_seconds(cost(flops=1e14, collectives=(reduced, gathered)), topology, tensor=4)
    assert seconds.waited == pytest.approx(exchange_seconds(reduced, topology))
    assert seconds.hidden == pytest.approx(exchange_seconds(gathered, topology))
    assert seconds.total == pytest.approx(max(seconds.compute, seconds.hidden) + seconds.waited)


def test_an_exchange_takes_what_a_ring_takes() -> None:
    """Of n devices each sends (n - 1) / n of the array over its links; an all-reduce does that twice."""
    topology = parse_topology("v5p:4x4x4")
    size, link = 4 * 10**9, CHIPS["v5p"].link
    gathered = exchange_seconds(Collective("all-gather", 4, 1, size, 1), topology)
    assert gathered == pytest.approx(size * 0.75 / link, rel=1e-3)
    reduced = exchange_seconds(Collective("all-reduce", 4, 1, size, 1), topology)
    assert reduced == pytest.approx(2 * gathered, rel=1e-3)
    # Sixteen devices span two sides of four, and so twice the links.
    wide = exchange_seconds(Collective("all-gather", 16, 1, size, 1), topology)
    assert wide == pytest.approx(size * 15 / 16 / (2 * link), rel=1e-3)


def test_a_side_that_is_no_ring_has_half_the_links() -> None:
    size = 10**9
    open_side = exchange_seconds(Collective("all-gather", 4, 1, size, 1), parse_topology("v5e:4x4"))
    assert open_side == pytest.approx(size * 0.75 / (CHIPS["v5e"].link / 2), rel=1e-2)


def test_slices_exchange_what_each_device_has() -> None:
    """Two slices of v5e:4x4, data 2 x fsdp 16: gradients are summed within a slice, then each part over the network."""
    topology = parse_topology("2*v5e:4x4")
    assert (topology.chips, topology.hosts, topology.slice_name) == (32, 8, "v5e:4x4")
    size, chip = 16 * 10**9, CHIPS["v5e"]
    across = exchange_seconds(Collective("all-reduce", 2, 16, size, 1), topology)
    assert across == pytest.approx(2 * size / 2 / chip.between_slices, rel=1e-3)
    both = exchange_seconds(Collective("all-reduce", 32, 1, size, 1), topology)
    inside = exchange_seconds(Collective("all-reduce", 16, 1, size, 1), topology)
    assert both == pytest.approx(inside + 2 * size / 16 / 2 / chip.between_slices, rel=1e-3)
    assert exchange_seconds(Collective("all-reduce", 16, 1, size, 1), parse_topology("v5e:4x4")) == inside


def test_a_small_exchange_takes_its_hops() -> None:
    assert exchange_seconds(Collective("all-reduce", 8, 1, 4, 1), parse_topology("v5e:2x4")) == pytest.approx(
        4e-6, rel=1e-2
    )


def test_attention_of_a_causal_row() -> None:
    T, N, H = 64, 4, 16
    pairs = T * (T + 1) / 2
    closed = 2 * pairs * N * H * 2
    assert attention_flops(queries=T, context=(T + 1) / 2, heads=N, head_dim=H) == closed


def test_axes_that_a_group_spans() -> None:
    axes = {"data": 2, "fsdp": 4, "tensor": 8}
    assert axes_of(Collective("all-reduce", 8, 1, 1, 1), axes) == "tensor"
    assert axes_of(Collective("all-reduce", 4, 8, 1, 1), axes) == "fsdp"
    assert axes_of(Collective("all-reduce", 8, 8, 1, 1), axes) == "data x fsdp"
    assert axes_of(Collective("all-reduce", 32, 1, 1, 1), axes) == "fsdp x tensor"


def memory(**fields) -> Memory:
    programs = {
        "decode": cost(temporaries=10, result=1),
        "gradient": cost(temporaries=500),
        "sync": cost(result=300),
    }
    given = {"usable": 1000, "held": {"state": 100}, "engine": {"weights": 200, "cache": 400}, "gradients": 50}
    return Memory(**(given | {"programs": programs} | fields))


def test_phases_have_what_is_there_at_a_time() -> None:
    """While the policy learns the engine is not there, and what `sync` makes are the engine's weights."""
    assert memory().peaks == {"rollout": 711, "gradient": 650, "sync": 400}
    assert memory().shortfall == 0
    assert memory(usable=700).shortfall == 11


def test_pages_that_fit() -> None:
    empty = memory(engine={"weights": 200}, programs={"decode": cost(temporaries=10)}, phases=INFERENCE_PHASES)
    assert room_for_pages(empty, 100) == (1000 - 100 - 200 - 10) // 100


def test_programs_take_their_code_or_a_reserve() -> None:
    programs = {"decode": cost(code=3), "update": cost(code=5)}
    assert held_by_programs(programs, {"decode": 4}) == {PROGRAMS: 4 * 3 + 5}
    programs["update"] = cost(code=None)
    assert held_by_programs(programs, {"decode": 4}) == {PROGRAMS: 4 * 3, RESERVED: 128 << 20}
    programs["decode"] = cost(code=None)
    assert held_by_programs(programs, {"decode": 4}) == {RESERVED: (4 * 48 + 128) << 20}


@pytest.mark.filterwarnings("ignore")  # libtpu looks for the machine it is on, and says that there is none
def test_slices_have_the_devices_that_a_compiler_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libtpu", reason="the TPU compiler runs on Linux only")
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")):
        monkeypatch.setenv(name, value)
    for name in (*USUAL_TOPOLOGIES, "2*v5e:2x4"):
        assert len(described_devices(parse_topology(name))) == parse_topology(name).devices, name
