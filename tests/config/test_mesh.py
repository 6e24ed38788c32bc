import pytest

from qwq_jax.config.mesh import MeshConfig


@pytest.mark.parametrize(
    ("mesh", "processes", "local_devices", "expected"),
    [
        (MeshConfig(data=8, tensor=4), 4, 8, MeshConfig(data=2, tensor=4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 2, 4, MeshConfig(data=1, fsdp=2, tensor=2)),
        (MeshConfig(data=4, tensor=2), 4, 4, MeshConfig(data=1, tensor=2)),  # half of the devices, as was asked
        (MeshConfig(data=2, tensor=16), 4, 8, None),  # a replica spans two hosts
        (MeshConfig(data=3, tensor=4), 2, 8, None),  # a replica too many
        (MeshConfig(data=2, tensor=3), 2, 4, None),
    ],
    ids=str,
)
def test_a_process_has_its_share_where_it_holds_whole_replicas(
    mesh: MeshConfig, processes: int, local_devices: int, expected: MeshConfig | None
) -> None:
    assert mesh.share_of_process(processes, local_devices) == expected
